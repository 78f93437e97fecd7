"""Routing algorithms, one file each."""
