"""Each pass x options against the definition with stored votes, which a NumPy program checks."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from capsjax.kernels.vote_passes import passes, reference
from capsjax.kernels.vote_passes.config import XlaConfig
from capsjax.kernels.vote_passes.passes import Implementation, Inputs, Moments, Spec, State, Term

B, I, J = 3, 11, 4  # noqa: E741
# Several tiles of children and of examples, the last ones not full.
SMALL_TILES = Implementation("xla", XlaConfig(children=4, examples=2))
ONE_TILE = Implementation("xla", XlaConfig(children=11, examples=3))


class Problem(NamedTuple):
    """The options of a pass, apart from its spec."""

    sizes: tuple[int, int, int] = (1, 5, 6)  # R, P, C
    weights: str = "own"  # or "shared" by the children, "given" votes, "common" to all parents
    prior: str = ""  # or "IJ", "BIJ"
    gates: bool = False
    coordinates: bool = False
    parent_mask: bool = False


LINEAR = Spec(J)
SPECS = {
    "linear": LINEAR,
    "linear leaky": Spec(J, leaky=True),
    "linear mass": Spec(J, mass=True),
    "cosine": Spec(J, logits="cosine"),
    "gaussian": Spec(J, logits="gaussian", moments="central"),
    "gaussian leaky": Spec(J, logits="gaussian", moments="central", leaky=True),
    "cosine mass leaky": Spec(J, logits="cosine", mass=True, leaky=True),
}
ALL = {"gates": True, "coordinates": True, "parent_mask": True}
PROBLEMS = {
    "plain": Problem(),
    "prior": Problem(prior="IJ"),
    "prior of each example": Problem(prior="BIJ"),
    "gates": Problem(gates=True),
    "gates and prior": Problem(prior="IJ", gates=True),
    "coordinates": Problem(coordinates=True),
    "parent mask": Problem(parent_mask=True),
    "matrices": Problem((4, 4, 4)),
    "matrices, all": Problem((2, 3, 5), prior="BIJ", **ALL),
    "vectors, all": Problem(prior="IJ", **ALL),
    "shared": Problem((2, 3, 5), "shared"),
    "shared, all": Problem((4, 4, 4), "shared", prior="BIJ", **ALL),
    "given": Problem(weights="given", prior="IJ", gates=True, parent_mask=True),
    "common": Problem(weights="common", prior="BIJ", gates=True, parent_mask=True),
}


# Linear logits with each option, the others with all at once.
PAIRS = [("linear", problem) for problem in PROBLEMS] + [
    (spec, problem)
    for spec in SPECS
    for problem in ("plain", "matrices, all", "vectors, all", "shared, all", "common")
    if spec != "linear"
]


def make(spec, problem, seed=0):
    """Inputs, two states and the moments' cotangent, in float64."""
    rng = np.random.default_rng(seed)
    normal = lambda scale, *shape: jnp.asarray(rng.normal(size=shape) * scale)  # noqa: E731
    rows, length, columns = problem.sizes
    depth = rows * columns
    poses, weights = normal(0.7, B, I, rows, length), None
    if problem.weights in ("own", "shared"):
        shape = (length, J, columns) if problem.weights == "shared" else (I, length, J, columns)
        weights = normal(0.7, *shape)
    else:
        poses = normal(0.7, B, I, J if problem.weights == "given" else 1, depth)
    prior = parent_mask = None
    if problem.prior:
        prior = rng.normal(size=(I, J) if problem.prior == "IJ" else (B, I, J))
        prior[..., 2, 1] = prior[..., 5, :] = prior[..., 7, :3] = -np.inf
        prior = jnp.asarray(prior)
    if problem.parent_mask:
        parent_mask = np.ones((B, J), bool)
        parent_mask[:, 3] = parent_mask[1, 0] = False  # child 7 is left without a parent
        parent_mask = jnp.asarray(parent_mask)
    gates = jnp.asarray(rng.uniform(0.1, 1, (B, I))).at[:, 4].set(0) if problem.gates else None
    coordinates = normal(0.3, I, depth) if problem.coordinates else None
    inputs = Inputs(poses, weights, gates, prior, coordinates, parent_mask)
    if spec.logits == "gaussian":
        precision = jnp.asarray(rng.uniform(0.5, 2, (B, J, depth)))
        state = State(k=normal(1, B, J), z=normal(0.5, B, J, depth), q=precision)
    else:
        state = State(k=normal(1, B, J), b=normal(1, B, J, depth))
    found = reference.moments(spec, inputs, state)
    cotangent = jax.tree.map(lambda x: normal(1, *x.shape), found)
    return inputs, state, cotangent


