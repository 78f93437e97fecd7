"""Training on a mesh of devices, with axes for data parallelism and for splitting capsules.

A batch is split over both axes, and each device runs the program of one device on its examples.
Over the axis "capsules" the weights of the class capsules are split by input capsules: before
routing, its devices exchange poses (all-to-all), so that each has its own input capsules for the
examples of all; routing adds up their partial sums (all-reduce) once an iteration.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from jax import Array, lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import capsjax
from capsjax import nn
from capsjax.models import CapsNet
from experiments.cli import flag
from experiments.data import datasets
from experiments.errors import InputError
from experiments.training import loop

DATA, CAPSULES = "data", "capsules"


@dataclasses.dataclass(frozen=True)
class Settings:
    """The shape of the mesh; results are those of one device, up to rounding."""

    data_parallel: int = flag(
        1,
        "Devices along the mesh's data axis; -1: all that --capsule_parallel leaves.",
        minimum=-1,
        maximum=2**20,
        affects_result=False,
    )
    capsule_parallel: int = flag(
        1,
        "Devices over which the primary capsules and their weights are split, and the batch too; "
        "-1: all that --data_parallel leaves.",
        minimum=-1,
        maximum=2**20,
        affects_result=False,
    )


def spread(trainer: loop.Trainer, settings: Settings, *, batch_size: int) -> loop.Trainer:
    """Return a trainer for the devices that the settings ask for; for one device, the given one.

    Raises:
      InputError: There are not so many devices, or batch, capsules or batch normalisation cannot be
        split so.
    """
    shape = mesh_shape(settings, jax.device_count(), processes=jax.process_count())
    size = shape[0] * shape[1]
    if size == 1 and jax.process_count() == 1:
        return trainer
    if batch_size % size:
        below = batch_size // size * size
        nearest = f"{below} and {below + size}" if below else f"{size}"
        raise InputError(
            f"--batch_size must be divisible by the {size} devices, got {batch_size}; the nearest "
            f"that are: {nearest}"
        )
    _check_capsules(trainer, shape[1])
    if trainer.has_statistics:
        raise InputError(
            "--data_parallel and --capsule_parallel must be 1 for a network with batch "
            f"normalisation, got {shape[0]} x {shape[1]}"
        )
    mesh = jax.make_mesh(
        shape,
        (DATA, CAPSULES),
        devices=jax.devices()[:size],
        axis_types=(AxisType.Auto, AxisType.Auto),
    )
    return ParallelTrainer(trainer, mesh)


def mesh_shape(settings: Settings, devices: int, *, processes: int) -> tuple[int, int]:
    """Return the numbers of devices along "data" and "capsules".

    Raises:
      InputError: More than there are, or, of many processes, fewer.
    """
    parts = [settings.data_parallel, settings.capsule_parallel]
    for name, value in zip(("data_parallel", "capsule_parallel"), parts, strict=True):
        if value == 0:
            raise InputError(f"--{name} must be at least 1, or -1 for all that are left, got 0")
    if parts == [-1, -1]:
        raise InputError("--data_parallel and --capsule_parallel must not both be -1")
    parts = [value if value > 0 else max(1, devices // -(parts[0] * parts[1])) for value in parts]
    size = parts[0] * parts[1]
    given = f"got {parts[0]} x {parts[1]}"
    if size > devices:
        raise InputError(
            f"--data_parallel x --capsule_parallel must be at most the {devices} devices, {given}"
        )
    if processes > 1 and size < devices:
        raise InputError(
            f"--data_parallel x --capsule_parallel must be all {devices} devices of the "
            f"{processes} processes, {given}; --data_parallel=-1 takes those that are left"
        )
    return parts[0], parts[1]


class ParallelTrainer(loop.Trainer):
    """A trainer whose state and batches are sharded over a mesh, at every moment.

    Weights of class capsules, their moments and gradients are split by input capsules over
    "capsules"; everything else is replicated.
    """

    def __init__(self, trainer: loop.Trainer, mesh: Mesh):
        """Take network, objective and optimizer from the trainer of one device."""
        self.mesh = mesh
        self._by_example = NamedSharding(mesh, P((DATA, CAPSULES)))
        super().__init__(
            trainer.build,
            trainer.objective,
            trainer.optimizer,
            average_decay=trainer.average_decay,
        )
        self._axes = (DATA, CAPSULES)

    def _layout(self) -> loop.State:
        self._specs = _specs(self._shapes)
        return jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), self._specs)

    def _compile(self) -> None:
        by_example = self._by_example.spec

        def program(function: Any, in_specs: Any, out_specs: Any, **options: Any) -> Any:
            # With check_vma=False gradients are per-device partial sums, added up in _averaged.
            sharded = jax.shard_map(
                function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
            )
            return jax.jit(sharded, **options)

        arguments = (self._specs, by_example, by_example)
        self.step = program(self._step, arguments, self._specs, donate_argnums=0)
        arguments = (self._specs.params, by_example, by_example)
        self._evaluate_batch = program(self._evaluate, arguments, P())

    def jit(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Compile a function of parameters and arrays; every process gets its whole result."""
        return jax.jit(function, out_shardings=NamedSharding(self.mesh, P()))

    def model(self, params: loop.Params) -> Any:
        """Return the network with these parameters, to be called outside `shard_map`."""
        model = super().model(params)
        if self.mesh.shape[CAPSULES] > 1:
            model.capsules = SplitCapsules(model.capsules, self.mesh)
        return model

    def batch(self, examples: datasets.Examples, indices: np.ndarray) -> tuple[Any, Any]:
        """Return images and labels of these examples: each process makes its own part."""
        shape = (len(indices),)
        parts = self._by_example.addressable_devices_indices_map(shape).values()
        own = sorted({(part[0].start or 0, part[0].stop) for part in parts if part is not None})
        arrays = examples.take(np.concatenate([indices[slice(*rows)] for rows in own]))
        images, labels = (
            jax.make_array_from_process_local_data(
                self._by_example, array, (*shape, *array.shape[1:])
            )
            for array in arrays
        )
        return images, labels

    def _local_model(self, params: loop.Params) -> Any:
        model = super().model(params)
        if self.mesh.shape[CAPSULES] > 1:
            model.capsules.axis_name = CAPSULES
        return model

    def _averaged(
        self, loss: Array, errors: Array, gradients: loop.Params
    ) -> tuple[Array, Array, loop.Params]:
        def mean(gradient: Array, spec: P) -> Array:
            axes = DATA if CAPSULES in spec else (DATA, CAPSULES)
            return lax.psum(gradient, axes) / self.mesh.size

        loss, errors = lax.pmean((loss, errors), self._axes)
        return loss, errors, jax.tree.map(mean, gradients, self._specs.params)

    def _norm(self, gradients: loop.Params) -> Array:
        def square(gradient: Array, spec: P) -> Array:
            own = optax.tree.norm(gradient, squared=True)
            return lax.psum(own, CAPSULES) if CAPSULES in spec else own

        return optax.tree.sum(jax.tree.map(square, gradients, self._specs.params))

    def _evaluate(self, params: loop.Params, images: Array, labels: Array) -> tuple[Array, Array]:
        return lax.all_gather(super()._evaluate(params, images, labels), self._axes, tiled=True)


