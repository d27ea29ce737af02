"""The backends: what they are, how they are, and what they serve."""
