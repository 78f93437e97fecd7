"""Settings of every test: no silent broadcasting of ranks, no accelerator."""

import jax
import pytest


@pytest.fixture(autouse=True, scope="session")
def _strict_jax():
    with jax.numpy_rank_promotion("raise"):
        yield
