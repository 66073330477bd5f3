"""What a plan, a model or a run comes to: counted, timed, in tables and pictures."""