def terms_of(spec, inputs, state, cotangent):
    """A first iteration without a state, then one with it."""
    terms = []
    for each in (State(), state):
        found = reference.moments(spec, inputs, each)
        terms.append(Term(each, found if spec.moments == "central" else None, cotangent))
    return terms


def assert_close(actual, wanted, tolerance=1e-12):
    pairs = zip(*map(jax.tree.leaves_with_path, (actual, wanted)), strict=True)
    for (path, a), (_, w) in pairs:
        assert a.shape == w.shape
        assert a.dtype == w.dtype
        scale = max(np.abs(w).max(), 1e-3)
        np.testing.assert_allclose(a / scale, w / scale, atol=tolerance, err_msg=str(path))


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize(("spec", "problem"), PAIRS)
def test_the_definition_is_what_its_formulas_say(spec, problem):
    spec, problem = SPECS[spec], PROBLEMS[problem]
    inputs, state, _ = make(spec, problem)

    @jax.jit
    def run(inputs, state):
        found = [reference.couplings(spec, inputs, each) for each in (State(), state)]
        return found, [reference.moments(spec, inputs, each) for each in (State(), state)]

    for each, *found in zip((State(), state), *run(inputs, state), strict=True):
        couplings, moments = oracles.vote_moments(spec, inputs, each)
        assert_close(found, [couplings, Moments(*moments)])


@pytest.mark.parametrize(("spec", "problem"), PAIRS)
def test_passes_match_the_definition(spec, problem):
    spec, problem = SPECS[spec], PROBLEMS[problem]
    inputs, state, cotangent = make(spec, problem)
    terms = terms_of(spec, inputs, state, cotangent)

    @partial(jax.jit, static_argnums=0)
    def run(stored, inputs, terms):
        module = reference if stored else passes
        settings = {} if stored else {"implementation": SMALL_TILES}
        return (
            [module.moments(spec, inputs, term.state, **settings) for term in terms],
            [module.couplings(spec, inputs, term.state, **settings) for term in terms],
            module.chain(spec, inputs, terms[1], **settings),
            [
                module.input_gradients(spec, inputs, terms, constant_couplings=c, **settings)
                for c in (False, True)
            ],
        )

    actual = run(False, inputs, terms)
    assert_close(actual, run(True, inputs, terms))
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(actual))


@pytest.mark.parametrize("spec", SPECS)
def test_tiles_change_nothing(spec):
    spec, problem = SPECS[spec], PROBLEMS["matrices, all"]
    inputs, state, _ = make(spec, problem)
    several, one = (
        passes.moments(spec, inputs, state, implementation=x) for x in (SMALL_TILES, ONE_TILE)
    )
    assert_close(several, one)


def test_central_moments_of_far_votes_keep_their_digits():
    spec = Spec(J, logits="gaussian", moments="central")
    inputs, _, _ = make(spec, Problem(coordinates=True))
    far = inputs._replace(coordinates=inputs.coordinates * 0 + 1000)
    near = inputs._replace(coordinates=inputs.coordinates * 0)
    with jax.enable_x64(False):
        in_float32 = jax.tree.map(lambda x: x.astype(jnp.float32), (far, near))
        far, near = (
            passes.moments(spec, x, State(), implementation=SMALL_TILES) for x in in_float32
        )
    # A vote of 1000 has an error of 3e-5; a sum of squares of 1e6 would have lost all.
    np.testing.assert_allclose(far.second, near.second, rtol=1e-3)


