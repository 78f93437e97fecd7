"""Each pass of the plain implementations x options against the float64 oracle."""

from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from capsjax.kernels.vote_passes import passes, reference
from capsjax.kernels.vote_passes.config import XlaConfig
from capsjax.kernels.vote_passes.passes import Implementation, Inputs, Moments, Spec, State, Term

pytestmark = pytest.mark.usefixtures("float64", "quick_compilation")

B, I, J = 3, 11, 4  # noqa: E741
# Several tiles of children and of examples, the last ones not full.
SMALL_TILES = Implementation("xla", XlaConfig(children=4, examples=2))


class Problem(NamedTuple):
    """The options of a pass, apart from its spec."""

    sizes: tuple[int, int, int] = (1, 5, 6)  # R, P, C
    weights: str = "own"  # or "shared" by the children, "given" votes, "common" to all parents
    prior: str = ""  # or "IJ", "BIJ"
    gates: bool = False
    coordinates: bool = False
    parent_mask: bool = False


SPECS = {
    "linear": Spec(J),
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
    "matrices and gates": Problem((4, 4, 4), gates=True),
    "coordinates": Problem(coordinates=True),
    "parent mask": Problem(parent_mask=True),
    "matrices, all": Problem((2, 3, 5), prior="BIJ", **ALL),
    "vectors, all": Problem(prior="IJ", **ALL),
    "shared": Problem((2, 3, 5), "shared"),
    "shared, all": Problem((4, 4, 4), "shared", prior="BIJ", **ALL),
    "given": Problem(weights="given", prior="IJ", gates=True, parent_mask=True),
    "common": Problem(weights="common", prior="BIJ", gates=True, parent_mask=True),
}
# Linear logits with each option; the others where an option and a spec meet in the code.
PAIRS = [
    *(("linear", problem) for problem in PROBLEMS),
    ("linear leaky", "plain"),
    ("linear leaky", "matrices, all"),
    ("linear mass", "plain"),
    ("linear mass", "vectors, all"),
    ("cosine", "plain"),
    ("cosine", "shared, all"),
    ("cosine", "common"),
    ("gaussian", "plain"),
    ("gaussian", "matrices, all"),
    ("gaussian", "shared, all"),
    ("gaussian", "common"),
    ("gaussian leaky", "vectors, all"),
    ("cosine mass leaky", "matrices, all"),
    ("cosine mass leaky", "common"),
]
# With the couplings as constants: sums and central moments, with gates and without.
CONSTANT_COUPLINGS = {
    ("linear", "plain"),
    ("linear", "vectors, all"),
    ("gaussian", "plain"),
    ("gaussian", "matrices, all"),
}
# Without weights the plain form calls the reference: one pair shows that.
IMPLEMENTATIONS = [
    *(("reference", *pair) for pair in PAIRS),
    *(("xla", *pair) for pair in PAIRS if PROBLEMS[pair[1]].weights in ("own", "shared")),
    ("xla", "cosine mass leaky", "common"),
    ("xla, one tile", "linear", "vectors, all"),
    ("xla, one tile", "gaussian", "plain"),
]


def make(spec, problem, seed=0):
    """Input, two states and the moments' cotangent, in float64."""
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
    depth_of = {"mass": (), "first": (depth,), "second": (depth,)}
    central = spec.moments == "central"
    present = {"mass": spec.mass or central, "first": True, "second": central}
    cotangent = Moments(
        *(normal(1, B, J, *depth_of[name]) if present[name] else None for name in Moments._fields)
    )
    return inputs, state, cotangent


class Passes(NamedTuple):
    """The results of all passes; those of moments and couplings for each of two states."""

    moments: list[Moments]
    couplings: list[jax.Array]
    chain: State
    input_gradients: list[Inputs]  # then, if wanted, with constant couplings


def exact_passes(spec, inputs, state, cotangent, constants):
    """The oracle's results for an empty state and for this one."""
    states = State(), state
    found = [oracles.vote_moments(spec, inputs, each) for each in states]
    gradients = [
        [
            Inputs(*oracles.vote_gradients(spec, inputs, each, cotangent, constant_couplings=c)[0])
            for each in states
        ]
        for c in constants
    ]
    return Passes(
        [Moments(*moments) for _, moments in found],
        [couplings for couplings, _ in found],
        State(*oracles.vote_gradients(spec, inputs, state, cotangent)[1]),
        [jax.tree.map(np.add, *pair) for pair in gradients],
    )


def assert_close(actual, wanted, tolerance=1e-12):
    assert jax.tree.structure(actual) == jax.tree.structure(wanted)
    pairs = zip(*map(jax.tree.leaves_with_path, (actual, wanted)), strict=True)
    for (path, a), (_, w) in pairs:
        assert a.shape == w.shape
        assert a.dtype == w.dtype
        scale = max(np.abs(w).max(), 1e-3)
        np.testing.assert_allclose(a / scale, w / scale, atol=tolerance, err_msg=str(path))


