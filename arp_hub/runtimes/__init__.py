"""The runtimes that models are deployed on: files in their formats, int8 by their quantisers, runs and timings."""
