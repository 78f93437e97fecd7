"""Implementations chosen by name and by platform, and what kernels refuse."""

import importlib

import jax
import jax.numpy as jnp
import pytest

from capsjax.kernels.dispatch import Unsupported, dispatch
from capsjax.kernels.vote_passes.passes import PLATFORMS, Device, Inputs, Spec, State


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


B, I, P, J, D = 2, 6, 4, 3, 5  # noqa: E741


def struct(*shape, dtype="float32"):
    return jax.ShapeDtypeStruct(shape, dtype)


LINEAR = Spec(J)
INPUTS = Inputs(struct(B, I, 1, P), struct(I, P, J, D), prior=struct(I, J))
REFUSED = {  # how the arguments of a pass are changed, and what kernels say
    "float16": ({"poses": struct(B, I, 1, P, dtype="float16")}, "must be float32 or bfloat16"),
    "cosine": ({"spec": Spec(J, logits="cosine")}, "must have linear logits and sums"),
    "shared weights": ({"weights": struct(P, J, D)}, r"must have weights \[I, P, J, D\]"),
    "votes": ({"weights": None}, r"must have weights \[I, P, J, D\]"),
    "coordinates": ({"coordinates": struct(I, D)}, "must have no coordinates"),
    "several devices": ({"device": Device(num_devices=2)}, "must lie on one device"),
}
EVERY_OPTION = {
    "spec": Spec(J, leaky=True, mass=True),
    "state": State(k=struct(B, J), b=struct(B, J, D)),
    "inputs": INPUTS._replace(
        gates=struct(B, I), prior=struct(B, I, J), parent_mask=struct(B, J, dtype="bool")
    ),
}


@pytest.mark.parametrize("option", REFUSED)
@pytest.mark.parametrize("name", PLATFORMS)
def test_kernels_say_which_arguments_they_do_not_take(name, option):
    changes, reason = REFUSED[option]
    others = {"spec": LINEAR, "state": State(b=struct(B, J, D)), "device": Device()}
    others |= {key: changes[key] for key in others.keys() & changes.keys()}
    inputs = INPUTS._replace(**{key: changes[key] for key in changes.keys() - others.keys()})
    backend = importlib.import_module(f"capsjax.kernels.vote_passes.{name}")

    def config_for(spec, state, device, inputs=inputs):
        return backend.config_for(spec, inputs, state, device=device)

    with pytest.raises(Unsupported, match=f"routing: inputs of this kernel {reason}"):
        config_for(**others)
    assert config_for(LINEAR, State(), Device(), INPUTS)
    assert config_for(**EVERY_OPTION, device=Device())


def test_linear_logits_of_matrices_are_left_to_the_plain_form_on_a_tpu():
    matrices = INPUTS._replace(poses=struct(B, I, 2, P))
    mosaic_tpu, triton = (
        importlib.import_module(f"capsjax.kernels.vote_passes.{name}")
        for name in ("mosaic_tpu", "triton")
    )
    with pytest.raises(Unsupported, match="inputs of this kernel must have vectors as poses"):
        mosaic_tpu.config_for(LINEAR, matrices, State(), device=Device())
    assert triton.config_for(LINEAR, matrices, State(), device=Device())


def test_an_old_gpu_and_what_exceeds_registers_are_left_to_the_plain_form():
    triton = importlib.import_module("capsjax.kernels.vote_passes.triton")
    old = Device("Tesla T4", processors=40, capability=(7, 5))
    with pytest.raises(Unsupported, match="routing: Tesla T4 is older than sm_80"):
        triton.config_for(LINEAR, INPUTS, State(), device=old)
    for length, depth in ((17, 1), (1, 65)):
        large = Inputs(struct(B, I, 1, length), struct(I, length, J, depth))
        with pytest.raises(Unsupported, match="P must be at most 16 and D at most 64, got"):
            triton.config_for(LINEAR, large, State(), device=Device())
    many = Inputs(struct(B, 2**24, 1, P), struct(2**24, P, 8, 16))
    with pytest.raises(Unsupported, match=r"must have fewer than 2\*\*31 elements"):
        triton.config_for(Spec(8), many, State(), device=Device())
