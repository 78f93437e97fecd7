"""Operations with several implementations; import them as `capsjax.kernels`."""
