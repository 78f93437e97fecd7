"""EM and variational-Bayes routing: values and all gradients against the oracle, in float64."""

import functools

import gaussian_oracles as oracles
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import routing_oracles

import capsjax

pytestmark = pytest.mark.usefixtures("float64", "quick_compilation")

IMPLEMENTATIONS = ("xla", "reference")


def arrays_of(sizes, seed=0, *, shared=False):
    """Poses, activations, weights, beta_u, beta_a, coordinates of B, I, R, P, J, E."""
    rng = np.random.default_rng(seed)
    B, I, R, P, J, E = sizes  # noqa: E741
    return {
        "poses": rng.normal(size=(B, I, R, P)),
        "activations": rng.uniform(0.1, 1, (B, I)),
        "weights": 0.7 * rng.normal(size=(P, J, E) if shared else (I, P, J, E)),
        "beta_u": rng.normal(size=J),
        "beta_a": rng.normal(size=J),
        "coordinates": rng.normal(size=(I, R, E)),
    }


def prior_of(sizes, seed=3):
    """A prior [I, J]: child 1 reaches all but parent 0, child 2 none."""
    prior = np.random.default_rng(seed).normal(size=(sizes[1], sizes[4]))
    prior[1, 0] = -np.inf
    prior[2] = -np.inf
    return prior


def cotangents_of(sizes):
    rng = np.random.default_rng(7)
    B, _, R, _, J, E = sizes
    return rng.normal(size=(B, J, R, E)), rng.normal(size=(B, J))


def assert_equal(found, wanted, *, error=1e-11):
    """Compare trees of arrays, each by its largest entry."""
    found, wanted = jax.tree.leaves(found), jax.tree.leaves(wanted)
    assert len(found) == len(wanted) > 0
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape
        scale = max(np.abs(b).max(), 1e-3)
        np.testing.assert_allclose(np.asarray(a) / scale, b / scale, rtol=0, atol=error)


def value_and_gradients(function, arrays, cotangents, **settings):
    """Results of a routing, and its gradients by the arrays."""

    def loss(arrays):
        results = function(**arrays, **settings)
        pairs = zip(results, cotangents, strict=True)
        return sum((result * ct).sum() for result, ct in pairs), results

    gradients, results = jax.jit(jax.grad(loss, has_aux=True))(
        {name: jnp.asarray(array) for name, array in arrays.items()}
    )
    return results, gradients


def em_oracle(arrays, cotangents, *, prior=None, parent_mask=None, last=False, **settings):
    names = list(arrays)
    base = np.zeros((*arrays["poses"].shape[:2], 1, arrays["beta_u"].size))
    base = base if prior is None else base + prior[None, :, None]
    if parent_mask is not None:
        base = np.where(parent_mask, base, -np.inf)

    def run(*values, constant=None):
        given = dict(zip(names, values, strict=True))
        votes = oracles.dense_votes(given["poses"], given["weights"], given.get("coordinates"))
        found = oracles.em(
            votes,
            given["activations"],
            given["beta_u"],
            given["beta_a"],
            base,
            axes=(2, 3),
            constant=constant,
            **settings,
        )
        rows, columns = given["poses"].shape[2], given["weights"].shape[-1]
        mean = found[0].reshape(*found[1].shape[::2], rows, columns)
        mask = np.ones(base.shape[-1], bool) if parent_mask is None else parent_mask
        return mean * mask[:, None, None], found[1][:, 0] * mask

    constant = None
    if last:
        votes = oracles.dense_votes(arrays["poses"], arrays["weights"], arrays.get("coordinates"))
        constant = oracles.em(
            votes,
            *(arrays[name] for name in ("activations", "beta_u", "beta_a")),
            base,
            axes=(2, 3),
            **settings,
        )[2]
    run = functools.partial(run, constant=constant)
    results, gradients = routing_oracles.with_gradients(run, list(arrays.values()), cotangents)
    return results, dict(zip(names, gradients, strict=True))


def schedule(final, num_iterations):
    return [final * (1 - 0.95**t) for t in range(1, num_iterations + 1)]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("num_iterations", [1, 2, 3, 4])
