"""Settings of every test: no silent broadcasting of ranks, no accelerator."""

import contextlib
import resource

import jax
import pytest


@pytest.fixture(autouse=True, scope="session")
def _strict_jax():
    with jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def small_disk():
    """Writing past the given size of a file fails, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    @contextlib.contextmanager
    def small_disk(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return small_disk
