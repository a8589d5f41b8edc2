"""Model families; they know JAX, Flax and `sharding`, nothing of reinforcement learning."""
