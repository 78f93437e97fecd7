"""Settings of every test: no silent broadcasting of ranks, no accelerator."""

import contextlib
import os
import resource

import jax
import pytest


@pytest.fixture(autouse=True, scope="session")
def _strict_jax():
    with jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(autouse=True, scope="session")
def _compiled_once(tmp_path_factory):
    """All workers, and the programs that they start, share what one of them compiled."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    settings = {
        "jax_compilation_cache_dir": str(folder / "compiled"),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    for name, value in settings.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)


@pytest.fixture(scope="module")
def quick_compilation():
    """Programs of a module are compiled without costly optimizations: most of them run once."""
    name = "jax_disable_most_optimizations"
    before = jax.config.read(name)
    jax.config.update(name, True)
    yield
    jax.config.update(name, before)


@pytest.fixture
def float64():
    """JAX computes in float64 where it is not told otherwise."""
    with jax.enable_x64(True):
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
