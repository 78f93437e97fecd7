"""The training loop, its checkpoints and records, and the networks that it trains."""
