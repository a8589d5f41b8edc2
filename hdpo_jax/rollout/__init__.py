"""Sampling trajectories: pure jitted programs on the device, tools and bookkeeping on the host."""
