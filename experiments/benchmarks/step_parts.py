"""The contender "capsjax": training step, inference and the layers of a step, to be timed."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import capsjax
from capsjax.models import CapsNet
from experiments.benchmarks import contenders
from experiments.training import loop, objectives
from experiments.training.transforms import Augmentation, scaled

MATRIX = 2048  # side of the matrix product


def make_trainer(image_shape: tuple[int, int, int]) -> loop.Trainer:
    """Return the trainer of the paper's network for images `[H, W, C]`, if its state fits.

    Raises:
      InputError: It needs more memory than there is.
    """
    trainer = loop.Trainer(
        lambda: CapsNet(image_shape, rngs=nnx.Rngs(0)),
        objectives.CapsuleClassification(
            num_classes=10,
            augmentation=Augmentation(shift=2),
            reconstruction_weight=contenders.RECONSTRUCTION_WEIGHT,
        ),
        loop.adam(1e-3, final_learning_rate=1e-4, num_steps=1000),
    )
    loop.check_memory(trainer.abstract_state())
    return trainer


def contender(params: loop.Params, images: np.ndarray, labels: np.ndarray) -> contenders.Contender:
    """Build the contender "capsjax"; training starts from new random parameters, not `params`."""
    height, width, channels = images.shape[1:]
    trainer = make_trainer((height, width, channels))
    state = trainer.initial_state(0)
    trainer.compile_step(state, images, labels)

    def train() -> None:
        nonlocal state
        state = trainer.step(state, images, labels)
        jax.block_until_ready(state)

    return contenders.Contender(
        train,
        lambda images: jax.jit(lambda params, x: trainer.model(params)(scaled(x)))(params, images),
        # A copy, because each training step donates its parameters.
        lambda: parts(trainer, jax.tree.map(jnp.copy, state.params), images),
    )


def parts(
    trainer: loop.Trainer, params: loop.Params, images: np.ndarray
) -> dict[str, Callable[[], Any]]:
    """Compile inference and the parts of a training step, by the names of their rows.

    A row "with gradients" is a layer's outputs and their VJP with respect to its parameters and its
    input; images are an input without a gradient.
    """

    @jax.jit
    def activations(params: loop.Params, images: jax.Array) -> tuple[jax.Array, ...]:
        model = trainer.model(params)
        pixels = scaled(images)
        features = jax.nn.relu(model.convolution(pixels))
        poses = model.primary(features)
        return pixels, features, poses, model.capsules(poses)

    pixels, features, poses, capsules = activations(params, images)
    weights = trainer.model(params).capsules.weights[...]
    chosen = jnp.argmax(capsjax.lengths(capsules), axis=1)
    matrix = jnp.ones((MATRIX, MATRIX))

    def bind(function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
        compiled = jax.jit(function).lower(*arguments).compile()
        return lambda: jax.block_until_ready(compiled(*arguments))

    # `inputs` have no gradient. They are arguments and not constants, because XLA would compute
    # whatever depends on constants alone while it compiles.
    def gradients(
        function: Callable[..., Any], *arguments: Any, inputs: tuple[Any, ...] = ()
    ) -> Callable[[], Any]:
        def run(arguments: tuple[Any, ...], inputs: tuple[Any, ...]) -> Any:
            outputs, vjp = jax.vjp(lambda *arguments: function(*arguments, *inputs), *arguments)
            return outputs, vjp(outputs)

        return bind(run, arguments, inputs)

    def layer(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda params, *inputs: function(trainer.model(params), *inputs)

    first = layer(lambda model, x: model.convolution(x))
    return {
        "inference": bind(
            layer(lambda model, x: capsjax.lengths(model(scaled(x)))), params, images
        ),
        "routing": bind(capsjax.dynamic_routing, poses, weights),
        "routing, with gradients": gradients(capsjax.dynamic_routing, poses, weights),
        "first convolution, with gradients": gradients(first, params, inputs=(pixels,)),
        "primary capsules, with gradients": gradients(
            layer(lambda model, x: model.primary(x)), params, features
        ),
        "decoder, with gradients": gradients(
            layer(lambda model, c: model.reconstruct(c, chosen)), params, capsules
        ),
        "matrix product": bind(jnp.matmul, matrix, matrix),
    }
