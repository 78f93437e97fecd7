"""Operations with an implementation for each platform; imported as `capsjax.kernels`."""
