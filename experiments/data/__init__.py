"""Data sets and image transformations."""
