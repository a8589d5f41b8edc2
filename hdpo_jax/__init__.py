"""HDPO reinforcement learning of tool-using vision-language agents, in JAX."""