def test_em_equals_the_oracle(num_iterations, implementation):
    sizes = (2, 5, 3, 2, 3, 2)
    arrays, cotangents = arrays_of(sizes), cotangents_of(sizes)
    found = value_and_gradients(
        capsjax.em_routing,
        arrays,
        cotangents,
        num_iterations=num_iterations,
        inverse_temperature=1.0,
        min_variance=1e-2,
        implementation=implementation,
    )
    wanted = em_oracle(
        arrays,
        cotangents,
        inverse_temperatures=schedule(1.0, num_iterations),
        cost_scales=[1.0] * num_iterations,
        min_variance=1e-2,
    )
    assert_equal(found, wanted)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("gradient", ["full", "last"])
def test_em_options_equal_the_oracle(gradient, implementation):
    sizes = (2, 6, 1, 3, 4, 3)
    arrays, cotangents = arrays_of(sizes), cotangents_of(sizes)
    arrays["activations"][:, 3] = 0
    parent_mask = np.array([True, True, False, True])
    temperatures, scales = [0.2, 0.9, 0.5], [4.0, 1.0, 2.0]
    found = value_and_gradients(
        capsjax.em_routing,
        arrays,
        cotangents,
        inverse_temperature=jnp.array(temperatures),
        cost_scale=jnp.array(scales),
        min_variance=1e-2,
        prior=jnp.asarray(prior_of(sizes)),
        parent_mask=jnp.asarray(parent_mask),
        gradient=gradient,
        implementation=implementation,
    )
    wanted = em_oracle(
        arrays,
        cotangents,
        inverse_temperatures=temperatures,
        cost_scales=scales,
        min_variance=1e-2,
        prior=prior_of(sizes),
        parent_mask=parent_mask,
        last=gradient == "last",
    )
    if gradient == "last":  # earlier iterations only affect the couplings
        assert_equal(found[0], wanted[0])
        for name in ("poses", "weights", "activations", "coordinates"):
            assert_equal(found[1][name], wanted[1][name])
    else:
        assert_equal(found, wanted)


def vb_oracle(arrays, cotangents, *, parent_mask=None, prior=None, **settings):
    names = list(arrays)
    base = np.zeros((*arrays["poses"].shape[:2], 1, arrays["beta_u"].size))
    base = base if prior is None else base + prior[None, :, None]
    allowed = None
    if parent_mask is not None:
        base = np.where(parent_mask, base, -np.inf)
        allowed = np.broadcast_to(parent_mask, (base.shape[0], base.shape[3]))

    def run(*values):
        given = dict(zip(names, values, strict=True))
        votes = oracles.dense_votes(given["poses"], given["weights"], given.get("coordinates"))
        betas = given["beta_u"], given["beta_a"]
        mean, logits = oracles.variational_bayes(
            votes, given["activations"], *betas, base, axes=(2, 3), allowed=allowed, **settings
        )
        mean = mean.reshape(*logits.shape[::2], *arrays["coordinates"].shape[1:])
        mask = np.ones(base.shape[-1], bool) if parent_mask is None else parent_mask
        return mean * mask[:, None, None], logits[:, 0] * mask

    results, gradients = routing_oracles.with_gradients(run, list(arrays.values()), cotangents)
    return results, dict(zip(names, gradients, strict=True))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("num_iterations", [1, 2, 4])
def test_variational_bayes_equals_the_oracle(num_iterations, implementation):
    sizes = (2, 5, 3, 2, 3, 2)
    arrays, cotangents = arrays_of(sizes), cotangents_of(sizes)
    found = value_and_gradients(
        capsjax.variational_bayes_routing,
        arrays,
        cotangents,
        num_iterations=num_iterations,
        implementation=implementation,
    )
    wanted = vb_oracle(arrays, cotangents, num_iterations=num_iterations)
    # Derivatives of digamma, the trigamma function, differ between SciPy and JAX.
    assert_equal(found, wanted, error=1e-9)