EXAMPLES = "poses", "gates", "parent_mask", "state"


@pytest.mark.parametrize(
    "mapped", [EXAMPLES, ("poses",), ("state",), ("weights",), ("poses", "weights", "coordinates")]
)
@pytest.mark.parametrize("spec", ["linear", "gaussian"])
def test_passes_under_vmap(spec, mapped):
    spec, problem = SPECS[spec], PROBLEMS["vectors, all"]
    inputs, state, cotangent = make(spec, problem)

    def run(arguments):
        inputs, state = Inputs(**arguments["inputs"]), arguments["state"]
        found = reference.moments(spec, inputs, state)
        term = Term(state, found if spec.moments == "central" else None, cotangent)
        return (
            passes.moments(spec, inputs, state, implementation=SMALL_TILES),
            passes.chain(spec, inputs, term, implementation=SMALL_TILES),
            passes.input_gradients(spec, inputs, [term], implementation=SMALL_TILES),
        )

    arguments = {**inputs._asdict(), "state": state}
    both = {
        name: jax.tree.map(lambda x: jnp.stack([x, x if x.dtype == bool else x / 2], 1), value)
        if name in mapped
        else value
        for name, value in arguments.items()
    }

    def split(arguments):
        return {"state": arguments.pop("state"), "inputs": arguments}

    axes = split({name: 1 if name in mapped else None for name in arguments})
    actual = jax.jit(jax.vmap(run, (axes,)))(split(dict(both)))
    run_one = jax.jit(run)
    for index in range(2):
        one = {
            name: jax.tree.map(lambda x: x[:, index], value) if name in mapped else value  # noqa: B023
            for name, value in both.items()
        }
        assert_close(jax.tree.map(lambda x: x[index], actual), run_one(split(one)))  # noqa: B023


def test_moments_under_vmap_of_vmap():
    spec = SPECS["linear"]
    inputs, state, _ = make(spec, PROBLEMS["vectors, all"])

    def run(poses, prior):
        changed = inputs._replace(poses=poses, prior=prior)
        return passes.moments(spec, changed, state, implementation=SMALL_TILES).first

    poses, priors = (jnp.stack([x, x / 2, -x]) for x in (inputs.poses, inputs.prior))
    twice = jax.jit(jax.vmap(jax.vmap(run, (0, None)), (None, 0)))(poses, priors)
    for row, prior in zip(twice, priors, strict=True):
        for found, one in zip(row, poses, strict=True):
            assert_close(found, run(one, prior))


def test_passes_have_the_derivatives_of_the_definition():
    spec = SPECS["gaussian"]
    inputs, state, _ = make(spec, PROBLEMS["vectors, all"])
    mask = inputs.parent_mask

    def loss(moments, inputs, state):
        found = moments(spec, inputs._replace(parent_mask=mask), state)
        return sum(jnp.sum(x**2) for x in jax.tree.leaves(found))

    arguments = inputs._replace(parent_mask=None), state
    wanted = jax.grad(lambda *a: loss(reference.moments, *a), (0, 1))(*arguments)
    actual = jax.grad(lambda *a: loss(passes.moments, *a), (0, 1))(*arguments)
    assert_close(actual, wanted, 1e-11)
    tangents = jax.tree.map(jnp.ones_like, arguments)
    wanted = jax.jvp(lambda *a: loss(reference.moments, *a), arguments, tangents)
    actual = jax.jvp(lambda *a: loss(passes.moments, *a), arguments, tangents)
    assert_close(actual, wanted, 1e-11)
