"""Self-attention routing on four host devices: the program of one of its tests.

Prints what it found as one JSON object, by case.
"""

import json
import os
import pathlib
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import self_attention_oracle as oracle
from jax import P
from jax.sharding import AxisType, NamedSharding
from sharded_programs import found, make_mesh

import capsjax

HOST_DEVICES = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"


def run():
    """What this program found, by the name of the case."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": HOST_DEVICES}
    environment["PYTHONPATH"] = str(pathlib.Path(__file__).parents[1])
    command = [sys.executable, "-W", "error", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def arguments():
    """Poses, weights, bias, prior and cotangent; and masks of children and parents."""
    rng = np.random.default_rng(0)

    def normal(scale, *shape):
        return jnp.asarray(rng.normal(size=shape) * scale)

    arrays = (
        normal(0.5, 4, 8, 2),
        normal(0.5, 8, 2, 3, 5),
        normal(0.3, 8, 3),
        normal(1, 4, 8, 3).at[:, 1, 0].set(-jnp.inf).at[0, 3].set(-jnp.inf),
        normal(1, 4, 3, 5),
    )
    mask = jnp.asarray(rng.random((4, 8)) < 0.7)
    parent_mask = jnp.ones((4, 3), bool).at[0, 1].set(False)
    return arrays, {"mask": mask, "parent_mask": parent_mask}


def route(poses, weights, bias, prior, masks, **settings):
    return capsjax.self_attention_routing(
        poses, weights, couplings_bias=bias, prior=prior, **masks, **settings
    )


def with_gradients(function):
    """A function of the arguments: the other's outputs and gradients."""

    def run(*arguments):
        *arrays, masks, cotangent = arguments
        outputs, vjp = jax.vjp(lambda *a: function(*a, masks), *arrays)
        return outputs, vjp(cotangent)

    return run


def cases():
    """Input capsules over an axis of the mesh, and a batch over an Explicit axis."""
    (poses, weights, bias, prior, cotangent), masks = arguments()
    options = {
        "plain": (weights, bias, None, {}),
        "options": (weights, bias, prior, masks),
        "shared": (weights[0], bias, None, {}),
    }
    ways = [
        *[("xla", name, check_vma) for name in options for check_vma in (True, False)],
        ("reference", "options", True),
    ]
    mesh = make_mesh((2, 2), ("data", "capsules"))
    both, capsules = P("data", "capsules"), P("capsules")
    for implementation, name, check_vma in ways:
        own, bias, prior, masks = options[name]
        function = jax.shard_map(
            partial(route, implementation=implementation, axis_name="capsules"),
            mesh=mesh,
            in_specs=(
                both,
                capsules if own.ndim == 4 else P(),
                capsules,
                both,
                {"mask": both, "parent_mask": P("data")} if masks else {},
            ),
            out_specs=P("data"),
            check_vma=check_vma,
        )
        arrays = poses, own, bias, prior, masks, cotangent
        case = f"{implementation}, {name}{'' if check_vma else ', unchecked'}"
        yield case, found(with_gradients(function), wanted(*arrays), arrays)
    mesh = make_mesh((4,), ("data",), AxisType.Explicit)
    arrays = poses, *options["options"], cotangent
    specs = P("data"), P(), P(), P("data"), P("data"), P("data")
    on_mesh = [
        jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(arrays, specs, strict=True)
    ]
    yield "batch", found(with_gradients(route), wanted(*arrays), on_mesh)


def wanted(poses, weights, bias, prior, masks, cotangent):
    """The oracle's outputs and gradients."""
    arrays = (None if x is None else np.asarray(x) for x in (poses, weights, bias, prior))
    masks = {name: np.asarray(x) for name, x in masks.items()}
    return oracle.self_attention_routing(*arrays, np.asarray(cotangent), **masks)


if __name__ == "__main__":
    with jax.enable_x64(True):
        print(json.dumps(dict(cases())))
