"""Networks trained by train_mnist, loaded from the folders of their runs or from single files."""

import dataclasses
import operator
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from capsjax import models
from experiments import cli
from experiments.data import datasets, image_files
from experiments.errors import InputError
from experiments.training import loop, mnist, objectives, records, runs, transforms
from experiments.training.checkpoints import Checkpoints

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

C = TypeVar("C", bound="DataclassInstance")

WEIGHTS = pathlib.Path(__file__).parents[1] / "weights" / "small.safetensors"


class Trained(NamedTuple):
    """The settings, data and network of a run."""

    config: mnist.Config
    dataset: datasets.Dataset
    test: datasets.Split  # placed on the canvas or cropped, if the run's settings say so
    trainer: loop.Trainer
    params: loop.Params
    step: int | None  # None: of a file, which does not say

    @property
    def model(self) -> Any:
        """The network that the run's `--network` names."""
        return self.trainer.model(self.params)


def load(workdir: str, *, data_dir: str = "", with_data: bool = True) -> Trained:
    """Restore the newest checkpoint of a run of train_mnist, on one device.

    Args:
      workdir: The folder of the run, or a file of `capsjax.models.save` with a CapsNet; it is only
        read.
      data_dir: Folder of the data set's files; empty: that of the run.
      with_data: False to read no data: sizes come from config.json, and there are no examples.

    Raises:
      InputError: The folder holds no such run or no checkpoint, or the data found are not those of
        the run; the file is damaged, holds no CapsNet, or test images are asked of it.
    """
    if os.path.isfile(workdir):
        if with_data:
            raise InputError(
                f"workdir {workdir} is a file of weights, which has no test images: name the "
                "folder of a run, or read image files only (--images, and --examples=0 where "
                "there is that flag)"
            )
        return _from_file(workdir)
    run = records.read_config(workdir)
    config = config_of(mnist.Config, run["config"], workdir)
    if with_data or run.get("data") is None:  # earlier versions noted nothing
        dataset = datasets.load(config.dataset, data_dir=data_dir or config.data_dir)
        check_data(config, dataset, run["data_sha256"], workdir)
        dataset = mnist.select_viewpoints(config, dataset)
    else:
        dataset = _without_examples(config, run, workdir)
    trainer = mnist.build(config, dataset)
    step, params = restored(trainer, workdir)
    test = mnist.test_split(config, dataset)
    return Trained(config, dataset, test, trainer, params, step)


def _from_file(path: str) -> Trained:
    """Load a CapsNet from a safetensors file. Its classes have no names, and it has no data."""
    try:
        model = models.load(path)
    except (OSError, ValueError) as error:
        raise InputError(f"workdir {path} cannot be read: {error}") from error
    if not isinstance(model, models.CapsNet):
        raise InputError(f"workdir {path} holds a {type(model).__name__}, no CapsNet")
    params: loop.Params = nnx.to_pure_dict(nnx.state(model))
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params)):
        raise InputError(f"workdir {path} has weights that are not finite")
    arguments = dict(model.arguments)  # type: ignore[attr-defined]
    shape, num_classes = arguments["image_shape"], arguments["num_classes"]
    if shape[-1] not in (1, 3):
        raise InputError(f"workdir {path} must take images of 1 or 3 channels, got {shape[-1]}")
    # Biases start at 0, and without a reconstruction loss a decoder gets no gradient.
    has_decoder = any(np.any(layer["bias"]) for layer in params["decoder"]["layers"].values())
    config = mnist.Config(workdir=path, reconstruction_weight=float(has_decoder))
    arguments["dtype"] = jnp.dtype(arguments["dtype"])
    trainer = loop.Trainer(
        lambda: models.CapsNet(**arguments, rngs=nnx.Rngs(0)),
        objectives.CapsuleClassification(
            num_classes, transforms.Augmentation(), config.reconstruction_weight
        ),
        loop.adam(1e-3, final_learning_rate=1e-3, num_steps=1),  # it is never trained further
    )
    none = datasets.Split(np.zeros((0, *shape), np.uint8), np.zeros(0, np.int32))
    dataset = datasets.Dataset("", num_classes, none, none, "")
    return Trained(config, dataset, none, trainer, params, None)


