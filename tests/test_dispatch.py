"""The dispatcher: by name, by platform, and past what is unsupported."""

import jax
import jax.numpy as jnp
import pytest

from capsjax.kernels.dispatch import Unsupported, dispatch


def _double(x, *, times=1):
    return 2 * x * times


def _triple(x, *, times=1):
    return 3 * x * times


def _refuse(x, *, times=1):
    raise Unsupported("too large")


TABLE = {"double": _double, "triple": _triple, "refuse": _refuse}


def test_a_name_calls_that_implementation_with_its_settings():
    assert dispatch("op", TABLE, {"default": ("double",)}, "triple", 1.0, times=5) == 15


def test_none_chooses_by_platform_when_lowered():
    preference = {"cpu": ("double",), "default": ("triple",)}

    def function(x):
        return dispatch("op", TABLE, preference, None, x)

    one = jnp.array(1.0)
    assert function(one) == 2
    assert jax.jit(function)(one) == 2
    assert jax.vmap(function)(jnp.ones(3)).tolist() == [2, 2, 2]
    assert jax.grad(function)(one) == 2
    lowered = jax.jit(function).trace(one).lower(lowering_platforms=("tpu",)).as_text()
    assert "3.0" in lowered
    assert "2.0" not in lowered


def test_none_passes_over_what_is_unsupported():
    assert dispatch("op", TABLE, {"default": ("refuse", "triple")}, None, 1.0) == 3


def test_all_unsupported_names_every_reason():
    with pytest.raises(Unsupported, match=r"op: no implementation .*refuse: too large"):
        dispatch("op", TABLE, {"default": ("refuse",)}, None, 1.0)
    with pytest.raises(Unsupported, match="too large"):
        dispatch("op", TABLE, {"default": ("double",)}, "refuse", 1.0)


def test_an_unknown_name_lists_the_known_ones():
    message = "op: implementation must be None or one of double, triple, refuse, got 'gpu'"
    with pytest.raises(ValueError, match=message):
        dispatch("op", TABLE, {"default": ("double",)}, "gpu", 1.0)