def test_variational_bayes_options_equal_the_oracle():
    sizes = (2, 6, 1, 3, 4, 3)
    arrays, cotangents = arrays_of(sizes), cotangents_of(sizes)
    arrays["activations"][:, 3] = 0
    parent_mask = np.array([True, True, False, True])
    hyperparameters = {"alpha0": 0.5, "kappa0": 2.0, "psi0": 0.3, "nu0": 2.5}
    found = value_and_gradients(
        capsjax.variational_bayes_routing,
        arrays,
        cotangents,
        prior=jnp.asarray(prior_of(sizes)),
        parent_mask=jnp.asarray(parent_mask),
        **hyperparameters,
    )
    wanted = vb_oracle(
        arrays,
        cotangents,
        num_iterations=3,
        prior=prior_of(sizes),
        parent_mask=parent_mask,
        **hyperparameters,
    )
    assert_equal(found, wanted, error=1e-9)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["em_routing", "variational_bayes_routing"])
def test_without_active_children_all_is_finite(name, implementation):
    # A mean of no votes has no derivative by the activations; the library's is finite.
    sizes = (2, 4, 2, 2, 3, 2)
    arrays, cotangents = arrays_of(sizes), cotangents_of(sizes)
    arrays["activations"][:] = 0
    (poses, activations), gradients = value_and_gradients(
        getattr(capsjax, name), arrays, cotangents, implementation=implementation
    )
    assert not np.any(poses)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradients))
    if name == "em_routing":
        final = 0.01 * (1 - 0.95**3)
        wanted = 1 / (1 + np.exp(-final * arrays["beta_a"]))
        np.testing.assert_allclose(activations, np.stack([wanted] * 2), rtol=1e-12)


