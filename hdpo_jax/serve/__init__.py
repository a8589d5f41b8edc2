"""A policy for whoever asks: one engine that samples for many, behind an OpenAI-compatible address or in a terminal."""
