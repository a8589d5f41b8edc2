"""Runs: supervised and reinforcement learning, their optimizers, checkpoints and metrics."""
