"""Files for the runtimes that models are deployed on: written, quantised, checked and timed."""
