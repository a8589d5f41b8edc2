"""What a policy can do: evaluation, scoring, conversion and the report page."""