class SplitCapsules(nnx.Module):
    """Capsules whose weights stay split by input capsules, for calls outside `shard_map`.

    Examples are replicated, and each device routes its input capsules of all of them.

    Args:
      layer: Whose weights are split over the mesh's axis "capsules".
      mesh: As in `ParallelTrainer`.
    """

    def __init__(self, layer: nn.Capsules, mesh: Mesh) -> None:
        self.layer = layer
        self.mesh = mesh

    def __call__(self, poses: Array) -> Array:
        """Map poses `[B, I, P]` to poses `[B, J, D]`, replicated."""
        route = functools.partial(
            capsjax.dynamic_routing,
            gradient=self.layer.routing.gradient,
            implementation=self.layer.implementation,
        )
        return self._split(route, poses, P())

    def couplings(self, poses: Array) -> Array:
        """Map poses `[B, I, P]` to couplings `[T, B, I, J]`, split by input capsules."""
        return self._split(capsjax.routing_couplings, poses, P(None, None, CAPSULES))

    def _split(self, route: Callable[..., Array], poses: Array, out_specs: P) -> Array:
        layer = self.layer
        bias = None if layer.bias is None else layer.bias[...]

        def local(poses: Array, weights: Array, bias: Array | None) -> Array:
            return route(
                poses.astype(layer.dtype),
                weights.astype(layer.dtype),
                num_iterations=layer.routing.num_iterations,
                bias=bias,
                axis_name=CAPSULES,
            )

        in_specs = (P(None, CAPSULES), P(CAPSULES), P())
        sharded = jax.shard_map(local, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs)
        return sharded(poses, layer.weights[...], bias)


def _specs(tree: Any) -> Any:
    """Return how each array is sharded: weights of class capsules by input capsules."""

    def spec(path: tuple[Any, ...], leaf: Any) -> P:
        del leaf
        of_capsules = jax.tree_util.keystr(path).endswith("['capsules']['weights']")
        return P(CAPSULES) if of_capsules else P()

    return jax.tree.map_with_path(spec, tree)


def _check_capsules(trainer: loop.Trainer, parts: int) -> None:
    if parts == 1:
        return
    if not isinstance(trainer.network, CapsNet):
        rule = "--capsule_parallel must be 1 for a network other than capsnet"
        raise InputError(f"{rule}, got {parts}")
    capsules = trainer.network.capsules.weights.shape[0]
    if capsules % parts:
        fit = [n for n in range(1, capsules + 1) if capsules % n == 0]
        nearest = sorted(sorted(fit, key=lambda n: abs(n - parts))[:2])
        raise InputError(
            f"--capsule_parallel must divide the {capsules} primary capsules, got {parts}; the "
            f"nearest that do: {' and '.join(map(str, nearest))}"
        )