@pytest.mark.parametrize(("implementation", "spec", "problem"), IMPLEMENTATIONS)
def test_passes_match_the_oracle(implementation, spec, problem):
    constants = (False, True) if (spec, problem) in CONSTANT_COUPLINGS else (False,)
    spec, problem = SPECS[spec], PROBLEMS[problem]
    inputs, state, cotangent = make(spec, problem)
    wanted = exact_passes(spec, inputs, state, cotangent, constants)
    module = reference if implementation == "reference" else passes
    settings = {
        "reference": {},
        "xla": {"implementation": SMALL_TILES},
        "xla, one tile": {"implementation": Implementation("xla")},
    }[implementation]

    @jax.jit
    def run(inputs, state, both):
        terms = [
            Term(each, moments if spec.moments == "central" else None, cotangent)
            for each, moments in zip((State(), state), both, strict=True)
        ]
        return Passes(
            [module.moments(spec, inputs, each, **settings) for each in (State(), state)],
            [module.couplings(spec, inputs, each, **settings) for each in (State(), state)],
            module.chain(spec, inputs, terms[1], **settings)[0],
            [
                module.input_gradients(spec, inputs, terms, constant_couplings=c, **settings)
                for c in constants
            ],
        )

    assert_close(run(inputs, state, wanted.moments), wanted)


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


@cache
def pass_functions(spec):
    """All passes of the plain form for the arguments of "vectors, all", as they are and jitted."""
    spec = SPECS[spec]
    _, _, cotangent = make(spec, PROBLEMS["vectors, all"])

    def run(arguments):
        inputs = Inputs(*(arguments[name] for name in Inputs._fields))
        state = arguments["state"]
        found = reference.moments(spec, inputs, state)
        term = Term(state, found if spec.moments == "central" else None, cotangent)
        return (
            passes.moments(spec, inputs, state, implementation=SMALL_TILES),
            passes.chain(spec, inputs, term, implementation=SMALL_TILES)[0],
            passes.input_gradients(spec, inputs, [term], implementation=SMALL_TILES),
        )

    return run, jax.jit(run)


@pytest.mark.parametrize(
    ("spec", "mapped"),
    [
        ("linear", EXAMPLES),
        ("linear", ("state",)),
        ("linear", ("weights",)),
        ("gaussian", ("poses",)),
        ("gaussian", ("poses", "weights", "coordinates")),
    ],
)
def test_passes_under_vmap_equal_passes_in_turn(spec, mapped):
    inputs, state, _ = make(SPECS[spec], PROBLEMS["vectors, all"])
    run, run_one = pass_functions(spec)

    def change_mapped(change, arguments):
        return {
            name: jax.tree.map(change, x) if name in mapped else x for name, x in arguments.items()
        }

    def two(x):
        return jnp.stack([x, x if x.dtype == bool else x / 2], 1)

    both = change_mapped(two, {**inputs._asdict(), "state": state})
    axes = {name: 1 if name in mapped else None for name in both}
    actual = jax.jit(jax.vmap(run, (axes,)))(both)
    for index in range(2):
        one = change_mapped(lambda x: x[:, index], both)  # noqa: B023
        assert_close(jax.tree.map(lambda x: x[index], actual), run_one(one))  # noqa: B023


def test_moments_under_vmap_of_vmap():
    spec = SPECS["linear"]
    inputs, state, _ = make(spec, PROBLEMS["vectors, all"])

    def run(poses, prior):
        changed = inputs._replace(poses=poses, prior=prior)
        return passes.moments(spec, changed, state, implementation=SMALL_TILES).first

    poses, priors = (jnp.stack([x, x / 2, -x]) for x in (inputs.poses, inputs.prior))
    twice = jax.jit(jax.vmap(jax.vmap(run, (0, None)), (None, 0)))(poses, priors)
    run_one = jax.jit(run)
    for row, prior in zip(twice, priors, strict=True):
        for found, one in zip(row, poses, strict=True):
            assert_close(found, run_one(one, prior))


def test_passes_have_the_derivatives_of_the_reference_in_both_modes():
    spec = SPECS["gaussian"]
    inputs, state, _ = make(spec, PROBLEMS["vectors, all"])
    mask = inputs.parent_mask

    @partial(jax.jit, static_argnums=0)
    def derivatives(moments, *arguments):
        def loss(inputs, state):
            found = moments(spec, inputs._replace(parent_mask=mask), state)
            return sum(jnp.sum(x**2) for x in jax.tree.leaves(found))

        tangents = jax.tree.map(jnp.ones_like, arguments)
        return jax.grad(loss, (0, 1))(*arguments), jax.jvp(loss, arguments, tangents)

    arguments = inputs._replace(parent_mask=None), state
    actual, wanted = (derivatives(x.moments, *arguments) for x in (passes, reference))
    assert_close(actual, wanted, 1e-11)
