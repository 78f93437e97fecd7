"""What the benchmarks time, and how they time it."""
