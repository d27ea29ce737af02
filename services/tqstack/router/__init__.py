"""The router: one OpenAI-compatible endpoint in front of the sidecar and Ollama."""
