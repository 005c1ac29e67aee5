"""The OpenAI-compatible server, its metrics, and the live page."""
