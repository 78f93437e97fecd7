"""What trained networks do: numbers about them."""
