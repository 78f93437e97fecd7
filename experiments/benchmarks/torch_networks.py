"""Other networks in PyTorch, baselines of `benchmark_training` with `--network`.

`TorchEfficientCapsNet` forms the attention matrices, as the authors' code does, and
`TorchMatrixCapsNet` gathers the windows of its convolutions and stores all votes, as the field's
implementations do. The outputs equal those of `capsjax.models` for the same parameters. Maps are
`[B, C, H, W]` in PyTorch's memory format `channels_last`, in which both networks are faster.

Shape letters are those of `capsjax.shapes`; K and L are the height and width of a window.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from capsjax.models.efficient_capsnet import EPSILON, MOMENTUM
from capsjax.nn import EMRouting
from capsjax.routing.em import DECAY
from experiments.benchmarks import contenders, torch_capsnet

Parameters = Mapping[Any, Any]


class TorchEfficientCapsNet(nn.Module):
    """Efficient-CapsNet for MNIST, by parameters given as nested dicts of arrays."""

    def __init__(self, params: Parameters) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        strides = (1, 1, 1, 2)
        for (_, block), stride in zip(sorted(params["blocks"].items()), strides, strict=True):
            convolution = torch_capsnet.convolution(block["convolution"], stride=stride)
            layers += [convolution, nn.ReLU(), _batch_norm(block["normalization"])]
        self.convolutions = nn.Sequential(*layers)
        kernel = torch_capsnet.tensor(params["primary"]["kernel"])
        self.primary = nn.Conv2d(
            kernel.shape[-1], kernel.shape[-1], tuple(kernel.shape[:2]), groups=kernel.shape[-1]
        )
        self.primary.weight = nn.Parameter(kernel.permute(3, 2, 0, 1).contiguous())
        self.primary.bias = nn.Parameter(torch_capsnet.tensor(params["primary"]["bias"]))
        self.weights = nn.Parameter(torch_capsnet.tensor(params["capsules"]["weights"]))
        self.bias = nn.Parameter(torch_capsnet.tensor(params["capsules"]["couplings_bias"]))
        self.decoder = torch_capsnet.decoder(params["decoder"])

    def forward(self, images: Tensor) -> Tensor:
        """Map images `[B, C, H, W]`, scaled to 0 … 1, to class capsules `[B, J, D]`."""
        maps = self.primary(self.convolutions(images)).permute(0, 2, 3, 1)
        poses = _exponential_squash(maps.reshape(len(maps), -1, self.weights.shape[1]))
        votes = torch.einsum("bip,ipjd->bjid", poses, self.weights)
        attention = votes @ votes.transpose(-1, -2) / votes.shape[-1] ** 0.5  # [B, J, I, I]
        couplings = torch.softmax(attention.sum(dim=-1), dim=1) + self.bias.T
        return _exponential_squash((couplings[..., None] * votes).sum(dim=2))

    def reconstruct(self, capsules: Tensor, labels: Tensor) -> Tensor:
        """Reconstruct images `[B, H * W * C]` from the capsules of the labelled classes."""
        chosen = functional.one_hot(labels, capsules.shape[1]).to(capsules.dtype)
        return self.decoder((capsules * chosen[:, :, None]).flatten(1))


class TorchMatrixCapsNet(nn.Module):
    """Matrix capsules with EM routing, by parameters given as nested dicts of arrays."""

    def __init__(self, params: Parameters) -> None:
        super().__init__()
        self.convolution = torch_capsnet.convolution(params["convolution"], stride=2)
        self.primary = torch_capsnet.convolution(params["primary"]["convolution"])
        layers = [layer for _, layer in sorted(params["conv_capsules"].items())]
        self.convolutions = nn.ModuleList(
            _ConvCapsules(layer, stride=stride)
            for layer, stride in zip(layers, (2, 1), strict=True)
        )
        self.capsules = _ClassCapsules(params["capsules"])

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Map images `[B, C, H, W]` to class poses `[B, J, 16]` and activations `[B, J]`."""
        maps = self.primary(functional.relu(self.convolution(images))).permute(0, 2, 3, 1)
        types = maps.shape[-1] // 17
        poses = maps[..., :-types].reshape(*maps.shape[:-1], types, 4, 4)
        activations = torch.sigmoid(maps[..., -types:])
        for layer in self.convolutions:
            poses, activations = layer(poses, activations)
        return self.capsules(poses, activations)


