"""The paper's network in PyTorch, in two forms: the baselines of `benchmark_training`.

`TorchCapsNet` uses one convolution for all primary capsules, and einsum for votes and routing.
`NotebookCapsNet` has the form of popular tutorial notebooks: one convolution a dimension of the
primary capsules, and logits as large as the votes. The outputs of both equal those of
`capsjax.models.CapsNet` for the same parameters.

Shape letters are those of `capsjax.shapes`; the output capsules J are the classes.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from experiments.benchmarks import contenders

Parameters = Mapping[str, Any]


class TorchCapsNet(nn.Module):
    """CapsNet with one convolution a layer, and routing by einsum."""

    def __init__(self, params: Parameters, *, num_iterations: int = 3) -> None:
        """Copy the parameters of a `CapsNet`, given as nested dicts of arrays."""
        super().__init__()
        self.convolution = convolution(params["convolution"])
        self.weights = nn.Parameter(tensor(params["capsules"]["weights"]))  # [I, P, J, D]
        self.decoder = decoder(params["decoder"])
        self.num_iterations = num_iterations
        self._set_primary(params["primary"]["convolution"])

    def _set_primary(self, params: Parameters) -> None:
        self.primary: nn.Module = convolution(params, stride=2)

    def forward(self, images: Tensor) -> Tensor:
        """Map images `[B, C, H, W]`, scaled to 0 … 1, to class capsules `[B, J, D]`."""
        return self.route(self.primary_poses(functional.relu(self.convolution(images))))

    def primary_poses(self, features: Tensor) -> Tensor:
        """Map features `[B, C, H, W]` to poses `[B, I, P]`; I is rows x columns x types."""
        maps = self.primary(features).permute(0, 2, 3, 1)
        return squash(maps.reshape(len(maps), -1, self.weights.shape[1]))

    def route(self, poses: Tensor) -> Tensor:
        """Route poses `[B, I, P]` to class capsules `[B, J, D]`."""
        votes = torch.einsum("bip,ipjd->bijd", poses, self.weights)
        logits = votes.new_zeros(votes.shape[:3])
        for iteration in range(self.num_iterations):
            couplings = torch.softmax(logits, dim=2)
            outputs = squash(torch.einsum("bij,bijd->bjd", couplings, votes))
            if iteration + 1 < self.num_iterations:
                logits = logits + torch.einsum("bijd,bjd->bij", votes, outputs)
        return outputs

    def reconstruct(self, capsules: Tensor, labels: Tensor) -> Tensor:
        """Reconstruct images `[B, H * W * C]` from the capsules of the labelled classes."""
        chosen = functional.one_hot(labels, capsules.shape[1]).to(capsules.dtype)
        return self.decoder((capsules * chosen[:, :, None]).flatten(1))


class NotebookCapsNet(TorchCapsNet):
    """CapsNet with one convolution a dimension of a pose, and logits as large as the votes."""

    def _set_primary(self, params: Parameters) -> None:
        kernel, bias = np.asarray(params["kernel"]), np.asarray(params["bias"])
        length = self.weights.shape[1]
        self.numbers = nn.ModuleList(
            convolution({"kernel": kernel[..., p::length], "bias": bias[p::length]}, stride=2)
            for p in range(length)
        )

    def primary_poses(self, features: Tensor) -> Tensor:
        """Map features `[B, C, H, W]` to poses `[B, I, P]`, one convolution an entry of P."""
        numbers = [layer(features).permute(0, 2, 3, 1).flatten(1) for layer in self.numbers]
        return squash(torch.stack(numbers, dim=2))

    def route(self, poses: Tensor) -> Tensor:
        """Route poses `[B, I, P]` with arrays that all have five axes, `[J, B, I, 1, D]`."""
        weights = self.weights.permute(2, 0, 1, 3)[:, None]  # [J, 1, I, P, D]
        votes = poses[None, :, :, None] @ weights  # [J, B, I, 1, D]
        logits = torch.zeros_like(votes)
        for iteration in range(self.num_iterations):
            couplings = torch.softmax(logits, dim=0)
            outputs = squash((couplings * votes).sum(dim=2, keepdim=True))
            if iteration + 1 < self.num_iterations:
                logits = logits + (votes * outputs).sum(dim=-1, keepdim=True)
        return outputs[:, :, 0, 0].transpose(0, 1)


class TorchTrainer:
    """Adam on the paper's loss, without the data augmentation of capsjax's training step."""

    def __init__(self, network: nn.Module, *, reconstruction_weight: float) -> None:
        """Create the optimizer of the network's parameters."""
        self.network = network
        self.reconstruction_weight = reconstruction_weight
        self.optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, fused=True)

    def step(self, images: np.ndarray, labels: np.ndarray) -> float:
        """Take a training step on bytes `[B, H, W, C]` and their classes; return the loss."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(pixels(images), torch.from_numpy(labels).long())
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return the batch mean of margin loss plus weighted reconstruction loss."""
        capsules = self.network(images)
        lengths = torch.linalg.vector_norm(capsules, dim=2)
        present = functional.one_hot(labels, lengths.shape[1]).to(lengths.dtype)
        missing, surplus = functional.relu(0.9 - lengths) ** 2, functional.relu(lengths - 0.1) ** 2
        margin = (present * missing + 0.5 * (1 - present) * surplus).sum(dim=1)
        drawn = self.network.reconstruct(capsules, labels)
        squares = ((drawn - images.permute(0, 2, 3, 1).flatten(1)) ** 2).sum(dim=1)
        return (margin + self.reconstruction_weight * squares).mean()


