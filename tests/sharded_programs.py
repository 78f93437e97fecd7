"""Routing on eight host devices: the programs of `test_sharding.py`, all in one process.

Prints what it found as one JSON object: by program, then by case.
"""

import itertools
import json
import os
import pathlib
import re
import subprocess
import sys
import traceback
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import test_unroll as algorithms
from jax import P
from jax.sharding import AxisType, NamedSharding

import capsjax
from capsjax.kernels.vote_passes.config import XlaConfig
from capsjax.kernels.vote_passes.passes import PLATFORMS, Implementation
from experiments.compilers import targets

KERNELS = {name: Implementation(name, interpret=True) for name in PLATFORMS}
SIZES = {"batch": 4, "capsules": 8, "length": 2, "parents": 3, "depth": 5}
FULL, LAST = "full", "last"
HOST_DEVICES = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"


def run(program, *arguments, environment=None):
    """What a program of this file found, by the name of the case."""
    environment = environment or {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": HOST_DEVICES}
    root = pathlib.Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-W", "error", __file__, program, *arguments],
        env={**environment, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def arguments(dtype, batch):
    """Poses, weights, prior, bias, mask and the outputs' cotangent."""
    rng = np.random.default_rng(0)
    _, capsules, length, parents, depth = SIZES.values()

    def normal(scale, *shape):
        return jnp.asarray(rng.normal(size=shape) * scale, dtype)

    return (
        normal(0.5, batch, capsules, length),
        normal(0.5, capsules, length, parents, depth),
        normal(1, capsules, parents),
        normal(0.1, parents, depth),
        jnp.asarray(rng.random((batch, capsules)) < 0.7),
        normal(1, batch, parents, depth),
    )


def oracle(num_iterations, gradient, batch=SIZES["batch"]):
    """Outputs and gradients in float64."""
    poses, *others, mask, cotangent = arguments("float64", batch)
    kept = np.asarray(mask, np.float64)[..., None]
    outputs, _, gradients = oracles.dynamic_routing(
        poses * kept, *others, cotangent, num_iterations=num_iterations, gradient=gradient
    )
    return outputs, (gradients[0] * kept, *gradients[1:])


def route(poses, weights, prior, bias, mask, **settings):
    return capsjax.dynamic_routing(poses, weights, prior=prior, bias=bias, mask=mask, **settings)


def mapped_route(poses, weights, prior, bias, mask, **settings):
    def one(poses, mask):
        return route(poses, weights, prior, bias, mask, **settings)

    return jax.vmap(one)(poses, mask)


def split(function, mesh, *, check_vma=True):
    """The function with examples split over "data" and input capsules over "capsules"."""
    capsules, both = P("capsules"), P("data", "capsules")
    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=(both, capsules, capsules, P(), both),
        out_specs=P("data"),
        check_vma=check_vma,
    )


def gradients_of(function):
    """A function of the arguments: the other's outputs and gradients."""

    def run(*arguments):
        *arrays, mask, cotangent = arguments
        outputs, vjp = jax.vjp(lambda *a: function(*a, mask), *arrays)
        return outputs, vjp(cotangent)

    return run


def found(function, wanted, arrays):
    """How far the compiled function is from what is wanted, and what its devices send."""
    compiled = jax.jit(function).lower(*arrays).compile()
    results = compiled(*arrays)
    return {
        "distance": distance(results, wanted),
        "sent": communication(compiled.as_text()),
        "outputs": str(results[0].sharding.spec),
    }


def communication(text):
    """Shapes and kinds of what the devices of a compiled program send each other."""
    kinds = "(?:all|collective|reduce)-(?!window|precision)[a-z-]+"
    return re.findall(rf"= \(?\w+\[([\d,]*)\].*? ({kinds})\(", text)


def distance(actual, wanted):
    """The largest difference in any array, relative to its largest number."""
    pairs = zip(*map(jax.tree.leaves, (actual, wanted)), strict=True)
    return max(float(np.abs(a - w).max() / max(np.abs(w).max(), 1e-3)) for a, w in pairs)


def make_mesh(sizes, names, kind=AxisType.Auto):
    return jax.make_mesh(sizes, names, axis_types=(kind,) * len(names))


def capsules_over_an_axis():
    """The routing itself split by input capsules, for each implementation that runs anywhere."""
    mesh = make_mesh((2, 4), ("data", "capsules"))
    cases = [
        ("xla", 1, FULL, True),
        *itertools.product(("reference", "xla"), (3,), (FULL, LAST), (True,)),
        *itertools.product(("reference", "xla"), (3,), (FULL,), (False,)),
        ("xla", 2, LAST, False),
    ]
    arrays = arguments("float64", SIZES["batch"])
    for implementation, num_iterations, gradient, check_vma in cases:
        settings = {
            "implementation": implementation,
            "num_iterations": num_iterations,
            "gradient": gradient,
        }
        function = partial(route, axis_name="capsules", **settings)
        program = gradients_of(split(function, mesh, check_vma=check_vma))
        name = f"{implementation} T={num_iterations} {gradient}"
        wanted = oracle(num_iterations, gradient)
        yield f"{name}{'' if check_vma else ' unchecked'}", found(program, wanted, arrays)


def kernels_over_an_axis():
    """The kernels, interpreted, split alike."""
    mesh = make_mesh((2, 4), ("data", "capsules"))
    arrays = arguments("float32", SIZES["batch"])
    for (implementation, kernel), check_vma in zip(KERNELS.items(), (True, False), strict=True):
        settings = {"implementation": kernel, "num_iterations": 2}
        function = partial(route, axis_name="capsules", **settings)
        program = gradients_of(split(function, mesh, check_vma=check_vma))
        with jax.default_matmul_precision("highest"):
            yield implementation, found(program, oracle(2, FULL), arrays)


def other_ways_to_write_it():
    """Gradients taken inside of shard_map, `vmap` in it, two axes at once, given votes."""
    mesh = make_mesh((2, 4), ("data", "capsules"))
    arrays = arguments("float64", SIZES["batch"])
    function = partial(route, axis_name="capsules")
    capsules, both = P("capsules"), P("data", "capsules")
    inside = jax.shard_map(
        gradients_of(function),
        mesh=mesh,
        in_specs=(both, capsules, capsules, P(), both, P("data")),
        out_specs=(P("data"), (both, capsules, capsules, P())),
    )
    yield "gradients inside", found(inside, oracle(3, FULL), arrays)
    mapped = gradients_of(split(partial(mapped_route, axis_name="capsules"), mesh))
    yield "mapped", found(mapped, oracle(3, FULL), arrays)
    axes = "data", "capsules"
    all_capsules = jax.shard_map(
        partial(route, axis_name=axes),
        mesh=mesh,
        in_specs=(P(None, axes), P(axes), P(axes), P(), P(None, axes)),
        out_specs=P(),
    )
    yield "two axes", found(gradients_of(all_capsules), oracle(3, FULL), arrays)

    def from_votes(poses, weights, prior, bias, mask):
        votes = jnp.einsum("bip,ipjd->bijd", poses, weights)
        return capsjax.dynamic_routing_from_votes(
            votes, prior=prior, bias=bias, mask=mask, axis_name="capsules"
        )

    votes = gradients_of(split(from_votes, mesh))
    yield "from votes", found(votes, oracle(3, FULL), arrays)

    def couplings(poses, weights, prior, bias, mask, **settings):
        return capsjax.routing_couplings(
            poses, weights, prior=prior, bias=bias, mask=mask, **settings
        )

    here = jax.shard_map(
        partial(couplings, axis_name="capsules"),
        mesh=mesh,
        in_specs=(both, capsules, capsules, P(), both),
        out_specs=P(None, "data", "capsules"),
    )
    yield "couplings", {"distance": distance(here(*arrays[:-1]), couplings(*arrays[:-1]))}


def other_options():
    """Every option, and weights that the children share, as on one device."""
    mesh = make_mesh((2, 4), ("data", "capsules"))
    poses, weights, prior, bias, mask, cotangent = arguments("float64", SIZES["batch"])
    prior = jnp.stack([prior, -prior, prior / 2, 2 * prior]).at[:, 1, 0].set(-jnp.inf)
    prior = prior.at[0, 3].set(-jnp.inf)
    parent_mask = jnp.ones((4, 3), bool).at[0, 1].set(False)

    def route_all(poses, weights, prior, bias, mask, parent_mask, **settings):
        options = {"mask": mask, "parent_mask": parent_mask, "leaky": True}
        return capsjax.dynamic_routing(
            poses, weights, prior=prior, bias=bias, **options, **settings
        )

    def gradients(function):
        def run(*arrays):
            outputs, vjp = jax.vjp(lambda *a: function(*a, mask, parent_mask), *arrays)
            return outputs, vjp(cotangent)

        return run

    ways = {
        "own": (weights, ("reference", "xla"), (True, False)),
        "shared": (weights[0], ("xla",), (True, False)),
        "shared by parents": (weights[0, :, 0], ("reference",), (True, False)),
    }
    both = P("data", "capsules")
    for name, (own, implementations, checks) in ways.items():
        specs = both, P("capsules") if name == "own" else P(), both, P(), both, P("data")
        arrays = poses, own, prior, bias
        wanted = oracle_of_all(arrays, mask, parent_mask, cotangent)
        for implementation, check_vma in itertools.product(implementations, checks):
            function = jax.shard_map(
                partial(route_all, axis_name="capsules", implementation=implementation),
                mesh=mesh,
                in_specs=specs,
                out_specs=P("data"),
                check_vma=check_vma,
            )
            case = f"{name} {implementation}{'' if check_vma else ' unchecked'}"
            yield case, found(gradients(function), wanted, arrays)


def oracle_of_all(arrays, mask, parent_mask, cotangent):
    """Outputs and gradients in float64 of a leaky routing with these masks."""
    poses, weights, prior, bias = map(np.asarray, arrays)
    _, capsules, length, parents, depth = SIZES.values()
    kept = np.asarray(mask, np.float64)[..., None]
    shared = {4: (), 3: (0,), 2: (0, 2)}[weights.ndim]
    outputs, _, (d_poses, d_weights, *others) = oracles.dynamic_routing(
        poses * kept,
        np.broadcast_to(np.expand_dims(weights, shared), (capsules, length, parents, depth)),
        prior,
        bias,
        cotangent,
        num_iterations=3,
        gradient=FULL,
        leaky=True,
        parent_mask=parent_mask,
    )
    return outputs, (d_poses * kept, d_weights.sum(shared), *others)


def other_algorithms():
    """Algorithms of `test_unroll.py`: central moments are merged, sums added."""
    mesh = make_mesh((2, 4), ("data", "capsules"))
    arrays = [x.astype("float64") for x in algorithms.arguments()]
    small = Implementation("xla", XlaConfig(children=1, examples=1))
    cases = [
        ("toy", small, True),
        ("mixture", Implementation("reference"), True),
        ("mixture", small, True),
        ("mixture", small, False),
    ]
    for name, implementation, check_vma in cases:
        function, definition = algorithms.ALGORITHMS[name]
        over_shards = jax.shard_map(
            partial(function, implementation=implementation, axis_name="capsules"),
            mesh=mesh,
            in_specs=(P("data", "capsules"), P("capsules"), P()),
            out_specs=P("data"),
            check_vma=check_vma,
        )
        outputs, gradients = algorithms.values_and_gradients(over_shards)(*arrays)
        wanted = algorithms.exact(definition)
        case = f"{name} {implementation.name}{'' if check_vma else ' unchecked'}"
        yield case, {"distance": distance((outputs, gradients), wanted)}


def placed(arrays, mesh, examples, others):
    """The arguments on a mesh: weights, prior and bias as `others` says."""
    specs = [examples, *others, *[P("data")] * 2]
    pairs = zip(arrays, specs, strict=True)
    return [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in pairs]


def batches():
    """Batches that are sharded where `jit` is called, which knows nothing of routing."""
    batch = 1024  # several tiles of examples, if it were whole
    one, two = ((8,), ("data",)), ((2, 4), ("data", "capsules"))
    everywhere = [P()] * 3
    ways = {
        "one axis": (make_mesh(*one), P("data"), everywhere),
        "one of two axes": (make_mesh(*two), P("data"), everywhere),
        "one of two explicit axes": (make_mesh(*two, AxisType.Explicit), P("data"), everywhere),
        "cut both ways": (make_mesh(*two), P("data", "capsules"), [*[P("capsules")] * 2, P()]),
    }
    wanted = oracle(3, FULL, batch)
    for name, way in ways.items():
        implementation = "xla" if name == "one of two axes" else None
        arrays = placed(arguments("float64", batch), *way)
        function = gradients_of(partial(route, implementation=implementation))
        yield name, found(function, wanted, arrays)
    arrays = placed(arguments("float64", batch), *ways["one of two axes"])
    outputs = route(*arrays[:-1], num_iterations=2)
    yield "eager", {"outputs": str(outputs.sharding.spec)}
    # The arrays lie on one device, until `in_shardings` says where they belong.
    mesh, examples, others = ways["one axis"]
    specs = [examples, *others, *[P("data")] * 2]
    shardings = tuple(NamedSharding(mesh, spec) for spec in specs)
    program = jax.jit(gradients_of(route), in_shardings=shardings)
    yield "one axis by in_shardings", found(program, wanted, arguments("float64", batch))


def kernels_on_batches():
    """Batches over Explicit axes, which kernels take where they are, and over Auto axes."""
    meshes = ((8,), ("data",)), ((2, 4), ("data", "capsules"))
    arrays, wanted = arguments("float32", 16), oracle(3, FULL, 16)
    for (implementation, kernel), (sizes, names) in zip(KERNELS.items(), meshes, strict=True):
        function = gradients_of(partial(route, implementation=kernel))
        mesh = make_mesh(sizes, names, AxisType.Explicit)
        name = f"{implementation} over {' and '.join(names)}"
        with jax.default_matmul_precision("highest"):
            yield name, found(function, wanted, placed(arrays, mesh, P("data"), [P()] * 3))
        mesh = make_mesh(sizes, names)
        try:
            found(function, wanted, placed(arrays, mesh, P("data"), [P()] * 3))
        except capsjax.Unsupported as error:
            yield f"{name}, Auto", {"refused": str(error)}


def for_absent_devices(target):
    """What eight devices of a target would run and send, at a size of the paper's."""
    shapes = [
        jax.ShapeDtypeStruct(shape, "float32")
        for shape in [(1024, 1152, 8), (1152, 8, 10, 16), (1024, 10, 16)]
    ]

    def found(axes, function, specs):
        def run(poses, weights, cotangent):
            outputs, vjp = jax.vjp(function, poses, weights)
            return outputs, vjp(cotangent)

        placed = zip(shapes, specs, strict=True)
        text = targets.compile_over(target, axes, run, *placed).as_text()
        called = re.findall(r'custom_call_target="([^"]*)"', text)
        return {
            "kernels": sum("tpu_custom_call" in name or "triton" in name for name in called),
            "sent": [pair for pair in communication(text) if not pair[1].endswith("-done")],
        }

    specs = P("data"), P(), P("data")
    yield "batch over an Auto axis", found({"data": 8}, capsjax.dynamic_routing, specs)
    function = jax.shard_map(capsjax.dynamic_routing, in_specs=specs[:2], out_specs=specs[2])
    yield "batch", found({"data": 8}, function, specs)
    specs = P("data", "capsules"), P("capsules"), P("data")
    function = jax.shard_map(
        partial(capsjax.dynamic_routing, axis_name="capsules"),
        in_specs=specs[:2],
        out_specs=specs[2],
    )
    yield "capsules", found({"data": 2, "capsules": 4}, function, specs)


def on_host_devices():
    """What each of these programs found, or why it failed."""
    for program in (
        capsules_over_an_axis,
        kernels_over_an_axis,
        other_ways_to_write_it,
        other_options,
        other_algorithms,
        batches,
        kernels_on_batches,
    ):
        try:
            yield program.__name__, dict(program())
        except Exception:
            yield program.__name__, {"failed": traceback.format_exc()}


PROGRAMS = {program.__name__: program for program in (on_host_devices, for_absent_devices)}


if __name__ == "__main__":
    name, *arguments_of_it = sys.argv[1:]
    with jax.enable_x64(name != "for_absent_devices"):
        print(json.dumps(dict(PROGRAMS[name](*arguments_of_it))))
