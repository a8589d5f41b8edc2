"""Data: parquet layouts, prompts, conversations, input pipelines, and the built-in task."""