def contender(
    network: type[TorchCapsNet], params: Parameters, images: np.ndarray, labels: np.ndarray
) -> contenders.Contender:
    """Build the contender of one form of the network: "torch" or "torch_notebook"."""
    trainer = TorchTrainer(network(params), reconstruction_weight=contenders.RECONSTRUCTION_WEIGHT)

    @torch.inference_mode()
    def lengths() -> Tensor:
        return torch.linalg.vector_norm(trainer.network(pixels(images)), dim=2)

    def rows() -> contenders.Rows:
        with torch.no_grad():
            features = functional.relu(trainer.network.convolution(pixels(images)))
            poses = trainer.network.primary_poses(features).requires_grad_()

        def routing() -> tuple[Tensor, ...]:
            capsules = trainer.network.route(poses)
            inputs = (poses, trainer.network.weights)
            return torch.autograd.grad(capsules, inputs, capsules.detach())

        return {"inference": lengths, "routing, with gradients": routing}

    @torch.inference_mode()
    def class_capsules(images: np.ndarray) -> np.ndarray:
        return network(params)(pixels(images)).numpy()

    return contenders.Contender(lambda: trainer.step(images, labels), class_capsules, rows)


def squash(x: Tensor) -> Tensor:
    """Squash vectors along the last axis: `|x|²/(1 + |x|²) · x/|x|`."""
    squares = (x * x).sum(dim=-1, keepdim=True)
    return x * torch.sqrt(squares + 1e-12) / (1 + squares)


def pixels(images: np.ndarray) -> Tensor:
    """Convert bytes `[B, H, W, C]` to float32 `[B, C, H, W]`, scaled to 0 … 1."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).to(torch.float32) / 255


def tensor(array: Any) -> Tensor:
    """Copy an array."""
    return torch.from_numpy(np.array(array))


def convolution(params: Parameters, *, stride: int = 1) -> nn.Conv2d:
    """Build a convolution with a bias from kernel `[K, L, C, outputs]` and bias."""
    height, width, channels, outputs = params["kernel"].shape
    layer = nn.Conv2d(channels, outputs, (height, width), stride)
    layer.weight = nn.Parameter(tensor(params["kernel"]).permute(3, 2, 0, 1).contiguous())
    layer.bias = nn.Parameter(tensor(params["bias"]))
    return layer


def decoder(params: Parameters) -> nn.Sequential:
    """Build the decoder of dense layers."""
    layers: list[nn.Module] = []
    for _, weights in sorted(params["layers"].items()):
        layer = nn.Linear(*weights["kernel"].shape)
        layer.weight = nn.Parameter(tensor(weights["kernel"]).T.contiguous())
        layer.bias = nn.Parameter(tensor(weights["bias"]))
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1], nn.Sigmoid())
