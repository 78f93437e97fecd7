"""Compile routing for a target ahead of time, and count its memory, traffic and operations.

Each compilation has a child process, because compilers read their settings once a process and
some of their errors abort it.
"""

import dataclasses
import json
import pathlib
import signal
import subprocess
import sys
import tempfile
from typing import Any

import jax

import capsjax
from capsjax.kernels.vote_passes.cases import Case
from capsjax.kernels.vote_passes.passes import device_named
from experiments.compilers import arithmetic, floors
from experiments.compilers.data_sheets import TARGETS, Target
from experiments.compilers.targets import compile_for, described, environment

MB = 1e6


@dataclasses.dataclass(frozen=True)
class CompileRequest:
    """A routing function to compile, and the target to compile it for."""

    target: str  # one of `TARGETS`
    implementation: str  # of the routing function
    case: Case
    gradients: bool  # also those of the arguments; the cotangent is then an argument
    prior: bool = False  # whether a prior [I, J] is given
    bias: bool = False
    mask: bool = False  # whether a mask [B, I] is given
    gradient: str = "full"  # or "last"
    precision: str | None = None  # JAX's default precision of matrix products
    function: str = "dynamic_routing"  # a routing function of `capsjax`


def compile_costs(request: CompileRequest) -> dict[str, Any]:
    """Compile a request in a child process, and return the costs of the program.

    Returns:
      `reason` alone, one line, if it does not compile, does not fit into memory, or has code that
      cannot be counted. Otherwise:
      temporary_mb: Peak of the memory for temporaries.
      argument_mb, result_mb: Memory of arguments and results.
      accessed_mb: On a TPU, the compiler's own count, which includes vector memory and counts the
        body of a loop once.
      matrix_gflop, vector_gflop: Operations (`arithmetic.operations`).
      The results of `floors.program`.
    """
    text = json.dumps(dataclasses.asdict(request))
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-m", "experiments.compilers.compiling", text, folder],
            capture_output=True,
            text=True,
            env=environment(request.target, pathlib.Path(folder)),
            cwd=pathlib.Path(__file__).parents[2],
        )
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    if done.returncode < 0:
        signalled = signal.Signals(-done.returncode).name
        return {"reason": f"not compiled: the compiler was ended by {signalled}"}
    raise RuntimeError(f"compiling {request} failed:\n{done.stderr}")


def routing(request: CompileRequest) -> tuple[Any, tuple[jax.ShapeDtypeStruct, ...]]:
    """Return the function that a request compiles, and the shapes of its arguments."""
    case = request.case
    B, I, P, J, D = case.batch, case.capsules, case.length, case.parents, case.depth  # noqa: E741

    def struct(*shape: int, dtype: str = case.dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    is_matrix, uses_activations = case.rows > 1, request.function == "em_routing"
    poses = (B, I, case.rows, P) if is_matrix else (B, I, P)
    shapes = {"poses": struct(*poses), "weights": struct(I, P, J, D // case.rows)}
    if uses_activations:
        shapes |= {"activations": struct(B, I), "beta_u": struct(J), "beta_a": struct(J)}
    shapes |= {"prior": struct(I, J)} if request.prior else {}
    shapes |= {"bias": struct(J, D)} if request.bias else {}
    differentiated = len(shapes)
    shapes |= {"mask": struct(B, I, dtype="bool")} if request.mask else {}

    settings: dict[str, Any] = {"implementation": request.implementation}
    if request.function != "self_attention_routing":
        settings |= {"num_iterations": case.num_iterations, "gradient": request.gradient}
    if request.function == "inverted_attention_routing":
        settings |= {"matrix": is_matrix}

    def forward(*arrays: jax.Array) -> Any:
        named: dict[str, Any] = dict(zip(shapes, arrays, strict=True))
        return getattr(capsjax, request.function)(**named, **settings)

    def forward_and_gradients(*arrays: jax.Array) -> Any:
        arguments, mask = arrays[:differentiated], arrays[differentiated : len(shapes)]
        outputs, vjp = jax.vjp(lambda *x: forward(*x, *mask), *arguments)
        cotangents = jax.tree.unflatten(jax.tree.structure(outputs), arrays[len(shapes) :])
        return outputs, vjp(cotangents)

    if request.gradients:
        outputs = struct(B, J, case.rows, D // case.rows) if is_matrix else struct(B, J, D)
        cotangents = (outputs, struct(B, J)) if uses_activations else (outputs,)
        return forward_and_gradients, (*shapes.values(), *cotangents)
    return forward, tuple(shapes.values())


def platform_of(target: Target) -> str:
    """Return JAX's name of a target's platform: "cuda" or "tpu"."""
    return "cuda" if target.gpu else "tpu"


def _costs_in_this_process(request: CompileRequest, folder: pathlib.Path) -> dict[str, Any]:
    """Compute the result of `compile_costs`; the environment must be that of the target."""
    target = TARGETS[request.target]
    function, shapes = routing(request)
    platform, known = platform_of(target), described(target)
    device = device_named(known.device_kind, known.num_cores)
    # Kernels read the precision while they are lowered.
    with jax.default_matmul_precision(request.precision):
        try:
            compiled = compile_for(request.target, function, *shapes)
        except (NotImplementedError, jax.errors.JaxRuntimeError) as error:
            return {"reason": f"not compiled: {str(error).splitlines()[0]}"}
        own = arithmetic.kernels(function, *shapes, platform=platform, device=device)
        operations = arithmetic.operations(function, *shapes, platform=platform, device=device)
    memory = compiled.memory_analysis()
    needed = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
    if needed > target.memory:
        available = target.memory / 1e9
        return {"reason": f"not compiled: needs {needed / 1e9:.1f} GB of {available:.0f} GB"}
    try:
        program = floors.program(target, folder, compiled.as_text(), own)
    except ValueError as error:
        return {"reason": f"not counted: {error}"}
    return {
        "temporary_mb": memory.temp_size_in_bytes / MB,
        "argument_mb": memory.argument_size_in_bytes / MB,
        "result_mb": memory.output_size_in_bytes / MB,
        "accessed_mb": None if target.gpu else compiled.cost_analysis()["bytes accessed"] / MB,
        "matrix_gflop": operations.matrix / 1e9,
        "vector_gflop": operations.vector / 1e9,
        **program,
    }


def main(text: str, folder: str) -> None:
    """Compile the request given as JSON, and print its costs as a line of JSON."""
    fields = json.loads(text)
    request = CompileRequest(**{**fields, "case": Case(*fields["case"])})
    print(json.dumps(_costs_in_this_process(request, pathlib.Path(folder))))


if __name__ == "__main__":
    main(*sys.argv[1:])
