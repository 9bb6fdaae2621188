"""Answers from a bank over HTTP: a core that knows no web framework, and an ASGI app on it."""
