"""Compare routing and its passes on this device with stored votes in float64.

Shape letters are those of `capsjax.shapes`.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import capsjax
from capsjax.kernels.dtypes import accumulation_dtype
from capsjax.kernels.vote_passes import passes, reference
from capsjax.kernels.vote_passes.cases import CASES, Case
from capsjax.kernels.vote_passes.passes import Implementation, Inputs, Moments, Spec, State, Term

STORED_VOTES = "reference"


class Problem(NamedTuple):
    """Sizes and options of a routing."""

    case: Case
    prior: str = ""  # "IJ" or "BIJ": one for all examples, or one for each
    is_masked: bool = False  # some logits of the prior are -infinity, all of some children
    bias: bool = False
    mask: bool = False
    parent_mask: bool = False
    leaky: bool = False
    gradient: str = "full"


# No size is a multiple of a tile, and the parents need several.
_UNEVEN = Case(batch=33, capsules=45, length=8, parents=37, depth=16)
_SMALL = Case(batch=5, capsules=19, length=8, parents=5, depth=16)
PROBLEMS = {
    "capsnet_mnist": Problem(CASES["capsnet_mnist"]),
    "ragged": Problem(Case(131, 301, length=8, parents=37, depth=16), prior="IJ", bias=True),
    "prior": Problem(_UNEVEN, prior="IJ"),
    "prior_of_each_example": Problem(_UNEVEN, prior="BIJ"),
    "masked_prior": Problem(_UNEVEN, prior="IJ", is_masked=True),
    "bias": Problem(_UNEVEN, bias=True),
    "mask": Problem(_UNEVEN, mask=True),
    "parent_mask": Problem(_UNEVEN, parent_mask=True),
    "leaky": Problem(_UNEVEN, leaky=True),
    "last": Problem(_UNEVEN, prior="IJ", gradient="last"),
    "one_iteration": Problem(_SMALL._replace(num_iterations=1), prior="IJ"),
    "five_iterations": Problem(_SMALL._replace(num_iterations=5), prior="IJ", bias=True),
    "odd_depth": Problem(_UNEVEN._replace(length=6, parents=11, depth=6), prior="IJ", bias=True),
    "long_poses": Problem(Case(20, 9, length=128, parents=3, depth=256)),
    "one_of_each": Problem(Case(1, 1, 1, 1, 1)),
    "conv_capsules": Problem(CASES["conv_capsules"]._replace(batch=640)),
    "many_parents": Problem(CASES["many_parents"]._replace(batch=40, capsules=500)),
    "long": Problem(CASES["long"]._replace(batch=16, capsules=4096, dtype="float32")),
}


class Setting(NamedTuple):
    """A numerical setting, and the error that is always allowed in it."""

    dtype: str
    precision: str | None  # of `jax.default_matmul_precision`
    allowed: float  # relative to the largest entry of an array


# By the bfloat16 parts of an operand (`vote_passes.precision`); the first is one on a TPU, two on a
# GPU, which the second covers.
SETTINGS = (
    Setting("float32", None, 2e-2),
    Setting("float32", "high", 2e-4),
    Setting("float32", "highest", 1e-5),
    Setting("bfloat16", None, 2e-2),
)

Arrays = dict[str, Any]  # by name
# (poses, weights and other arrays; masks; states; cotangents) -> results by name
Function = Callable[[Arrays, Arrays, list[Any], list[Any]], dict[str, Any]]


def arguments(problem: Problem) -> tuple[Arrays, Arrays, list[np.ndarray], list[np.ndarray]]:
    """Draw the arguments of a `Function` in float32: a state and a cotangent an iteration."""
    rng = np.random.default_rng(0)
    B, I, P, J, D, T, *_ = problem.case  # noqa: E741

    def normal(scale: float, *shape: int) -> np.ndarray:
        return scale * rng.standard_normal(shape, np.float32)

    def most(*shape: int) -> np.ndarray:
        return (rng.random(shape) < 0.8) | (np.arange(shape[-1]) == 0)

    arrays = {"poses": normal(0.5, B, I, P), "weights": normal(0.1, I, P, J, D)}
    if problem.prior:
        arrays["prior"] = normal(1.0, *{"IJ": (I, J), "BIJ": (B, I, J)}[problem.prior])
    if problem.is_masked:
        arrays["prior"][..., ::3, : J // 2] = -math.inf
        arrays["prior"][..., 2::7, :] = -math.inf
    if problem.bias:
        arrays["bias"] = normal(0.1, J, D)
    masks = {}
    if problem.mask:
        masks["mask"] = most(B, I)
    if problem.parent_mask:
        masks["parent_mask"] = most(B, J)
    states, cotangents = ([normal(x, B, J, D) for _ in range(T)] for x in (0.5, 1.0))
    return arrays, masks, states, cotangents


def routing(problem: Problem, implementation: str) -> Function:
    """Return the function that routes, and computes all gradients."""

    def run(arrays: Arrays, masks: Arrays, states: Any, cotangents: Any) -> dict[str, Any]:
        del states

        def route(arrays: Arrays) -> Array:
            return capsjax.dynamic_routing(
                **arrays,
                **masks,
                num_iterations=problem.case.num_iterations,
                leaky=problem.leaky,
                gradient=problem.gradient,
                implementation=implementation,
            )

        outputs, vjp = jax.vjp(route, arrays)
        (gradients,) = vjp(cotangents[0].astype(outputs.dtype))
        return {"outputs": outputs, **{f"d_{name}": x for name, x in gradients.items()}}

    return run


def all_passes(problem: Problem, implementation: str) -> Function:
    """Return the function that runs `moments`, `chain` and `input_gradients` by themselves."""
    moments, chain, input_gradients = (
        _pass(name, implementation) for name in ("moments", "chain", "input_gradients")
    )
    last = problem.gradient == "last"

    def run(arrays: Arrays, masks: Arrays, states: Any, cotangents: Any) -> dict[str, Any]:
        spec, inputs = _pass_inputs(problem, arrays, masks)
        states, cotangents = _accumulated((states, cotangents), inputs)
        # The first iteration has no state, as in dynamic routing.
        pairs = zip([None, *states[1:]], cotangents, strict=True)
        terms = [Term(State(b=b), None, Moments(None, cotangent)) for b, cotangent in pairs]
        state = State(b=states[0])
        used = terms[-1:] if last else terms
        gradients = input_gradients(spec, inputs, used, constant_couplings=last)
        return {
            "first_moments": moments(spec, inputs, State()).first,
            "moments": moments(spec, inputs, state).first,
            "chain": chain(spec, inputs, terms[-1]._replace(state=state))[0].b,
            **{f"d_{name}": x for name, x in gradients._asdict().items() if x is not None},
        }

    return run


def couplings(problem: Problem, implementation: str) -> Function:
    """Return the function that computes the couplings of one pass."""

    def run(arrays: Arrays, masks: Arrays, states: Any, cotangents: Any) -> dict[str, Any]:
        del cotangents
        spec, inputs = _pass_inputs(problem, arrays, masks)
        state = State(b=_accumulated(states[0], inputs))
        return {"couplings": _pass("couplings", implementation)(spec, inputs, state)}

    return run


FUNCTIONS = {"routing": routing, "passes": all_passes, "couplings": couplings}


def _pass(name: str, implementation: str) -> Callable[..., Any]:
    if implementation == STORED_VOTES:
        return getattr(reference, name)
    return partial(getattr(passes, name), implementation=Implementation(implementation))


def _pass_inputs(problem: Problem, arrays: Arrays, masks: Arrays) -> tuple[Spec, Inputs]:
    mask = masks.get("mask")
    inputs = Inputs(
        arrays["poses"][:, :, None],
        arrays["weights"],
        gates=None if mask is None else jnp.asarray(mask, arrays["poses"].dtype),
        prior=arrays.get("prior"),
        parent_mask=masks.get("parent_mask"),
    )
    return Spec(problem.case.parents, leaky=problem.leaky), inputs


def _accumulated(tree: Any, inputs: Inputs) -> Any:
    dtype = accumulation_dtype(inputs.poses.dtype)
    return jax.tree.map(lambda x: x.astype(dtype), tree)


class Programs(NamedTuple):
    """Compiled functions of one problem."""

    arguments: Any  # of the functions, in float32
    under_test: list[Any]  # for each of `SETTINGS`, or the error that it does not compile with
    stored: list[Any]  # for each of `SETTINGS`; empty if there is nothing to compare
    exact: Any  # stored votes in float64


def compile_programs(name: str, problem: Problem, implementation: str) -> Programs:
    """Compile a function of `FUNCTIONS` in every setting; may run in any thread."""
    make, drawn = FUNCTIONS[name], arguments(problem)

    def compiled(implementation: str, dtype: str, precision: str | None) -> Any:
        with jax.default_matmul_precision(precision):
            shapes = jax.eval_shape(partial(_rounded, dtype=dtype), drawn)
            return jax.jit(make(problem, implementation)).lower(*shapes).compile()

    under_test: list[Any] = []
    for dtype, precision, _ in SETTINGS:
        try:
            under_test.append(compiled(implementation, dtype, precision))
        except Exception as error:
            under_test.append(error)
    if all(isinstance(program, Exception) for program in under_test):
        return Programs(drawn, under_test, [], None)
    stored = [compiled(STORED_VOTES, dtype, precision) for dtype, precision, _ in SETTINGS]
    with _float64():
        return Programs(drawn, under_test, stored, compiled(STORED_VOTES, "float64", "highest"))


def compare(programs: Programs, index: int) -> dict[str, Any]:
    """Run the programs of `SETTINGS[index]`, and return the fields of a row.

    An error is the largest of an array, relative to the array's largest entry. It may be twice that
    of stored votes in the same setting, or what the setting allows.

    Raises:
      Exception: What the program under test did not compile with, such as Unsupported.
    """
    setting, program = SETTINGS[index], programs.under_test[index]
    if isinstance(program, Exception):
        raise program
    given = _rounded(programs.arguments, setting.dtype)
    placed = jax.device_put(given)
    runs = []
    for _ in range(2):
        poison_free_memory()
        runs.append(jax.tree.map(np.asarray, program(*placed)))
    stored_votes = jax.tree.map(np.asarray, programs.stored[index](*placed))
    with _float64():
        exact = jax.tree.map(np.asarray, programs.exact(*_rounded(given, "float64")))
    found, stored = _errors(runs[0], exact), _errors(stored_votes, exact)
    same_bits = all(runs[0][name].tobytes() == runs[1][name].tobytes() for name in exact)
    allowed = {name: max(setting.allowed, 2 * error) for name, error in stored.items()}
    wrong = [name for name in exact if not found[name] <= allowed[name]]  # NaN is wrong too
    return {
        "ok": same_bits and not wrong,
        "same_bits": same_bits,
        "wrong": wrong,
        "errors": _finite(found),
        "stored_errors": _finite(stored),
        "allowed": setting.allowed,
    }


def poison_free_memory() -> None:
    """Fill most of the device's free memory with NaN, which shows where a program reads it."""
    stats = jax.devices()[0].memory_stats()
    if not stats or "bytes_limit" not in stats:
        return
    free = stats["bytes_limit"] - stats["bytes_in_use"]
    blocks = [jnp.full(2**28, jnp.nan, "float32") for _ in range(int(0.8 * free) >> 30)]
    jax.block_until_ready(blocks)


@contextlib.contextmanager
def _float64() -> Iterator[None]:
    """Compute in float64 and exactly, on the host if the device has no float64."""
    host = jax.devices()[0].platform == "tpu"
    device = jax.default_device(jax.devices("cpu")[0]) if host else contextlib.nullcontext()
    with jax.enable_x64(True), jax.default_matmul_precision("highest"), device:
        yield


def _rounded(tree: Any, dtype: str) -> Any:
    """Round the numbers, but not the masks, to a dtype."""
    return jax.tree.map(lambda x: x if x.dtype == bool else x.astype(jnp.dtype(dtype)), tree)


def _errors(found: dict[str, np.ndarray], exact: dict[str, np.ndarray]) -> dict[str, float]:
    """Return the largest error of each array, relative to its largest entry; NaN if not finite."""

    def error(x: np.ndarray, expected: np.ndarray) -> float:
        return float(np.abs(x.astype(np.float64) - expected).max() / (np.abs(expected).max() or 1))

    return {name: error(found[name], expected) for name, expected in exact.items()}


def _finite(errors: dict[str, float]) -> dict[str, float | None]:
    """Replace what JSON cannot express by None."""
    return {name: error if math.isfinite(error) else None for name, error in errors.items()}
