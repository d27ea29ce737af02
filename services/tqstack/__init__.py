"""tqstack: one OpenAI-compatible endpoint, two backends, a compressed KV cache."""
