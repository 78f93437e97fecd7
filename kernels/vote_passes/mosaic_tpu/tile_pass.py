"""The work of one step of the grid: a tile of examples and of input capsules.

Functions of references to blocks and scratch; `routing_pass` describes the steps.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from capsjax.kernels.vote_passes.mosaic_tpu.problem import (
    Arrays,
    Parents,
    Problem,
    Sums,
    divisor,
    is_uniform,
    needs_agreements,
    states,
    uniform_parents,
)
from capsjax.kernels.vote_passes.mosaic_tpu.products import stacks
from capsjax.kernels.vote_passes.mosaic_tpu.scratch import Scratch, has_strided_poses

# Most steps of a loop to write out side by side, so that the latency of one hides behind another:
# components of the poses or exponentials, products of agreements, and parents of sums.
UNROLLED, UNROLLED_PRODUCTS, UNROLLED_SUMS = 16, 40, 2


class Step(NamedTuple):
    """A step of the grid: references to blocks, and indices."""

    problem: Problem
    arrays: Arrays
    terms: Sequence[Parents]
    start: Arrays | None
    sums: Sums
    gradients: Arrays
    scratch: Scratch
    i: Array  # of the tile of capsules in its half
    s: Array  # of the tile of examples
    tile: Array  # of the tile of capsules


def run(step: Step) -> None:
    """Compute one step of the grid."""
    problem, arrays, scratch = step.problem, step.arrays, step.scratch
    inputs = _Inputs(problem, arrays, step.s, step.tile)
    if scratch.poses is not None:
        inputs.write_poses(scratch.poses)
    has_gradients = problem.gradients.poses
    row = step.s if has_gradients else 0
    sums = jax.tree.map(lambda ref: ref.at[0, row], step.sums)

    @pl.when(step.i == 0)
    def _() -> None:
        for ref in jax.tree.leaves(sums):
            ref[...] = jnp.zeros(ref.shape, ref.dtype)

    # Gradients of half precision are added up in scratch.
    gradients = step.gradients
    if scratch.d_poses is not None:
        gradients = gradients._replace(poses=scratch.d_poses, weights=scratch.d_weights)
    # States that stay in vector memory for all tiles of capsules are split in the first one.
    stay = len(step.terms) == 1 and (not has_gradients or problem.example_tiles == 1)
    for number, term in enumerate(step.terms):
        parents = jax.tree.map(lambda ref: ref.at[0], term)
        if is_uniform(arrays, term):
            write = partial(_write_uniform_lefts, inputs, parents, scratch.uniform_lefts)
        else:
            write = partial(_write_lefts, inputs, parents, scratch.lefts)
        if stay:
            pl.when(step.i == 0)(write)
        else:
            write()
        _Term(inputs, parents, step.start, sums, gradients, scratch, is_first=number == 0).run()
    if scratch.d_poses is not None:
        step.gradients.poses[...] = scratch.d_poses[...].astype(step.gradients.poses.dtype)

        @pl.when(step.s == problem.example_tiles - 1)
        def _() -> None:
            d_weights = scratch.d_weights[...].astype(step.gradients.weights.dtype)
            step.gradients.weights[...] = d_weights


class _Inputs(NamedTuple):
    """Blocks of the inputs; what lies past the end of an array is read as 0."""

    problem: Problem
    arrays: Arrays
    s: Array
    tile: Array

    def write_poses(self, ref: Any) -> None:
        """Write the poses [m, P, n] as [P, m, n], so that a component is a contiguous matrix."""
        if has_strided_poses(self.problem, self.arrays):
            for p in range(self.problem.P):
                ref[p] = self.component(p)
            return
        poses = jnp.swapaxes(self.arrays.poses[...].astype(jnp.float32), 0, 1)
        for p in range(self.problem.P):
            ref[p] = self.existing(poses[p])

    def component(self, p: Any) -> Array:
        """Return component p of the poses, [m, n], by strided loads."""
        m, P, n = self.arrays.poses.shape
        rows = self.arrays.poses.reshape(m * P, n)
        return self.existing(rows[pl.ds(p, m, stride=P), :])

    def weights(self, p: Any, j: Any) -> list[Array]:
        """Return the parts of the weights of component p for parent j, [D, n]."""
        weights = self.existing(self.arrays.weights[p, j], examples=False)
        return self.problem.products.split(weights)

    def prior(self, j: Any) -> Array:
        """Return the prior for parent j, [1, n] or [m, n]."""
        prior = self.arrays.prior[j]
        return self.existing(prior, examples=prior.shape[0] > 1)

    def existing(self, x: Array, *, examples: bool = True) -> Array:
        """Replace what lies past the end of an array [m, n], or if not `examples` [:, n], by 0."""
        problem = self.problem
        m, n = problem.tile.examples, problem.n
        exists = None
        if problem.I % n:
            lane = lax.broadcasted_iota(jnp.int32, (1, n), 1)
            exists = lane < problem.I - self.tile * n
        if examples and problem.B % m:
            row = lax.broadcasted_iota(jnp.int32, (m, 1), 0) < problem.B - self.s * m
            exists = row if exists is None else row & exists
        return x if exists is None else jnp.where(exists, x, jnp.zeros((), x.dtype))


def _write_lefts(inputs: _Inputs, parents: Parents, lefts: Any) -> None:
    """Write the parts of the states [J, D, m] as the left operands of products, [m, depth]."""
    problem = inputs.problem

    def write(j: Array, _: None) -> None:
        for number, name in enumerate(states(parents)):
            state = getattr(parents, name)[j]
            rows = [part.astype(jnp.float32) for part in problem.products.split(state)]
            if stacks(problem.D):
                terms = problem.products.terms(inputs.arrays.weights.dtype)
                rows = [jnp.concatenate([rows[a] for a, _ in terms])]
            for group, x in enumerate(rows):
                lefts[number, group, j] = x.T.astype(jnp.bfloat16)

    if states(parents):
        lax.fori_loop(0, problem.J, write, None)


def _write_uniform_lefts(inputs: _Inputs, parents: Parents, lefts: Any) -> None:
    """Write the parts of the cotangent [J, D, m] of sums with equal couplings, [m, depth]."""
    problem = inputs.problem
    together = uniform_parents(problem)

    def write(block: Array, _: None) -> None:
        rows = parents.d_first[pl.ds(block * together, together)]
        rows = rows.reshape(together * problem.D, -1)
        for part, x in enumerate(problem.products.split(rows)):
            lefts[part, block] = x.astype(jnp.float32).T.astype(jnp.bfloat16)

    if lefts is not None:
        lax.fori_loop(0, problem.J // together, write, None)


class _Term(NamedTuple):
    """The work of one term: references, and functions that read and write them."""

    inputs: _Inputs
    parents: Parents
    start: Arrays | None
    sums: Sums
    gradients: Arrays
    scratch: Scratch
    is_first: bool

    def run(self) -> None:
        """Run the steps that `routing_pass` describes."""
        if is_uniform(self.inputs.arrays, self.parents):
            self._run_uniform()
            return
        inverse, mean = self._soften(self._agree())
        if self.problem.gradients.poses:
            self._start_gradients(mean)
        together = divisor(self.problem.J, UNROLLED_SUMS if self.problem.tile.unrolled else 1)

        def use(block: Any, _: None) -> None:
            self._use([together * block + k for k in range(together)], inverse, mean)

        lax.fori_loop(0, self.problem.J // together, use, None)

    @property
    def problem(self) -> Problem:
        """The sizes of the pass."""
        return self.inputs.problem

    @property
    def _zeros(self) -> Array:
        return jnp.zeros((self.problem.tile.examples, self.problem.n), jnp.float32)

    @property
    def _agreeing(self) -> list[int]:
        """Numbers of the states whose agreements with the votes are used."""
        found = states(self.parents)
        needed = needs_agreements(self.problem, self.parents)
        return [k for k, name in enumerate(found) if name == "b" or needed]

    def _column(self, row: Array) -> Array:
        """Return a row [1, m] as each column of a matrix [m, n]."""
        return jnp.broadcast_to(row, self._zeros.shape[::-1]).T

    def _product(self, state: int, p: Any, j: Any, weights: list[Array]) -> Array:
        """Return a state's product T[p, j], [m, n]."""
        lefts, products = self.scratch.lefts, self.problem.products
        terms = products.terms(self.inputs.arrays.weights.dtype)
        if stacks(self.problem.D):
            right = jnp.concatenate([weights[b] for _, b in terms])
            return products.dot(lefts[state, 0, j], right, 1, 0)
        found = [products.dot(lefts[state, a, j], weights[b], 1, 0) for a, b in terms]
        return sum(found[1:], found[0])

    def _agree(self) -> Array:
        """Write logits and gradients of the couplings; return the largest logit, [m, n]."""
        inputs, scratch, parents = self.inputs, self.scratch, self.parents

        def agree(j: Any, largest: Array) -> Array:
            def add(p: Any, agreements: list[Array]) -> list[Array]:
                weights, u, found = inputs.weights(p, j), scratch.poses[p], []
                for state, agreement in zip(self._agreeing, agreements, strict=True):
                    product = self._product(state, p, j, weights)
                    if scratch.products is not None:
                        scratch.products[state, p, j] = product
                    found.append(agreement + u * product)
                return found

            agreements = self._loop(
                self.problem.P, UNROLLED, add, [self._zeros] * len(self._agreeing)
            )
            if needs_agreements(self.problem, parents):
                d_couplings = agreements.pop()
                if parents.d_mass is not None:
                    d_couplings += self._column(parents.d_mass[j])
                scratch.d_couplings[j] = d_couplings
            logits = agreements[0] if agreements else self._zeros
            if inputs.arrays.prior is not None:
                logits += inputs.prior(j)
            if parents.k is not None:
                logits += self._column(parents.k[j])
            scratch.logits[j] = logits
            return jnp.maximum(largest, logits)

        lowest = 0.0 if self.problem.leaky else -jnp.inf
        together = max(1, UNROLLED_PRODUCTS // self.problem.P)
        return self._loop(self.problem.J, together, agree, jnp.full_like(self._zeros, lowest))

    def _soften(self, largest: Array) -> tuple[Array, Array | None]:
        """Write exponentials; return 1 / their sum, and the mean gradient of the couplings."""
        scratch = self.scratch
        has_mean = needs_agreements(self.problem, self.parents)

        def exponentiate(j: Any, sums: list[Array]) -> list[Array]:
            exponential = jnp.exp(scratch.logits[j] - largest)
            scratch.logits[j] = exponential
            terms = [exponential]
            if has_mean:
                terms.append(exponential * scratch.d_couplings[j])
            return [x + y for x, y in zip(sums, terms, strict=True)]

        of_leak = jnp.exp(-largest) if self.problem.leaky else self._zeros
        init = [of_leak, *[self._zeros] * has_mean]
        total, *mean = self._loop(self.problem.J, UNROLLED, exponentiate, init)
        inverse = 1 / total
        return inverse, mean[0] * inverse if has_mean else None

    def _start_gradients(self, mean: Array | None) -> None:
        """Write the gradients of gates, and those that `_use` adds to."""
        gradients, start = self.gradients, self.start
        if self.is_first:
            for p in range(self.problem.P):
                gradients.poses[p] = self._zeros if start is None else start.poses[p]
        if gradients.gates is not None:
            so_far = self._so_far("gates", ..., of_examples=True)
            assert mean is not None  # see `needs_agreements`
            gradients.gates[...] = mean if so_far is None else so_far + mean

    def _so_far(self, name: str, at: Any, *, of_examples: bool) -> Array | None:
        """Return what earlier terms and calls, and for sums over examples tiles, added up."""
        ref = getattr(self.gradients, name)
        if not self.is_first:
            return ref[at]
        start = None if self.start is None else getattr(self.start, name)[at]
        if of_examples or self.problem.example_tiles == 1:
            return start
        return jnp.where(self.inputs.s == 0, 0.0 if start is None else start, ref[at])

    def _use(self, js: Sequence[Any], inverse: Array, mean: Array | None) -> None:
        """Add to the sums and gradients for some parents."""
        inputs, parents, products = self.inputs, self.parents, self.problem.products
        has_d_logits = parents.d_first is not None and not self.problem.constant_couplings
        gates = inputs.arrays.gates
        if gates is not None:
            inverse = inverse * inputs.existing(gates[...])
        couplings = [self.scratch.logits[j] * inverse for j in js]  # times gates
        d_logits: list[Any] = [None] * len(js)
        if has_d_logits:
            gradients = [self.scratch.d_couplings[j] - mean for j in js]
            d_logits = [w * x for w, x in zip(couplings, gradients, strict=True)]
        summed = couplings if parents.d_first is None else d_logits
        columns = []
        if self.problem.gradients.poses:
            used = [parents.d_first, parents.b if has_d_logits else None]
            columns = [[None if x is None else products.split(x[j]) for x in used] for j in js]

        def add(p: Any, sums: list[Array]) -> list[Array]:
            u, found, d_poses = self.scratch.poses[p], [], []
            for k, j in enumerate(js):
                weights = inputs.weights(p, j)
                if self.sums.first is not None:
                    x = products.split(summed[k] * u)
                    found.append(sums[k] + products.of_rows(weights, x, 1))
                if self.problem.gradients.poses:
                    factors = couplings[k], d_logits[k]
                    d_poses.append(self._add_gradients(p, j, u, weights, factors, columns[k]))
            if d_poses:
                self.gradients.poses[p] += sum(d_poses[1:], d_poses[0])
            return found

        zeros = jnp.zeros((self.problem.D, self.problem.tile.examples), jnp.float32)
        init = [zeros] * len(js) if self.sums.first is not None else []
        sums = self._loop(self.problem.P, UNROLLED, add, init)
        for k, j in enumerate(js):
            if self.sums.first is not None:
                self.sums.first[j] += sums[k]
            if self.sums.mass is not None:
                self.sums.mass[j] += jnp.sum(inputs.existing(summed[k]).T, axis=0, keepdims=True)
            if self.gradients.prior is not None:
                self._add_prior(j, inputs.existing(d_logits[k]))

    def _add_gradients(
        self,
        p: Any,
        j: Any,
        u: Array,
        weights: list[Array],
        factors: tuple[Array, Array | None],
        columns: Sequence[list[Array] | None],
    ) -> Array:
        """Add to the gradient of the weights of component p for parent j.

        Args:
          p: Index of the component.
          j: Index of the parent.
          u: Component p of the poses, [m, n].
          weights: Parts of the weights, [D, n].
          factors: Couplings times gates and gradients of the logits, [m, n].
          columns: Parts of the states [D, m] that belong to the factors, or None.

        Returns:
          What the parent adds to the gradient of component p of the poses.
        """
        products, kept = self.problem.products, self.scratch.products
        # The numbers of the states in `lefts` are those of `states`: the cotangent is the last.
        numbers = len(states(self.parents)) - 1, 0
        d_poses, d_weights = [], []
        for factor, column, state in zip(factors, columns, numbers, strict=True):
            if factor is None or column is None:
                continue
            if kept is not None and state in self._agreeing:
                product = kept[state, p, j]
            else:
                product = self._product(state, p, j, weights)
            d_poses.append(factor * product)
            x = products.split(factor * u)
            d_weights.append(products.of_rows(column, x, 0))
        # Terms of one vote are added first, because they partly cancel.
        total = sum(d_weights[1:], d_weights[0])
        so_far = self._so_far("weights", (p, j), of_examples=False)
        self.gradients.weights[p, j] = total if so_far is None else so_far + total
        return sum(d_poses[1:], d_poses[0])

    def _add_prior(self, j: Any, d_logits: Array) -> None:
        """Add to the gradient of the prior for parent j, of each example or of all."""
        of_examples = self.gradients.prior.shape[1] > 1
        if not of_examples:
            d_logits = jnp.sum(d_logits, axis=0, keepdims=True)
        so_far = self._so_far("prior", j, of_examples=of_examples)
        self.gradients.prior[j] = d_logits if so_far is None else so_far + d_logits

    def _run_uniform(self) -> None:
        """Run the pass with equal couplings: products with the weights of many parents at once."""
        inputs, parents, problem = self.inputs, self.parents, self.problem
        products, J, D = problem.products, problem.J, problem.D
        together = uniform_parents(problem)
        gates = inputs.arrays.gates
        factor: Any = problem.coupling  # times gates
        if gates is not None:
            factor = problem.coupling * inputs.existing(gates[...])
        terms = products.terms(inputs.arrays.weights.dtype)

        def rows(block: Any) -> Any:
            return pl.ds(block * together, together)

        def add_component(p: Any, d_gates: Array) -> Array:
            u = inputs.component(p) if self.scratch.poses is None else self.scratch.poses[p]
            x = products.split(factor * u)

            def add(block: Any, d_poses: Array) -> Array:
                weights = inputs.arrays.weights[p, rows(block)].reshape(together * D, -1)
                weights = products.split(inputs.existing(weights, examples=False))
                if self.sums.first is not None:
                    found = products.of_rows(weights, x, 1)
                    self.sums.first[rows(block)] += found.reshape(together, D, -1)
                if not problem.gradients.poses:
                    return d_poses
                states = products.split(parents.d_first[rows(block)])
                states = [state.reshape(together * D, -1) for state in states]
                found = products.of_rows(states, x, 0).reshape(together, D, -1)
                so_far = self._so_far("weights", (p, rows(block)), of_examples=False)
                total = found if so_far is None else so_far + found
                self.gradients.weights[p, rows(block)] = total
                lefts = self.scratch.uniform_lefts
                for a, b in terms:
                    d_poses += products.dot(lefts[a, block], weights[b], 1, 0)
                return d_poses

            d_poses = lax.fori_loop(0, J // together, add, self._zeros)
            if problem.gradients.poses:
                so_far = self._so_far("poses", p, of_examples=True)
                total = factor * d_poses
                self.gradients.poses[p] = total if so_far is None else so_far + total
            return d_gates + problem.coupling * u * d_poses

        d_gates = self._loop(problem.P, UNROLLED, add_component, self._zeros)
        if self.sums.mass is not None:
            mass = inputs.existing(self._zeros + factor)
            self.sums.mass[...] += jnp.sum(mass.T, axis=0, keepdims=True)[None]
        if self.gradients.gates is not None:
            if parents.d_mass is not None:
                d_mass = jnp.sum(parents.d_mass[...], axis=0)
                d_gates += problem.coupling * self._column(d_mass)
            so_far = self._so_far("gates", ..., of_examples=True)
            self.gradients.gates[...] = d_gates if so_far is None else so_far + d_gates

    def _loop(self, count: int, together: int, body: Callable[[Any, Any], Any], init: Any) -> Any:
        """Run `lax.fori_loop` from 0 to `count`, with up to `together` steps side by side."""
        together = divisor(count, together if self.problem.tile.unrolled else 1)

        def steps(block: Any, carry: Any) -> Any:
            for k in range(together):
                carry = body(together * block + k, carry)
            return carry

        if together == count:
            return steps(0, init)
        return lax.fori_loop(0, count // together, steps, init)
