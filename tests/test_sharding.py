"""Routing over several devices: eight of the host's, in a process of their own."""

from functools import cache

import jax
import jax.numpy as jnp
import pytest
import sharded_programs
from jax import P
from jax.sharding import AxisType

import capsjax

STATE = "2,3,5"  # the sums of the examples of a device, [B, J, D]


@cache
def programs():
    return sharded_programs.run("on_host_devices")


def cases_of(program):
    """What a program of `sharded_programs.py` found, by the name of the case."""
    cases = programs()[program]
    assert "failed" not in cases, cases["failed"]
    return cases


def test_capsules_over_an_axis_are_routed_as_on_one_device():
    cases = cases_of("capsules_over_an_axis")
    assert len(cases) == 8
    for name, case in cases.items():
        assert case["distance"] < 1e-12, name
        # An iteration adds up the states once, forward and backward, and at the end the
        # gradients of what devices share are added up over the examples. Nothing else is sent.
        iterations = int(name.split("T=")[1][0])
        states = sum(shape == STATE for shape, _ in case["sent"])
        forward_only = 1 if "full" in name else iterations
        if "unchecked" in name:  # JAX does not know what is whole and has it added up once more
            forward_only -= 1
        assert {kind for _, kind in case["sent"]} == {"all-reduce"}, name
        assert states == 2 * iterations - forward_only, name
        assert len(case["sent"]) - states <= (2 if "unchecked" in name else 1), name


def test_kernels_route_capsules_over_an_axis():
    cases = cases_of("kernels_over_an_axis")
    assert len(cases) == 2
    for name, case in cases.items():
        assert case["distance"] < 1e-6, name
        assert {kind for _, kind in case["sent"]} == {"all-reduce"}, name


def test_gradients_inside_of_a_shard_map_vmap_several_axes_votes_and_couplings():
    cases = cases_of("other_ways_to_write_it")
    assert len(cases) == 5
    assert all(case["distance"] < 1e-12 for case in cases.values()), cases


def test_every_option_is_routed_over_an_axis_as_on_one_device():
    cases = cases_of("other_options")
    assert len(cases) == 8
    for name, case in cases.items():
        assert case["distance"] < 1e-12, name
        assert {kind for _, kind in case["sent"]} == {"all-reduce"}, name


def test_other_algorithms_run_over_an_axis_as_on_one_device():
    cases = cases_of("other_algorithms")
    assert len(cases) == 4
    assert all(case["distance"] < 1e-12 for case in cases.values()), cases


def test_a_sharded_batch_stays_where_it_is():
    cases = cases_of("batches").copy()
    assert cases.pop("eager")["outputs"].startswith("P('data'")
    assert len(cases) == 5
    for name, case in cases.items():
        assert case["distance"] < 1e-12, name
        assert case["outputs"].startswith("P('data'"), (name, case["outputs"])
        if name != "cut both ways":  # there weights are brought together, once each way
            # Of which capsules any example uses, and of the gradients of what devices share.
            assert [kind for _, kind in case["sent"]] == ["all-reduce"] * 2, name


def test_kernels_take_a_batch_over_explicit_axes_and_refuse_one_over_auto_axes():
    cases = cases_of("kernels_on_batches")
    refused = {name: case for name, case in cases.items() if name.endswith("Auto")}
    assert len(cases) == 2 * len(refused) == 4
    for case in refused.values():
        assert "must lie on one device (jax.shard_map, or Explicit axes)" in case["refused"]
    for name in cases.keys() - refused.keys():
        case = cases[name]
        assert case["distance"] < 1e-6, name
        assert case["outputs"].startswith("P('data'"), (name, case["outputs"])
        assert [kind for _, kind in case["sent"]] == ["all-reduce"] * 2, name


def on_one_device(function, *specs):
    mesh = jax.make_mesh((1,), ("capsules",), axis_types=(AxisType.Auto,))
    return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=P())


@pytest.mark.parametrize("axis_name", ["parents", ("capsules", "parents"), (), 3])
def test_an_unknown_axis_name_is_refused_with_the_known_ones(axis_name):
    poses, weights = jnp.ones((2, 6, 4)), jnp.ones((6, 4, 3, 5))

    def route(poses, weights):
        return capsjax.dynamic_routing(poses, weights, axis_name=axis_name)

    rule = "dynamic_routing: axis_name must name an axis of the enclosing jax.shard_map"
    with pytest.raises(ValueError, match=rf"{rule}.* where they are \['capsules'\]"):
        on_one_device(route, P(None, "capsules"), P("capsules"))(poses, weights)
    with pytest.raises(ValueError, match=rf"{rule}.* where they are \[\]"):
        route(poses, weights)


def test_a_bias_must_be_the_same_along_the_axis():
    poses, weights, bias = jnp.ones((2, 6, 4)), jnp.ones((6, 4, 3, 5)), jnp.ones((3, 5))

    def route(poses, weights, bias):
        return capsjax.dynamic_routing(poses, weights, bias=bias, axis_name="capsules")

    split = on_one_device(route, P(None, "capsules"), P("capsules"), P("capsules"))
    with pytest.raises(ValueError, match="bias must be the same all along axis_name"):
        split(poses, weights, bias)
