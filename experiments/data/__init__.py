"""Data sets, and the images made from them."""