def _without_examples(
    config: mnist.Config, run: Mapping[str, Any], workdir: str
) -> datasets.Dataset:
    """Return the data set of a run, as far as config.json tells of it, without examples."""
    try:
        facts = run["data"]
        shape = tuple(operator.index(size) for size in facts["image_shape"])
        num_classes, names = operator.index(facts["num_classes"]), facts["class_names"]
        if not (len(shape) == 3 and min(*shape, num_classes) > 0 and isinstance(names, list)):
            raise ValueError("sizes must be above 0")
        if len(names) not in (0, num_classes) or not all(isinstance(name, str) for name in names):
            raise ValueError("class_names must be texts, one a class")
    except (KeyError, TypeError, ValueError) as error:
        reason = f"config.json is damaged at data ({error!r})"
        raise InputError(f"workdir {workdir}: {reason}") from error
    # Of the batch's size, because a trainer refuses less; broadcast, so that it takes no memory.
    stand_in = np.broadcast_to(np.uint8(0), (config.batch_size, *shape))
    train = datasets.Split(stand_in, np.zeros(config.batch_size, np.int32))
    test = datasets.Split(stand_in[:0], train.labels[:0])
    return datasets.Dataset(
        config.dataset, num_classes, train, test, run["data_sha256"], tuple(names)
    )


def read_images(run: Trained, paths: Sequence[str]) -> np.ndarray:
    """Read image files as the run's network takes them, `[N, H, W, C]` in 0 … 1.

    They are resized to the data set's images, and centred on the canvas or cropped if the run's
    images are.

    Raises:
      InputError: As `image_files.read_images`.
    """
    images = image_files.read_images(paths, shape=run.dataset.test.images.shape[1:])
    return datasets.centred(images, run.config.side) if run.config.side else images


def read_pictures(run: Trained, paths: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """Read image files as `read_images` does, and return what is doubtful about each as well.

    Raises:
      InputError: As `image_files.read_pictures`.
    """
    pictures = image_files.read_pictures(paths, shape=run.dataset.test.images.shape[1:])
    images = np.stack([picture.pixels for picture in pictures])
    side = run.config.side
    doubts = [picture.doubt for picture in pictures]
    return datasets.centred(images, side) if side else images, doubts


def load_all(workdirs: Sequence[str], *, data_dir: str = "") -> dict[str, Trained]:
    """Restore several runs on the same data set and image size, by their folders.

    Raises:
      InputError: As `load`; or a folder is given twice, or data sets or image sizes differ.
    """
    found: dict[str, Trained] = {}
    for workdir in workdirs:
        if any(os.path.realpath(workdir) == os.path.realpath(other) for other in found):
            raise InputError(f"workdir {workdir} is named twice")
        found[workdir] = load(workdir, data_dir=data_dir)
    sizes = ["x".join(map(str, run.test.images.shape[1:])) for run in found.values()]
    sets = [f"{run.dataset.name} {run.dataset.sha256[:8]}" for run in found.values()]
    for what, values in (("image size", sizes), ("data set", sets)):
        if len(set(values)) > 1:
            named = [f"{value} in {workdir}" for value, workdir in zip(values, found, strict=True)]
            raise InputError(f"the runs must have one {what}, got {', '.join(named)}")
    return found


def config_of(kind: type[C], settings: dict[str, Any], workdir: str) -> C:
    """Build the Config of a run from the settings in its config.json.

    Settings that do not affect the result, or that a later version added, may be absent.

    Raises:
      InputError: They are not the program's settings, or a value is not allowed.
    """
    fields = {f.name: f.metadata for f in dataclasses.fields(kind)}
    required = {
        name for name, m in fields.items() if m["affects_result"] and not m.get("added", False)
    }
    for names, problem in (
        (required - settings.keys(), "lacks"),
        (settings.keys() - fields.keys(), "has the unknown"),
    ):
        if names:
            raise InputError(
                f"workdir {workdir} holds a run of another program or version: its config.json "
                f"{problem} {', '.join(sorted(names))}"
            )
    config = kind(**settings)
    try:
        cli.validate(config)
    except InputError as error:
        raise InputError(f"workdir {workdir} has a damaged config.json: {error}") from error
    return config


def check_data(config: runs.Settings, dataset: datasets.Dataset, sha256: str, workdir: str) -> None:
    """Raise InputError unless a run was trained on this data set."""
    if dataset.sha256 != sha256:
        raise InputError(
            f"workdir {workdir} was trained on {config.dataset} with sha256 {sha256}, but the data "
            f"found have {dataset.sha256}; name the folder of the run's data with --data_dir"
        )


def restored(trainer: loop.Trainer, workdir: str) -> tuple[int, loop.Params]:
    """Return the newest checkpoint's step and parameters to evaluate, on the trainer's devices.

    Raises:
      InputError: There is none.
    """
    with Checkpoints(workdir) as checkpoints:
        found = checkpoints.restore(trainer.abstract_state())
    if found is None:
        raise InputError(f"workdir {workdir} has no checkpoint yet; let it train further")
    return found[0], trainer.evaluated(found[1])
