"""Training on a mesh of devices: a batch is split over all, capsules over one axis of two.

Each device runs the program of one device on its part of a batch. What one loss needs of another
device's examples is routing alone, whose input capsules may be split: they are exchanged for the
examples of the devices along "capsules" and routed with one sum an iteration.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
import optax
from jax import Array, lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.cli import flag
from experiments.data import datasets
from experiments.errors import InputError
from experiments.training import loop

DATA, CAPSULES = "data", "capsules"


@dataclasses.dataclass(frozen=True)
class Settings:
    """Over how many devices; the batch, the seed and so the result are those of one device."""

    data_parallel: int = flag(
        1, "Parts of a batch; -1: as many as devices allow.", minimum=-1, affects_result=False
    )
    capsule_parallel: int = flag(
        1,
        "Parts of the primary capsules, for each of which a batch has that many parts more; -1: "
        "as many as devices allow.",
        minimum=-1,
        affects_result=False,
    )


def spread(
    trainer: loop.Trainer, settings: Settings, *, batch_size: int
) -> "loop.Trainer | ParallelTrainer":
    """The trainer for the devices that the settings ask for: the same one for a single device.

    Raises:
      InputError: There are not so many devices, or batch or capsules cannot be split so.
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
    mesh = jax.make_mesh(
        shape,
        (DATA, CAPSULES),
        devices=jax.devices()[:size],
        axis_types=(AxisType.Auto, AxisType.Auto),
    )
    return ParallelTrainer(trainer, mesh)


def mesh_shape(settings: Settings, devices: int, *, processes: int) -> tuple[int, int]:
    """How many devices the mesh has along "data" and "capsules".

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
    """A trainer whose state and batches lie on a mesh; parameters come from that of one device."""

    def __init__(self, trainer: loop.Trainer, mesh: Mesh):
        """Compiles nothing yet."""
        self.graph, self._start = trainer.graph, trainer._start
        self.objective, self.optimizer = trainer.objective, trainer.optimizer
        self.mesh, self.axes = mesh, (DATA, CAPSULES)
        self._specs = _specs(jax.eval_shape(super().initial_state, 0))
        by_example = P(self.axes)
        self._by_example = NamedSharding(mesh, by_example)

        def program(function: Any, in_specs: Any, out_specs: Any, **options: Any) -> Any:
            # Unchecked, gradients are shares of a sum over all devices, of whatever they belong to.
            spread = jax.shard_map(
                function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
            )
            return jax.jit(spread, **options)

        arguments = (self._specs, by_example, by_example)
        self.step = program(self._step, arguments, self._specs, donate_argnums=0)
        arguments = (self._specs.params, by_example, by_example)
        self._evaluate_batch = program(self._evaluate, arguments, P())
        self._replicate = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, P()))

    def model(self, params: loop.Params) -> Any:
        """The network with a device's part of the parameters, for use inside `shard_map`."""
        model = super().model(params)
        if self.mesh.shape[CAPSULES] > 1:
            model.capsules.axis_name = CAPSULES
        return model

    def initial_state(self, seed: int) -> loop.State:
        """The state before the first step, on the mesh."""
        return self._put(super().initial_state(seed), self._specs)

    def empty_window(self) -> loop.Window:
        """No steps yet, on the mesh."""
        return self._put(super().empty_window(), self._specs.window)

    def whole(self, tree: Any) -> Any:
        """A part of the state as arrays on the host, whole in every process."""
        return jax.device_get(self._replicate(tree))

    def batch(self, examples: datasets.Examples, indices: np.ndarray) -> tuple[Any, Any]:
        """The images and labels of these examples: each process makes its own part."""
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

    def scores(
        self, params: loop.Params, images: np.ndarray, *, batch_size: int = 128
    ) -> np.ndarray:
        """Scores are asked of the trainer of one device."""
        raise NotImplementedError("ParallelTrainer.scores: ask the trainer of one device")

    def _put(self, tree: Any, specs: Any) -> Any:
        def put(leaf: Any, spec: P) -> Array:
            array = np.asarray(leaf)
            sharding = NamedSharding(self.mesh, spec)
            return jax.make_array_from_callback(array.shape, sharding, lambda part: array[part])

        return jax.tree.map(put, tree, specs)

    def _averaged(
        self, loss: Array, errors: Array, gradients: loop.Params
    ) -> tuple[Array, Array, loop.Params]:
        def mean(gradient: Array, spec: P) -> Array:
            return lax.psum(gradient, DATA if CAPSULES in spec else self.axes) / self.mesh.size

        loss, errors = lax.pmean((loss, errors), self.axes)
        return loss, errors, jax.tree.map(mean, gradients, self._specs.params)

    def _norm(self, gradients: loop.Params) -> Array:
        def square(gradient: Array, spec: P) -> Array:
            own = optax.tree.norm(gradient, squared=True)
            return lax.psum(own, CAPSULES) if CAPSULES in spec else own

        return optax.tree.sum(jax.tree.map(square, gradients, self._specs.params))

    def _evaluate(self, params: loop.Params, images: Array, labels: Array) -> tuple[Array, Array]:
        return lax.all_gather(super()._evaluate(params, images, labels), self.axes, tiled=True)


def _specs(tree: Any) -> Any:
    """How each array lies on the mesh: weights of class capsules with their input capsules."""

    def spec(path: tuple[Any, ...], leaf: Any) -> P:
        del leaf
        of_capsules = jax.tree_util.keystr(path).endswith("['capsules']['weights']")
        return P(CAPSULES) if of_capsules else P()

    return jax.tree.map_with_path(spec, tree)


def _check_capsules(trainer: loop.Trainer, parts: int) -> None:
    if parts == 1:
        return
    if "capsules" not in trainer._start:
        rule = "--capsule_parallel must be 1 for a network without capsules"
        raise InputError(f"{rule}, got {parts}")
    capsules = trainer._start["capsules"]["weights"].shape[0]
    if capsules % parts:
        fit = [n for n in range(1, capsules + 1) if capsules % n == 0]
        nearest = sorted(sorted(fit, key=lambda n: abs(n - parts))[:2])
        raise InputError(
            f"--capsule_parallel must divide the {capsules} primary capsules, got {parts}; the "
            f"nearest that do: {' and '.join(map(str, nearest))}"
        )
