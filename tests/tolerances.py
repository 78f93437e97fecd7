"""How exact an implementation must be: measured, not chosen."""

import jax
import jax.numpy as jnp
import numpy as np


def assert_as_exact(actual, plain, exact):
    """Assert that `actual` errs at most twice as much as `plain` does, plus one last place.

    Args:
      actual: The tree under test.
      plain: The same from the plain implementation in the same dtype.
      exact: The same in float64.
    """
    actual, plain, exact = (jax.tree.leaves_with_path(tree) for tree in (actual, plain, exact))
    assert len(actual) == len(plain) == len(exact)
    for (path, a), (_, p), (_, e) in zip(actual, plain, exact, strict=True):
        assert a.dtype == p.dtype, f"{path}: {a.dtype} is not {p.dtype}"
        assert a.shape == p.shape == e.shape, f"{path}: {a.shape}, {p.shape}, {e.shape}"
        # A leaf's errors are compared with its largest entry: entries that cancel to nearly
        # nothing have no precision of their own.
        unit = float(jnp.finfo(a.dtype).eps) * max(np.abs(e).max(), 1e-30)
        allowed = 2 * np.abs(np.asarray(p, np.float64) - e).max() + unit
        error = np.abs(np.asarray(a, np.float64) - e).max()
        assert error <= allowed, f"{jax.tree_util.keystr(path)}: error {error:.2e} > {allowed:.2e}"


def assert_within_units(actual, exact, *, units):
    """Assert that `actual` errs at most so many last places of the largest entry of each leaf."""
    pairs = zip(*map(jax.tree.leaves_with_path, (actual, exact)), strict=True)
    for (path, a), (_, e) in pairs:
        assert a.shape == e.shape, f"{path}: {a.shape}, {e.shape}"
        unit = float(jnp.finfo(a.dtype).eps) * max(np.abs(e).max(), 1e-3)
        error = np.abs(np.asarray(a, np.float64) - e).max()
        assert error <= units * unit, (
            f"{jax.tree_util.keystr(path)}: error {error / unit:.1f} units"
        )
