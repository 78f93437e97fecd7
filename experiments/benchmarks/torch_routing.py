"""Dynamic routing in PyTorch: einsum over stored votes, the baseline of `benchmark_routing`."""

import importlib.util
from collections.abc import Callable, Sequence
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
    poses: jax.Array,
    weights: jax.Array,
    cotangent: jax.Array,
    *,
    num_iterations: int,
    mode: str,
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
    run = _function(mode, _routing(num_iterations), (poses, weights, cotangent))
    return AsyncCall(run, _wait)


def calls_in_turn(
    sets: Sequence[Sequence[jax.Array]], *, num_iterations: int, mode: str, way: str
) -> AsyncCall:
    """Return a call that routes several sets of numbers, one after another.

    Args:
      sets: Poses, weights and cotangent, as for `routing_call`.
      num_iterations: Routing iterations.
      mode: "forward" or "gradients".
      way: "eager"; "compile", `torch.compile`; or "graph", the same with all kernels of all sets in
        one CUDA graph, which no time of the host is in.
    """
    import torch

    route = _routing(num_iterations)
    if way != "eager":
        route = torch.compile(route)
    functions = [_function(mode, route, arguments) for arguments in sets]

    def run() -> list[Any]:
        return [function() for function in functions]

    if way != "graph":
        return AsyncCall(run, _wait)
    # What is captured must have run before, on a stream that is not the default one.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()

    def replay() -> list[Any]:
        graph.replay()
        return results

    return AsyncCall(replay, _wait)


def _routing(num_iterations: int) -> Callable[[Any, Any], Any]:
    """Return the function of poses and weights that routes by einsum over stored votes."""
    import torch

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

    return route


def _function(
    mode: str, route: Callable[[Any, Any], Any], arguments: Sequence[jax.Array]
) -> Callable[[], Any]:
    """Return the function without arguments that routes these numbers."""
    import torch

    def tensor(x: jax.Array) -> Any:
        values = torch.from_numpy(np.array(x, np.float32))
        return values.to(device(), getattr(torch, x.dtype.name))

    *inputs, seed = map(tensor, arguments)

    def forward() -> Any:
        with torch.no_grad():
            return route(*inputs)

    def gradients() -> Any:
        outputs = route(*inputs)
        return outputs.detach(), torch.autograd.grad(outputs, inputs, seed)

    if mode == "forward":
        return forward
    for x in inputs:
        x.requires_grad_(True)
    return gradients


def _wait(result: Any) -> Any:
    import torch

    if device() == "cuda":
        torch.cuda.synchronize()
    return result


def arrays(result: Any) -> Any:
    """Convert the result of `routing_call` to NumPy arrays."""
    return jax.tree.map(lambda x: x.float().cpu().numpy(), result)