class _ConvCapsules(nn.Module):
    """A convolutional capsule layer whose windows compete for a child that they share."""

    def __init__(self, params: Parameters, *, stride: int) -> None:
        super().__init__()
        # [K, L, I, P, J, E]
        self.weights = nn.Parameter(torch_capsnet.tensor(params["weights"]))
        self.betas = _betas(params)
        self.stride = stride

    def forward(self, poses: Tensor, activations: Tensor) -> tuple[Tensor, Tensor]:
        """Map poses `[B, H, W, I, 4, 4]`, activations `[B, H, W, I]` to those of the windows."""
        batch, height, width = poses.shape[:3]
        size, parents = self.weights.shape[0], self.weights.shape[4]
        rows, columns = ((n - size) // self.stride + 1 for n in (height, width))
        starts = torch.arange(rows) * self.stride, torch.arange(columns) * self.stride
        y = (starts[0][:, None] + torch.arange(size))[:, None, :, None]
        x = (starts[1][:, None] + torch.arange(size))[None, :, None, :]
        index = (y * width + x).flatten()  # positions of the children, by windows and offsets

        def gathered(maps: Tensor) -> Tensor:
            found = maps.flatten(1, 2)[:, index]
            return found.unflatten(1, (rows * columns, size * size))

        weights = self.weights.flatten(0, 1)
        votes = torch.einsum("bnkirp,kipje->bnkijre", gathered(poses), weights)
        votes = votes.flatten(-2).flatten(2, 3)  # [B, N, K·L·I, J, 16]
        owned = gathered(activations).flatten(2)

        def couplings(logits: Tensor) -> Tensor:
            """Normalise logits `[B, N, K·L·I, J]` over all parents of a child."""
            by_child = logits.unflatten(2, (size * size, -1)).flatten(1, 2)
            largest = by_child.detach().amax(-1)  # [B, N·K·L, I]
            positions = index[None, :, None].expand_as(largest)
            empty = largest.new_full((batch, height * width, largest.shape[-1]), -torch.inf)
            top = empty.scatter_reduce(1, positions, largest, "amax")[:, index]
            exponentials = torch.exp(by_child - top[..., None])
            sums = torch.zeros_like(empty).index_add(1, index, exponentials.sum(-1))
            found = exponentials / sums[:, index][..., None]
            return found.unflatten(1, (rows * columns, -1)).flatten(2, 3)

        shares = torch.bincount(index, minlength=height * width)[index].to(votes.dtype)
        uniform = 1 / (parents * shares.reshape(rows * columns, size * size, 1, 1))
        uniform = uniform.expand(-1, -1, poses.shape[3], parents).flatten(1, 2)
        poses, activations = _em(votes, owned, self.betas, uniform, couplings)
        grid = (rows, columns)
        return poses.unflatten(-1, (4, 4)).unflatten(1, grid), activations.unflatten(1, grid)


class _ClassCapsules(nn.Module):
    """A capsule layer from all positions to classes, with coordinate addition."""

    def __init__(self, params: Parameters) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch_capsnet.tensor(params["weights"]))  # [I, P, J, E]
        self.betas = _betas(params)

    def forward(self, poses: Tensor, activations: Tensor) -> tuple[Tensor, Tensor]:
        """Map poses `[B, H, W, I, 4, 4]` and activations to those of the classes."""
        height, width = poses.shape[1:3]
        votes = torch.einsum("bhwirp,ipje->bhwijre", poses, self.weights)
        coordinates = votes.new_zeros(height, width, 1, 1, 4, 4)
        rows, columns = (torch.arange(n, dtype=votes.dtype) + 0.5 for n in (height, width))
        coordinates[..., 0, -1] = (rows / height).reshape(-1, 1, 1, 1)
        coordinates[..., 1, -1] = (columns / width).reshape(1, -1, 1, 1)
        votes = (votes + coordinates).flatten(-2).flatten(1, 3)[:, None]
        uniform = votes.new_full(votes.shape[2:4], 1 / votes.shape[3])
        found = _em(
            votes,
            activations.flatten(1)[:, None],
            self.betas,
            uniform,
            lambda logits: torch.softmax(logits, dim=-1),
        )
        return found[0][:, 0], found[1][:, 0]


