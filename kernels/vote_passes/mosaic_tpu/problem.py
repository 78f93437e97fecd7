"""Arguments, results and sizes of a pass on a TPU."""

from typing import Any, NamedTuple

from jax.experimental import pallas as pl

from capsjax.kernels.vote_passes.config import TPU_LANES, TpuTile
from capsjax.kernels.vote_passes.mosaic_tpu.products import Products, stacks

# Most rows of weights in one product of uniform couplings.
UNIFORM_ROWS = 256


class Arrays(NamedTuple):
    """The inputs of a pass, or their gradients; None for an absent one."""

    poses: Any  # [B, P, I]; gradients: [P, B, I]
    weights: Any  # [P, J, D, I]
    prior: Any = None  # float32 [J, 1, I] or [J, B, I], finite
    gates: Any = None  # float32 [B, I]


class Parents(NamedTuple):
    """State and cotangents of one iteration, for tiles of m examples; None for an absent one."""

    b: Any = None  # float32 [tiles, J, D, m], the state V
    k: Any = None  # float32 [tiles, J, 1, m], bias of the logits
    d_first: Any = None  # float32 [tiles, J, D, m], cotangent of the sums
    d_mass: Any = None  # float32 [tiles, J, 1, m], cotangent of the mass


class Sums(NamedTuple):
    """Sums over the input capsules of each half; None if not requested."""

    first: Any = None  # float32 [halves, tiles, J, D, m]
    mass: Any = None  # float32 [halves, tiles, J, 1, m], of the couplings or of dl


class Problem(NamedTuple):
    """Static description of a pass."""

    tile: TpuTile
    B: int
    P: int
    J: int
    D: int
    I: int  # noqa: E741
    halves: int  # 2: each core of the chip takes half of the input capsules
    leaky: bool  # one more logit 0, whose coupling is dropped
    parts: int  # bfloat16 parts of a float32 operand of a product
    interpret: Any  # as of `pallas_call`
    sums: Sums  # booleans: which sums to compute
    gradients: Arrays  # booleans: which gradients; either none, or those of poses and weights
    constant_couplings: bool = False  # of the gradients

    @property
    def products(self) -> Products:
        """Matrix products of the pass."""
        return Products(self.parts, bool(self.interpret))

    @property
    def coupling(self) -> float:
        """Value of equal couplings."""
        return 1 / (self.J + self.leaky)

    @property
    def n(self) -> int:
        """Number of input capsules in a tile."""
        return min(self.I, TPU_LANES)

    @property
    def example_tiles(self) -> int:
        """Number of tiles of examples."""
        return pl.cdiv(self.B, self.tile.examples)

    @property
    def capsule_tiles(self) -> int:
        """Number of tiles of input capsules."""
        return pl.cdiv(self.I, self.n)

    @property
    def capsule_steps(self) -> int:
        """Number of tiles of input capsules in a half."""
        return pl.cdiv(self.capsule_tiles, self.halves)


def is_uniform(arrays: Arrays, term: Parents) -> bool:
    """Return whether all couplings are equal."""
    return arrays.prior is None and term.b is None and term.k is None


def uniform_parents(problem: Problem) -> int:
    """Return the number of parents whose rows of weights are one operand, if couplings are equal.

    Few rows would leave the matrix unit waiting, many would not fit into registers.
    """
    if not stacks(problem.D):
        return 1
    return divisor(problem.J, max(1, UNIFORM_ROWS // problem.D))


def divisor(count: int, most: int) -> int:
    """Return the largest divisor of `count` that is at most `most`."""
    return next(k for k in range(min(count, most), 0, -1) if count % k == 0)


def needs_agreements(problem: Problem, term: Parents) -> bool:
    """Return whether a pass uses the agreements with the cotangent of the sums."""
    return term.d_first is not None and (not problem.constant_couplings or problem.gradients.gates)


def states(term: Parents) -> list[str]:
    """Return the names of the states of a term that have depth."""
    return [name for name in ("b", "d_first") if getattr(term, name) is not None]
