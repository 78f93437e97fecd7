"""Functions of one tile in the Triton kernels with votes in registers: loads, votes, logits, sums.

A thread has one example, and one child or parent at a time: a tile is `[n, 32]`, n warps of 32
examples each. So all sums over P, D or R stay in a thread, and only the kernel that merges sums of
parts of the children has shared memory and barriers. Arrays have four numbers last and the examples
next to last, so that a thread loads 16 bytes at once and a warp 512 bytes in sequence. What
is absent from four numbers is zero.

Logits are to the base 2. Linear logits are prior + k + Σ_d b v, with log2(e) in b. Gaussian logits
are computed from votes from a center of their parent on. A gaussian is a scale s,
s² = q log2(e) / 2, and an offset of its mean z:

    l = prior + k - Σ_d (s (v - center) + h)²,    h = -s (z - center)

The center is z, or in gradients the mean of the moments, so that a mean that is large beside the
standard deviation costs no digits. With a center of 0, the rounding of h would be an error that all
children have in common, which grows with their number. Multiplied out, squares would lose all.

Logits are computed once a pass, with the statistics of the softmax, and stored. So are cotangents
of gated couplings in a backward pass, and the gradients of the inputs need no more of the votes.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from capsjax.kernels.vote_passes.config import TRITON_VOTES_EXAMPLES as EXAMPLES
from capsjax.kernels.vote_passes.config import power_of_two
from capsjax.kernels.vote_passes.triton.tiles import LOG2_E, exchange_lanes, exp2, fma, fms, fnma

# Numbers of a load: 16 bytes.
FOUR = 4
# Most sums over the examples that are stored at once.
SUMS = 16
# The least precision. Gradients by the precision are sums of (s v + h)² divided by s²; where votes
# are below 1e8 a logit does not notice that a precision is not 0.
LEAST_PRECISION = 1e-20


class Sizes(NamedTuple):
    """Sizes of a routing problem."""

    batch: int  # B
    capsules: int  # I
    rows: int  # R
    length: int  # P
    parents: int  # J
    columns: int  # E
    logits: str  # "linear" with "sums", or "gaussian" with "central" moments
    leaky: bool
    interpret: bool

    @property
    def padded_length(self) -> int:
        """P in a tile."""
        return round_up(self.length, FOUR)

    @property
    def padded_columns(self) -> int:
        """E in a tile."""
        return round_up(self.columns, FOUR)

    @property
    def depth(self) -> int:
        """D in a tile."""
        return self.rows * self.padded_columns

    @property
    def equal_coupling(self) -> float:
        """The coupling of each parent if all are equal."""
        return 1 / (self.parents + self.leaky)

    @property
    def tiles(self) -> int:
        """Number of tiles of examples."""
        return pl.cdiv(self.batch, EXAMPLES)

    @property
    def padded_batch(self) -> int:
        """B in whole tiles."""
        return self.tiles * EXAMPLES


def round_up(number: int, multiple: int) -> int:
    """Return the smallest multiple that is at least `number`."""
    return -(-number // multiple) * multiple


class Operands(NamedTuple):
    """The inputs of a pass as the kernels read them; None for an absent one."""

    poses: Any  # [I, R, P/4, B, 4]
    weights: Any  # [I, J, P, E/4, 4]
    coordinates: Any  # [I, D/4, 4]
    prior: Any  # logits to the base 2: [I, J], or [I, J, B]
    gates: Any  # [I, B]


class Parents(NamedTuple):
    """What parents contribute to a pass; None for absent ones."""

    k: Any = None  # [J, B], biases of the logits to the base 2
    # [J, 1 or 2, D/4, B, 4]: b to the base 2; or s, and h unless it is 0.
    states: Any = None
    d_mass: Any = None  # [J, B], cotangents of the mass
    # [J, 1 to 3, D/4, B, 4]: cotangents of the sums; or of mean / mass and second, and the moments'
    # mean from the center on unless it is 0.
    cotangents: Any = None


class Slopes(NamedTuple):
    """Gradients of the votes, slope (v - center) + offset; a slope that is 0 is absent."""

    # [J, 1 or 2, D/4, B, 4]: slopes and offsets for a coupling times gate of 1
    of_weights: Any
    of_logits: Any  # for a gradient of the logit of 1; None if logits are independent of votes


class Cotangents(NamedTuple):
    """Cotangents of the moments of a parent, in registers."""

    mass: Array
    others: list[list[Array]]  # `[1 to 3][D]`, as in `Parents`


class Statistics(NamedTuple):
    """Logits of each child, and what their softmax needs of all parents."""

    # [I, B]: the number whose difference from a logit is log2 of the coupling times the gate.
    normaliser: Any
    logits: Any  # [I, J, B]
    share: Any = None  # [I, B], Σ_j c dw, which is the gradient of the gate; None if not wanted
    d_gated: Any = None  # [I, J, B], dw; None if not wanted


# Preparation of operands, outside of the kernels. Padding has poses, states and cotangents 0, and
# so gradients 0.


def prepare_poses(sizes: Sizes, poses: Array) -> Array:
    """Return poses `[B, I, R, P]` as `[I, R, P/4, B, 4]`."""
    x = pad(poses, {0: sizes.padded_batch, 3: sizes.padded_length})
    return x.reshape(*x.shape[:3], -1, FOUR).transpose(1, 2, 3, 0, 4)


def restore_poses(sizes: Sizes, x: Array) -> Array:
    """Return gradients of poses `[B, I, R, P/4, 4]` as `[B, I, R, P]` without padding."""
    return x.reshape(*x.shape[:3], -1)[..., : sizes.length]


def prepare_weights(sizes: Sizes, weights: Array) -> Array:
    """Return weights `[I, P, J, E]` as `[I, J, P, E/4, 4]`, in float32.

    Poses keep their dtype, but the weights would be converted once for each tile of examples.
    """
    x = weights.astype(jnp.float32).swapaxes(1, 2)
    x = pad(x, {2: sizes.padded_length, 3: sizes.padded_columns})
    return x.reshape(*x.shape[:3], -1, FOUR)


def restore_weights(sizes: Sizes, x: Array) -> Array:
    """Return gradients of weights `[I, J, P·E]` as `[I, P, J, E]` without padding."""
    x = x.reshape(sizes.capsules, sizes.parents, sizes.padded_length, -1).swapaxes(1, 2)
    return x[:, : sizes.length, :, : sizes.columns]


def prepare_coordinates(sizes: Sizes, coordinates: Array) -> Array:
    """Return coordinates `[I, D]` as `[I, D/4, 4]`."""
    x = coordinates.reshape(sizes.capsules, sizes.rows, -1).astype(jnp.float32)
    return pad(x, {2: sizes.padded_columns}).reshape(sizes.capsules, -1, FOUR)


def restore_coordinates(sizes: Sizes, x: Array) -> Array:
    """Return gradients of coordinates `[I, D]` without padding."""
    x = x.reshape(sizes.capsules, sizes.rows, -1)[..., : sizes.columns]
    return x.reshape(sizes.capsules, -1)


def prepare_states(sizes: Sizes, *states: Array) -> Array:
    """Return states `[B, J, D]` as `[J, states, D/4, B, 4]`."""
    x = jnp.stack(states, 2)
    x = x.reshape(*x.shape[:3], sizes.rows, -1)
    x = pad(x, {0: sizes.padded_batch, 4: sizes.padded_columns})
    return x.reshape(*x.shape[:3], -1, FOUR).transpose(1, 2, 3, 0, 4)


def restore_states(sizes: Sizes, x: Array) -> Array:
    """Return sums `[B, J, R, E/4, 4]` as `[B, J, D]` without padding."""
    x = x.reshape(*x.shape[:3], -1)[..., : sizes.columns]
    return x.reshape(sizes.batch, sizes.parents, -1)


def examples_last(sizes: Sizes, x: Array) -> Array:
    """Return `[B, …]` as `[…, B]`."""
    return jnp.moveaxis(pad(x, {0: sizes.padded_batch}), 0, -1)


def examples_first(sizes: Sizes, x: Array) -> Array:
    """Invert `examples_last`."""
    return jnp.moveaxis(x[..., : sizes.batch], -1, 0)


def scale_of(precision: Array) -> Array:
    """Return the scales of gaussians."""
    return jnp.sqrt(jnp.maximum(precision, LEAST_PRECISION) * (LOG2_E / 2))


def pad(x: Array, sizes: dict[int, int]) -> Array:
    """Append zeros to axes."""
    return jnp.pad(x, [(0, sizes.get(axis, size) - size) for axis, size in enumerate(x.shape)])


class Tile:
    """Loads, stores and arithmetic of 32 examples with n children or parents, one for each warp.

    An index of an array is a number, or one for each warp, `[n]`.
    """

    def __init__(self, sizes: Sizes, warps: int, index: Array) -> None:
        self.sizes, self.warps = sizes, warps
        self.interpret = sizes.interpret
        self.warp = jnp.arange(warps, dtype=jnp.int32)
        self.lane = jnp.arange(EXAMPLES, dtype=jnp.int32)
        self.example = index * EXAMPLES + self.lane
        self.zero = jnp.zeros((warps, EXAMPLES), jnp.float32)

    def broadcast(self, x: Any, *last: int) -> Array:
        """Repeat numbers of the warps, `[n]`, for all examples: `[n, 32, *last]`."""
        x = x.reshape(-1, *(1 for _ in last), 1)
        return jnp.broadcast_to(x, (self.warps, EXAMPLES, *last))

    def place(self, ref: Any, at: Sequence[Any], last: Array | None) -> Any:
        """Index an array by numbers of the warps, and of the lanes, `[32]`, along its last axis."""
        indices = [x if _is_one(x) else self.broadcast(x) for x in at]
        if last is not None:
            indices.append(jnp.broadcast_to(last[None, :], self.zero.shape))
        return ref.at[tuple(indices)]

    def load(self, ref: Any, *at: Any) -> Array:
        """Load one number of each example: `[n, 32]`."""
        return pltriton.load(self.place(ref, at, self.example))

    def load_shared(self, ref: Any, *at: Any) -> Array:
        """Load a number that all examples share: `[n, 32]`."""
        return pltriton.load(self.place(ref, at, None))

    def store(self, ref: Any, x: Array, *at: Any, exists: Array) -> None:
        """Store one number of each example, for the warps that exist, `[n]`."""
        pltriton.store(self.place(ref, at, self.example), x, mask=self.broadcast(exists))

    def load_fours(
        self, ref: Any, *at: Any, examples: bool = True, again: bool = False
    ) -> list[Array]:
        """Load the numbers of the last axes, `[count, B, 4]` or `[count, 4]`: `[n, 32]` each.

        Args:
          ref: The array.
          at: Indices of the axes before.
          examples: Whether each example has its own numbers.
          again: Whether the thread has loaded them before, and does so again to save registers. The
            hint that it is the last time keeps the compiler from reusing the first load.
        """
        indices, last = [self._for_fours(x) for x in at], [self._four]
        if examples:
            last = [self._for_fours(self.example[None, :, None]), *last]
        found = []
        for k in range(ref.shape[len(at)]):
            place = ref.at[(*indices, k, *last)]
            x = pltriton.load(place, eviction_policy="evict_first" if again else None)
            x = x.astype(jnp.float32)
            # Halving twice takes no instructions; indexing would go through shared memory.
            even, odd = lax.unstack(x.reshape(self.warps, EXAMPLES, 2, 2), axis=-1)
            (a, c), (b, d) = lax.unstack(even, axis=-1), lax.unstack(odd, axis=-1)
            found += [a, b, c, d]
        return found

    def store_fours(self, ref: Any, xs: Sequence[Array], *at: Any, exists: Array) -> None:
        """Store numbers of each example, `[n, 32]` each, into `[B, …, count, 4]` or `[B, …, 4]`.

        A thread stores 16 bytes at once, and those of a pose one after the other.
        """
        example = self.example[None, :, None]
        indices = [self._for_fours(x) for x in (example, *at)]
        mask = self._for_fours(exists) & self._for_fours(example < self.sizes.batch)
        # Without an index of the fours there are four numbers.
        places = [[k] for k in range(len(xs) // FOUR)] if len(indices) + 2 == ref.ndim else [[]]
        for k, place in enumerate(places):
            a, b, c, d = xs[FOUR * k :][:FOUR]
            pairs = lax.stack([a, c], axis=-1), lax.stack([b, d], axis=-1)
            x = lax.stack(pairs, axis=-1).reshape(mask.shape).astype(ref.dtype)
            pltriton.store(ref.at[(*indices, *place, self._four)], x, mask=mask)

    @property
    def _four(self) -> Array:
        return self._for_fours(jnp.arange(FOUR, dtype=jnp.int32)[None, None, :])

    def _for_fours(self, x: Any) -> Any:
        """Repeat numbers of the warps, `[n]`, or others for four numbers of each example."""
        if _is_one(x):
            return x
        x = self.broadcast(x, 1) if x.ndim == 1 else x
        return jnp.broadcast_to(x, (self.warps, EXAMPLES, FOUR))

    def load_pose(self, operands: Operands, i: Array) -> list[list[Array]]:
        """Load the poses of children, `[R][P]`."""
        return [self.load_fours(operands.poses, i, row) for row in range(self.sizes.rows)]

    def load_weights(
        self, operands: Operands, i: Array, j: Array, p: int, *, again: bool = False
    ) -> list[Array]:
        """Load a row of weights, `[E]`."""
        return self.load_fours(operands.weights, i, j, p, examples=False, again=again)

    def load_coordinates(self, operands: Operands, i: Array) -> list[Array] | None:
        """Load the coordinates of children, `[D]`."""
        if operands.coordinates is None:
            return None
        return self.load_fours(operands.coordinates, i, examples=False)

    def load_center(self, center: Any, j: Array) -> list[Array] | None:
        """Load the centers of parents, `[D]`; None stands for 0."""
        return None if center is None else self.load_fours(center, j, 0)

    def votes(
        self,
        operands: Operands,
        pose: list[list[Array]],
        center: list[Array] | None,
        i: Array,
        j: Array,
    ) -> list[Array]:
        """Compute the votes of children for parents, from the center on, `[D]`."""
        sizes = self.sizes
        found = self.load_coordinates(operands, i)
        if center is not None and found is not None:
            found = [x - c for x, c in zip(found, center, strict=True)]
        for p in range(sizes.padded_length):
            row = self.load_weights(operands, i, j, p)
            terms = [(pose[r][p], w) for r in range(sizes.rows) for w in row]
            if found is not None:
                found = [fma(self, u, w, v) for (u, w), v in zip(terms, found, strict=True)]
            elif center is not None:
                found = [fms(self, u, w, c) for (u, w), c in zip(terms, center, strict=True)]
            else:
                found = [u * w for u, w in terms]
        assert found is not None
        return found

    def load_weight(self, found: Statistics, i: Array, j: Array) -> Array:
        """Load couplings times gates."""
        logit = self.load(found.logits, i, j)
        return exp2(self, logit - self.load(found.normaliser, i))

    def load_d_logit(self, found: Statistics, weight: Array, i: Array, j: Array) -> Array:
        """Load the gradients of logits, given couplings times gates."""
        return weight * (self.load(found.d_gated, i, j) - self.load(found.share, i))

    def start_logit(self, operands: Operands, k: Array | None, i: Array, j: Array) -> Array:
        """Compute the part of the logits that does not depend on the votes, given that of k."""
        if operands.prior is None:
            return self.zero if k is None else k
        load = self.load_shared if operands.prior.ndim == 2 else self.load
        prior = load(operands.prior, i, j)
        return prior if k is None else k + prior

    def equal_weight(self, operands: Operands, i: Array) -> Array:
        """Compute the weight of votes whose couplings are equal."""
        weight = jnp.full_like(self.zero, self.sizes.equal_coupling)
        return weight if operands.gates is None else weight * self.load(operands.gates, i)

    def load_states(self, parents: Parents, j: Array) -> list[list[Array]] | None:
        """Load b of parents; or their scales, and the offsets unless they are 0."""
        return None if parents.states is None else self._load_all(parents.states, j)

    def load_cotangents(self, parents: Parents, j: Array) -> Cotangents:
        """Load the cotangents of parents, and the means from the center on unless they are 0."""
        d_mass = self.zero if parents.d_mass is None else self.load(parents.d_mass, j)
        return Cotangents(d_mass, self._load_all(parents.cotangents, j))

    def _load_all(self, ref: Any, j: Array) -> list[list[Array]]:
        return [self.load_fours(ref, j, index) for index in range(ref.shape[1])]

    def logit(self, start: Array, votes: list[Array], states: list[list[Array]] | None) -> Array:
        """Compute logits, given the part that does not depend on the votes."""
        if states is None:
            return start
        if self.sizes.logits == "linear":
            for b, v in zip(*states, votes, strict=True):
                start = fma(self, b, v, start)
            return start
        if len(states) == 1:
            differences = [s * v for s, v in zip(*states, votes, strict=True)]
        else:
            triples = zip(*states, votes, strict=True)
            differences = [fma(self, s, v, h) for s, h, v in triples]
        for x in differences:
            start = fnma(self, x, x, start)
        return start

    def cotangent(self, votes: list[Array], cotangents: Cotangents) -> tuple[Array, list[Array]]:
        """Compute the cotangents of gated couplings, and those of the votes at couplings of 1."""
        total, (first, *others) = cotangents
        if not others:
            for v, f in zip(votes, first, strict=True):
                total = fma(self, f, v, total)
            return total, first
        second, *mean = others
        if mean:
            votes = [v - m for v, m in zip(votes, mean[0], strict=True)]
        of_votes = []
        for y, f, m in zip(votes, first, second, strict=True):
            slope = fma(self, m, y, f)
            total = fma(self, slope, y, total)
            of_votes.append(fma(self, m, y, slope))
        return total, of_votes

    def sums(self, xs: Sequence[Array]) -> Array:
        """Sum each of 2^m arrays over the examples: lane l gets the sum of the (l mod 2^m)-th.

        Each step halves the arrays of a lane, so 16 sums take 62 instructions instead of 160.
        """
        bit = count = len(xs)
        while bit > 1:
            bit //= 2
            upper = jnp.broadcast_to((self.lane & bit)[None, :] != 0, self.zero.shape)
            xs = [
                jnp.where(upper, b, a) + exchange_lanes(self, jnp.where(upper, a, b), bit)
                for a, b in zip(xs[:bit], xs[bit:], strict=True)
            ]
        (x,) = xs
        while count < EXAMPLES:
            x = x + exchange_lanes(self, x, count)
            count *= 2
        return x

    def grow(
        self, ref: Any, at: Sequence[Any], xs: Sequence[Array], first: Array, exists: Array
    ) -> None:
        """Store sums over the examples of 16 numbers at a time, added to those of earlier tiles.

        Args:
          ref: Array whose last axis has the numbers.
          at: Indices of the axes before.
          xs: The numbers, whose sums are taken.
          first: Whether this is the first tile of the program.
          exists: Which warps store, `[n]`.
        """
        for start in range(0, len(xs), SUMS):
            chunk = xs[start : start + SUMS]
            total = self.sums([*chunk, *[self.zero] * (power_of_two(len(chunk)) - len(chunk))])
            # The other lanes have the same sums, or none.
            inside = jnp.broadcast_to((self.lane < len(chunk))[None, :], self.zero.shape)
            mask = self.broadcast(exists) & inside
            place = self.place(ref, at, start + self.lane)
            before = pltriton.load(place, mask=mask & ~first, other=0.0)
            pltriton.store(place, before + total, mask=mask)


def _is_one(x: Any) -> bool:
    return isinstance(x, int) or not x.ndim