MAPS = {
    "stride 2": (2, 5, 5, 2, 2, 2, 3, 3, 2),  # B, H, W, A, R, P, K, L, stride
    "stride 1": (2, 3, 4, 1, 2, 2, 2, 3, 1),
    "children outside of all windows": (1, 6, 5, 1, 1, 3, 3, 2, 2),
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("competition", ["types", "positions"])
@pytest.mark.parametrize("sizes", MAPS)
@pytest.mark.parametrize("name", ["em_routing", "variational_bayes_routing"])
def test_convolutions_equal_the_oracle(name, sizes, competition, implementation):
    B, H, W, A, R, P, K, L, stride = MAPS[sizes]
    J, E = 3, 2
    rng = np.random.default_rng(5)
    arrays = {
        "poses": rng.normal(size=(B, H, W, A, R, P)),
        "activations": rng.uniform(0.1, 1, (B, H, W, A)),
        "weights": 0.7 * rng.normal(size=(K, L, A, P, J, E)),
        "beta_u": rng.normal(size=J),
        "beta_a": rng.normal(size=J),
    }
    h, w = (H - K) // stride + 1, (W - L) // stride + 1
    cotangents = rng.normal(size=(B, h, w, J, R, E)), rng.normal(size=(B, h, w, J))
    axes = (3,) if competition == "types" else (2, 3)
    settings = {"num_iterations": 3, "stride": stride, "competition": competition}
    if name == "em_routing":
        settings |= {"inverse_temperature": 1.0, "min_variance": 1e-2}
    found = value_and_gradients(
        getattr(capsjax, name), arrays, cotangents, implementation=implementation, **settings
    )

    def run(poses, activations, weights, beta_u, beta_a):
        votes, reaches = oracles.window_votes(poses, weights, stride)
        base = np.where(reaches[None, ..., None], np.zeros(votes.shape[:-1]), -np.inf)
        own = votes, activations.reshape(B, -1), beta_u, beta_a, base
        if name == "em_routing":
            mean, other, _ = oracles.em(
                *own,
                inverse_temperatures=schedule(1.0, 3),
                cost_scales=[1.0] * 3,
                min_variance=1e-2,
                axes=axes,
            )
        else:
            mean, other = oracles.variational_bayes(*own, num_iterations=3, axes=axes)
        return mean.reshape(B, h, w, J, R, E), other.reshape(B, h, w, J)

    results, gradients = routing_oracles.with_gradients(run, list(arrays.values()), cotangents)
    wanted = results, dict(zip(arrays, gradients, strict=True))
    assert_equal(found, wanted, error=1e-11 if name == "em_routing" else 1e-9)


def test_masked_children_and_parents_are_as_if_absent():
    sizes = (2, 5, 2, 2, 4, 2)
    arrays = {name: jnp.asarray(array) for name, array in arrays_of(sizes).items()}
    mask, parent_mask = jnp.array([1, 0, 1, 1, 0], bool), jnp.array([1, 1, 0, 1], bool)
    for name in ("em_routing", "variational_bayes_routing"):
        route = getattr(capsjax, name)
        poisoned = arrays | {"poses": arrays["poses"].at[:, 1].set(jnp.nan)}
        found = route(**poisoned, mask=mask, parent_mask=parent_mask)
        i, j = np.flatnonzero(mask), np.flatnonzero(parent_mask)
        less = {
            "poses": arrays["poses"][:, i],
            "activations": arrays["activations"][:, i],
            "weights": arrays["weights"][i][:, :, j],
            "beta_u": arrays["beta_u"][j],
            "beta_a": arrays["beta_a"][j],
            "coordinates": arrays["coordinates"][i],
        }
        wanted = route(**less)
        assert_equal([x[:, j] for x in found], list(wanted))
        assert not any(np.any(x[:, 2]) for x in found)


def test_routing_is_a_function_under_jit_vmap_scan_and_export():
    sizes = (3, 4, 2, 2, 3, 2)
    arrays = {name: jnp.asarray(array) for name, array in arrays_of(sizes).items()}
    poses, activations = arrays.pop("poses"), arrays.pop("activations")

    def route(poses, activations):
        return capsjax.em_routing(poses, activations, **arrays)

    wanted = route(poses, activations)
    assert_equal(jax.jit(jax.vmap(route))(poses, activations), wanted)
    scanned = jax.lax.scan(lambda carry, x: (carry, route(*x)), 0, (poses, activations))[1]
    assert_equal(scanned, wanted)
    batch = jax.export.symbolic_shape("n")
    symbolic = [jax.ShapeDtypeStruct((*batch, *x.shape[1:]), x.dtype) for x in (poses, activations)]
    exported = jax.export.export(jax.jit(route))(*symbolic)
    assert_equal(exported.call(poses, activations), wanted)


@pytest.fixture
def usual_compilation(quick_compilation):
    """A test measures rounding, which is that of users only where all optimizations are on."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.mark.usefixtures("usual_compilation")
@pytest.mark.parametrize("ratio", [1, 10, 100, 1000])
@pytest.mark.parametrize("routing", [capsjax.em_routing, capsjax.variational_bayes_routing])
def test_float32_loses_no_more_digits_than_the_votes_do(routing, ratio):
    """Means are `ratio` standard deviations from 0; raw second moments would lose digits twice.

    The table of docs/routing_family.md has the errors measured here.
    """
    sizes = (2, 200, 4, 4, 5, 4)
    arrays = arrays_of(sizes)
    spread = np.einsum("birp,ipje->bijre", arrays["poses"], arrays["weights"]).std()
    arrays["coordinates"][:] = ratio * spread
    # Exact numbers are those of the inputs as float32 has them.
    single = {name: array.astype(np.float32) for name, array in arrays.items()}
    cotangents = [x.astype(np.float32) for x in cotangents_of(sizes)]
    exact = value_and_gradients(
        routing,
        {name: array.astype(np.float64) for name, array in single.items()},
        [x.astype(np.float64) for x in cotangents],
        implementation="reference",
    )
    (means, activations), gradients = value_and_gradients(routing, single, cotangents)
    center, error = single["coordinates"].flat[0], 1e-5 + 1e-6 * ratio
    assert_equal(means - center, exact[0][0] - np.float64(center), error=error)
    assert_equal(activations, exact[0][1], error=error)
    for name in ("poses", "activations", "weights", "beta_u", "beta_a"):
        assert_equal(gradients[name], exact[1][name], error=error)


def test_parts_of_the_batch_do_not_change_a_convolution(monkeypatch):
    rng = np.random.default_rng(0)
    arrays = {
        "poses": rng.normal(size=(4, 5, 5, 2, 2, 2)),
        "activations": rng.uniform(size=(4, 5, 5, 2)),
        "weights": rng.normal(size=(3, 3, 2, 2, 3, 2)),
        "beta_u": rng.normal(size=3),
        "beta_a": rng.normal(size=3),
    }
    cotangents = rng.normal(size=(4, 3, 3, 3, 2, 2)), rng.normal(size=(4, 3, 3, 3))
    prior = jnp.asarray(rng.normal(size=(4, 3, 3, 3, 3, 2, 3)))
    settings = {"stride": 1, "inverse_temperature": 1.0, "prior": prior}
    wanted = value_and_gradients(capsjax.em_routing, arrays, cotangents, **settings)
    jax.clear_caches()
    monkeypatch.setattr("capsjax.kernels.vote_passes.windows.OFFSET_VOTES", 1)
    found = value_and_gradients(capsjax.em_routing, arrays, cotangents, **settings)
    assert_equal(found, wanted)


CASES = {
    "dense": ((8, 2048), (2048, 4, 16, 4), {}),
    "types": ((8, 16, 16, 32), (3, 3, 32, 4, 8, 4), {"stride": 1, "competition": "types"}),
    "positions": ((8, 16, 16, 32), (3, 3, 32, 4, 8, 4), {"stride": 1}),
}


@pytest.mark.parametrize("case", CASES)
def test_votes_are_not_stored(case):
    leading, weights, settings = CASES[case]
    parents = weights[-2]

    def loss(poses, activations, weights):
        betas = jnp.zeros(parents, jnp.float32)
        found = capsjax.em_routing(
            poses, activations, weights, beta_u=betas, beta_a=betas, **settings
        )
        return sum(jnp.sum(x * x) for x in found)

    arguments = [
        jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((*leading, 4, 4), leading, weights)
    ]
    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*arguments).compile()
    rows = 8 if case == "dense" else 8 * 14 * 14
    votes = 4 * rows * np.prod(weights[:-3]) * parents * 16
    assert compiled.memory_analysis().temp_size_in_bytes < votes / 3


OK = {
    "poses": np.ones((2, 6, 4, 4), np.float32),
    "activations": np.full((2, 6), 0.5, np.float32),
    "weights": np.ones((6, 4, 3, 4), np.float32),
    "beta_u": np.zeros(3, np.float32),
    "beta_a": np.zeros(3, np.float32),
}
WRONG = [
    ({"activations": OK["activations"] + 1}, r"activations must be in \[0, 1\], got 1.5 to 1.5"),
    ({"activations": OK["activations"] * np.nan}, r"activations must be in \[0, 1\]"),
    ({"activations": OK["activations"][:, :5]}, r"activations must have shape \[..., I\] = \[2, 6"),
    ({"activations": OK["activations"][0, 0]}, r"activations must have shape .* got \(\) and"),
    (
        {"weights": OK["weights"][:5]},
        r"weights must have shape \[I, P, J, E\] = \[6, 4, any, any\]",
    ),
    ({"beta_u": np.zeros(4, np.float32)}, r"beta_u must have shape \[J\] = \[3\], got \(4,\)"),
    (
        {"coordinates": np.zeros((6, 16), np.float32)},
        r"coordinates must have shape \[I, R, E\] = \[6, 4, 4\], got \(6, 16\)",
    ),
    ({"num_iterations": 0}, "num_iterations must be an integer of at least 1, got 0"),
    ({"competition": "all"}, "competition must be one of types, positions, got 'all'"),
    ({"stride": 0, "competition": "types"}, "stride must be an integer of at least 1, got 0"),
    ({"stride": 1}, r"poses must have shape|activations must have shape"),
]
WRONG_EM = [
    ({"inverse_temperature": -1.0}, "inverse_temperature must be at least 0, got -1.0"),
    (
        {"inverse_temperature": np.ones(2)},
        r"inverse_temperature must be a number or have shape \[T\] = \(3,\), got \(2,\)",
    ),
    ({"min_variance": 0}, "min_variance must be a number above 0, got 0"),
]
WRONG_VB = [
    ({"kappa0": -1.0}, "kappa0 must be a number above 0, got -1.0"),
    ({"nu0": 15}, "nu0 must be a number above 15, got 15"),
]


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [("em_routing", *case) for case in WRONG + WRONG_EM]
    + [("variational_bayes_routing", *case) for case in WRONG + WRONG_VB],
)
def test_wrong_arguments_are_refused_in_one_sentence(name, changes, message):
    with pytest.raises(ValueError, match=f"^{name}: ({message})") as error:
        getattr(capsjax, name)(**OK | changes)
    assert "\n" not in str(error.value)
