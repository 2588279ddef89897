"""The OpenAI-compatible HTTP server. Never imports torch."""
