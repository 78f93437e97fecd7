"""Programs that train, evaluate and measure capsule networks."""
