"""Routings on four host devices: the programs of `test_sharded_family.py`, in one process.

Prints what it found as one JSON object: by program, then by case.
"""

import json
import os
import pathlib
import subprocess
import sys
import traceback
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import P
from jax.sharding import AxisType, NamedSharding

import capsjax

HOST_DEVICES = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
BATCH, CHILDREN, LENGTH, PARENTS, DEPTH = 4, 8, 2, 3, 5


def run():
    """What the programs of this file found, by program and case."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": HOST_DEVICES}
    root = pathlib.Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-W", "error", __file__],
        env={**environment, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def self_routing(poses, activations, weights, routing_weights, prior, **settings):
    mask = activations < 0.7
    return capsjax.self_routing(
        poses, activations, weights, routing_weights, prior=prior, mask=mask, **settings
    )


def inverted(poses, weights, scale, prior, **settings):
    return capsjax.inverted_attention_routing(
        poses, weights, scale=scale, prior=prior, num_iterations=3, **settings
    )


def step(poses, weights, parents, offset, **settings):
    return capsjax.inverted_attention_step(poses, weights, parents, offset=offset, **settings)


def kmeans(poses, weights, logits, temperature, **settings):
    return capsjax.kmeans_routing(
        poses,
        weights,
        similarity="cosine",
        initial_logits=logits,
        temperature=temperature,
        **settings,
    )


def carrying(poses, weights, logits, temperature, **settings):
    settings |= {"carry_couplings": True, "unit_means": False, "gradient": "last"}
    return kmeans(poses, weights, logits, temperature, **settings)


def em(poses, activations, weights, beta_u, beta_a, prior, **settings):
    return capsjax.em_routing(
        poses,
        activations,
        weights,
        beta_u=beta_u,
        beta_a=beta_a,
        prior=prior,
        inverse_temperature=1.0,
        min_variance=0.1,
        **settings,
    )


def variational_bayes(poses, activations, weights, beta_u, beta_a, prior, **settings):
    mask = jnp.array([True, False, True])
    return capsjax.variational_bayes_routing(
        poses,
        activations,
        weights,
        beta_u=beta_u,
        beta_a=beta_a,
        prior=prior,
        parent_mask=mask,
        **settings,
    )


def arguments():
    """By algorithm its arrays, and the letters of their axes."""
    rng = np.random.default_rng(0)
    sizes = {"B": BATCH, "I": CHILDREN, "P": LENGTH, "J": PARENTS, "D": DEPTH}

    def normal(letters):
        return jnp.asarray(rng.normal(size=[sizes[x] for x in letters]))

    letters = {
        self_routing: ("BIP", "BI", "IPJD", "IPJ", "BIJ"),
        inverted: ("BIP", "IPJD", "D", "IJ"),
        step: ("BIP", "IPJD", "BJD", "D"),
        kmeans: ("BIP", "IPJD", "BIJ", ""),
        carrying: ("BIP", "PD", "BIJ", ""),
        em: ("BIP", "BI", "IPJD", "J", "J", "IJ"),
        variational_bayes: ("BIP", "BI", "IPJD", "J", "J", "BIJ"),
    }
    found = {f: ([normal(x) for x in names], names) for f, names in letters.items()}
    for gated in em, variational_bayes:
        arrays, _ = found[gated]
        arrays[1] = jax.nn.sigmoid(arrays[1])
    arrays, _ = found[self_routing]
    arrays[1] = jax.nn.sigmoid(arrays[1]).at[0].set(0)
    arrays[4] = arrays[4].at[1, 2].set(-jnp.inf)
    return found


def value_and_gradients(function, arrays):
    def loss(*arrays):
        found = jax.tree.leaves(function(*arrays))
        terms = [jnp.sum(jnp.sin(x + k)) for k, x in enumerate(found)]
        return sum(terms), found

    gradients = jax.value_and_grad(loss, tuple(range(len(arrays))), has_aux=True)
    return jax.jit(gradients)(*arrays)


def distance(actual, wanted):
    """The largest difference in any array, relative to its largest number."""
    pairs = zip(*map(jax.tree.leaves, (actual, wanted)), strict=True)
    return max(float(np.abs(a - w).max() / max(np.abs(w).max(), 1e-3)) for a, w in pairs)


def over_capsules():
    """Input capsules over an axis, against the same on one device."""
    mesh = jax.make_mesh((4,), ("capsules",), axis_types=(AxisType.Auto,))
    for function, (arrays, letters) in arguments().items():
        specs = tuple(P(*("capsules" if x == "I" else None for x in names)) for names in letters)
        wanted = value_and_gradients(function, arrays)
        ways = [("xla", True), ("xla", False)]
        # The definition too: with gates, with a first state that has a gradient, with means.
        ways += [("reference", True)] if function in (self_routing, step, em) else []
        for implementation, check_vma in ways:
            sharded = jax.shard_map(
                partial(function, axis_name="capsules", implementation=implementation),
                mesh=mesh,
                in_specs=specs,
                out_specs=P(),
                check_vma=check_vma,
            )
            case = f"{function.__name__} {implementation}{'' if check_vma else ' unchecked'}"
            yield case, distance(value_and_gradients(sharded, arrays), wanted)


def over_examples():
    """A batch over an Explicit axis, which stays there."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Explicit,))
    for function, (arrays, letters) in arguments().items():
        wanted = function(*arrays)
        with jax.set_mesh(mesh):
            places = [P(*("data" if x == "B" else None for x in names)) for names in letters]
            placed = [
                jax.device_put(x, NamedSharding(mesh, place))
                for x, place in zip(arrays, places, strict=True)
            ]
            found = jax.jit(function)(*placed)
        assert all(x.sharding.spec[0] == "data" for x in jax.tree.leaves(found)), function
        yield function.__name__, distance(found, wanted)


def main():
    for program in (over_capsules, over_examples):
        try:
            yield program.__name__, dict(program())
        except Exception:
            yield program.__name__, {"failed": traceback.format_exc()}


if __name__ == "__main__":
    with jax.enable_x64(True):
        print(json.dumps(dict(main())))