def _em(
    votes: Tensor,
    activations: Tensor,
    betas: nn.Parameter,
    uniform: Tensor,
    normalised: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """Route votes `[B, N, I, J, D]` of N windows by EM, with the settings of `nn.EMRouting`."""
    settings = EMRouting()
    couplings = uniform
    for t in range(1, settings.num_iterations + 1):
        weights = couplings * activations[..., None]
        mass = weights.sum(dim=2)  # [B, N, J]
        shares = (weights / mass[:, :, None])[..., None]
        means = (shares * votes).sum(dim=2)
        squares = (votes - means[:, :, None]) ** 2
        variances = (shares * squares).sum(dim=2) + settings.min_variance
        cost = (betas[0][:, None] + 0.5 * torch.log(variances)).sum(dim=-1) * mass
        evidence = settings.inverse_temperature * (1 - DECAY**t) * (betas[1] - cost)
        if t < settings.num_iterations:
            density = -0.5 * ((squares / variances[:, :, None]).sum(dim=-1))
            constant = -0.5 * torch.log(variances).sum(dim=-1) + functional.logsigmoid(evidence)
            couplings = normalised(density + constant[:, :, None])
    return means, torch.sigmoid(evidence)


class _SpreadTrainer(torch_capsnet.TorchTrainer):
    """Adam on the spread loss with its last margin."""

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return the batch mean of the spread loss of activations."""
        activations = self.network(images)[1]
        true = activations.gather(1, labels[:, None])
        missing = functional.relu(0.9 - (true - activations)) ** 2
        return (missing.sum(dim=1) - 0.9**2).mean()  # without the true class's own


def build(network: str, params: Parameters) -> nn.Module:
    """Build "efficient_capsnet" or "matrix_capsnet"."""
    form = TorchMatrixCapsNet if network == "matrix_capsnet" else TorchEfficientCapsNet
    return form(params).to(memory_format=torch.channels_last)


def contender(
    network: str, params: Parameters, images: np.ndarray, labels: np.ndarray
) -> contenders.Contender:
    """Build the contender "torch" of `--network`, "efficient_capsnet" or "matrix_capsnet"."""
    has_poses = network == "matrix_capsnet"
    kind = _SpreadTrainer if has_poses else torch_capsnet.TorchTrainer
    trainer = kind(
        build(network, params).train(), reconstruction_weight=contenders.RECONSTRUCTION_WEIGHT
    )
    tested = build(network, params).eval()

    @torch.inference_mode()
    def outputs(images: np.ndarray) -> Tensor:
        found = tested(torch_capsnet.pixels(images))
        return found[0] if has_poses else found

    return contenders.Contender(
        lambda: trainer.step(images, labels),
        lambda images: outputs(images).numpy(),
        lambda: {"inference": lambda: outputs(images)},
    )


def _exponential_squash(x: Tensor) -> Tensor:
    """Shrink vectors along the last axis: `(1 - exp(-|x|)) x/|x|`."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True) + 1e-12
    return (1 - torch.exp(-length)) * x / length


def _betas(params: Parameters) -> nn.Parameter:
    arrays = [torch_capsnet.tensor(params[name]) for name in ("beta_u", "beta_a")]
    return nn.Parameter(torch.stack(arrays))


def _batch_norm(params: Parameters) -> nn.BatchNorm2d:
    names = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
    arrays = {own: torch_capsnet.tensor(params[name]) for name, own in names.items()}
    channels, dtype = len(arrays["bias"]), arrays["bias"].dtype
    layer = nn.BatchNorm2d(channels, eps=EPSILON, momentum=1 - MOMENTUM, dtype=dtype)
    layer.load_state_dict(arrays, strict=False)  # it also counts its batches
    return layer
