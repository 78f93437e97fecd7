"""Dynamic routing in PyTorch: einsum over stored votes, the baseline of `benchmark_routing`."""

import importlib.util
from typing import Any

import jax
import numpy as np

from experiments.benchmarks.timing import AsyncCall
from experiments.errors import InputError

# Arrays as large as the votes that are alive at once, rounded up. On a CPU, resident memory grew by
# 1.5 of them forward and 5.2 with gradients (128 x 1152 x 8 -> 10 x 16, 3 iterations, float32).
COPIES = {"forward": 2, "gradients": 6}


def device() -> str:
    """Return PyTorch's name of the device that JAX uses.

    Raises:
      InputError: PyTorch is not installed, or does not support that device.
    """
    if importlib.util.find_spec("torch") is None:
        raise InputError("--torch needs PyTorch: pip install torch")
    import torch

    platform = jax.default_backend()
    if platform == "gpu" and torch.cuda.is_available():
        return "cuda"
    if platform != "cpu":
        raise InputError(f"--torch needs a PyTorch that runs on this {platform}; this one does not")
    return "cpu"


def routing_call(
    poses: jax.Array, weights: jax.Array, cotangent: jax.Array, *, num_iterations: int, mode: str
) -> AsyncCall:
    """Return a call that routes the same numbers in PyTorch.

    Args:
      poses: `[B, I, P]`.
      weights: `[I, P, J, D]`.
      cotangent: Of the outputs, `[B, J, D]`.
      num_iterations: Routing iterations.
      mode: "forward", whose result is the outputs; or "gradients", whose result is the outputs and
        the gradients of poses and weights.
    """
    import torch

    def tensor(x: jax.Array) -> Any:
        values = torch.from_numpy(np.array(x, np.float32))
        return values.to(device(), getattr(torch, x.dtype.name))

    def squash(x: Any) -> Any:
        squares = torch.sum(x * x, dim=-1, keepdim=True)
        return x * torch.sqrt(squares + 1e-12) / (1 + squares)

    def route(poses: Any, weights: Any) -> Any:
        votes = torch.einsum("bip,ipjd->bijd", poses, weights)
        logits = votes.new_zeros(votes.shape[:3])
        for iteration in range(num_iterations):
            couplings = torch.softmax(logits, dim=2)
            outputs = squash(torch.einsum("bij,bijd->bjd", couplings, votes))
            if iteration + 1 < num_iterations:
                logits = logits + torch.einsum("bijd,bjd->bij", votes, outputs)
        return outputs

    inputs = [tensor(poses), tensor(weights)]
    seed = tensor(cotangent)

    def start() -> Any:
        if mode == "forward":
            with torch.no_grad():
                return route(*inputs)
        for x in inputs:
            x.requires_grad_(True)
        outputs = route(*inputs)
        return outputs.detach(), torch.autograd.grad(outputs, inputs, seed)

    def wait(result: Any) -> Any:
        if device() == "cuda":
            torch.cuda.synchronize()
        return result

    return AsyncCall(start, wait)


def arrays(result: Any) -> Any:
    """Convert the result of `routing_call` to NumPy arrays."""
    return jax.tree.map(lambda x: x.float().cpu().numpy(), result)
