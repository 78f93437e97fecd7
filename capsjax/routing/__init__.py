"""Routing algorithms, one module each."""
