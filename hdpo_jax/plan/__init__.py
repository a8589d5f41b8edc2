"""What a run costs on a TPU slice: its programs compiled ahead of time, and counted, on a machine without a TPU."""
