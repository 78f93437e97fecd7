"""Programs with gaussian logits for tests: values and gradients of a mixture of Gaussians.

As a program, compiles them for a target, and prints the names of the kernels.
"""

import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp

from capsjax.kernels.vote_passes.passes import Implementation, Inputs, Spec, State
from capsjax.kernels.vote_passes.unroll import Routing, unroll
from experiments.compilers import targets

# B, I, J, R, P, E: matrix capsules of classes, and of a convolution's 3 x 3 windows.
CLASSES = 128, 1152, 10, 4, 4, 4
WINDOWS = 4608, 288, 32, 4, 4, 4
VECTORS = 100, 50, 7, 1, 16, 16
EVERY = "gates", "prior", "coordinates", "mask"
KERNELS = (
    "gaussian_routing_moments",
    "gaussian_routing_chain",
    "gaussian_routing_input_gradients",
)


def step(t, carry, moments, temperature):
    """A step of the mixture, whose parents have the mass of their children."""
    del t
    variance = moments.second / jnp.maximum(moments.mass, 1e-9)[..., None] + temperature**2
    k = jnp.log(moments.mass + 1e-3) - jnp.log(variance).sum(-1) / 2
    return carry, State(k=k, z=moments.first, q=1 / variance), (moments.first, moments.mass)


def shapes(sizes, options=EVERY, dtype="float32"):
    """The inputs' shapes."""
    batch, children, parents, rows, length, columns = sizes
    arrays = {
        "poses": (batch, children, rows, length),
        "weights": (children, length, parents, columns),
        "gates": (batch, children),
        "prior": (children, parents),
        "coordinates": (children, rows * columns),
        "parent_mask": (batch, parents),
    }
    wanted = {"poses", "weights", *options} - {"mask"}
    wanted |= {"parent_mask"} if "mask" in options else set()
    dtypes = {"poses": dtype, "weights": dtype, "parent_mask": "bool"}
    return Inputs(
        *(
            jax.ShapeDtypeStruct(shape, dtypes.get(name, "float32")) if name in wanted else None
            for name, shape in arrays.items()
        )
    )


def values_and_gradients(parents, num_iterations=2, *, gradient="full", **settings):
    """A function of inputs, temperature and cotangents."""
    implementation = settings.pop("implementation", None)
    if isinstance(implementation, str):
        implementation = Implementation(implementation)
    routing = Routing(
        Spec(parents, "gaussian", "central", **settings),
        step,
        num_iterations,
        gradient=gradient,
        implementation=implementation,
    )

    def run(inputs, temperature, cotangents):
        def route(inputs, temperature):
            return unroll(routing, inputs._replace(parent_mask=mask), temperature, (0.0, State()))

        mask = inputs.parent_mask
        outputs, vjp = jax.vjp(route, inputs._replace(parent_mask=None), temperature)
        return outputs, vjp(cotangents)

    return run


def arguments(sizes, options=EVERY, dtype="float32"):
    """Shapes of the arguments of `values_and_gradients`."""
    batch, _, parents, rows, _, columns = sizes
    cotangents = (batch, parents, rows * columns), (batch, parents)
    numbers = tuple(jax.ShapeDtypeStruct(shape, "float32") for shape in cotangents)
    return shapes(sizes, options, dtype), jax.ShapeDtypeStruct((), "float32"), numbers


def compiled_kernels(target, sizes, options, folder):
    """Names of the kernels of a program that is compiled for a target, by a child process."""
    done = subprocess.run(
        [sys.executable, __file__, target, ",".join(map(str, sizes)), ",".join(options)],
        env={
            **targets.environment(target, folder),
            "PYTHONPATH": str(pathlib.Path(__file__).parents[1]),
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def main(target, sizes, options):
    """Compile a program, and print the names of its kernels."""
    sizes = tuple(map(int, sizes.split(",")))
    leaves, tree = jax.tree.flatten(arguments(sizes, tuple(filter(None, options.split(",")))))
    function = values_and_gradients(sizes[2], 3)

    def run(*leaves):
        return function(*jax.tree.unflatten(tree, leaves))

    text = targets.compile_for(target, run, *leaves).as_text()
    print(*sorted(set(re.findall("|".join(KERNELS), text))))


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main(*sys.argv[1:])
