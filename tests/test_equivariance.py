"""Equivariance measures of vectors with known motion."""

import numpy as np
import pytest

from experiments.analysis import equivariance

S, N, D = 13, 40, 6
VALUES = np.linspace(-60, 60, S)
CLASSES = np.arange(N) % 4


def arcs(angles):
    """Return unit vectors on great circles, a different one per example, `[S, N, D]`."""
    rng = np.random.default_rng(0)
    planes = np.stack([np.linalg.qr(rng.normal(size=(D, 2)))[0].T for _ in range(N)])
    turns = np.radians(np.broadcast_to(np.asarray(angles, float).reshape(S, -1), (S, N)))
    return np.einsum("ksn,nkd->snd", np.stack([np.cos(turns), np.sin(turns)]), planes)


def noise(seed=1):
    return np.random.default_rng(seed).normal(size=(S, N, D))


def test_length_stability_is_shortest_over_longest_length():
    vectors = arcs(VALUES)
    assert equivariance.length_stability(vectors) == pytest.approx(1)
    shrunk = vectors * np.linspace(1, 0.25, S)[:, None, None]
    shrunk[:, N // 2 :] = vectors[:, N // 2 :] * 7  # scale invariance
    assert equivariance.length_stability(shrunk) == pytest.approx((0.25 + 1) / 2)
    assert equivariance.length_stability(np.zeros((S, N, D))) == 0


def test_steady_rotation_is_smooth_at_any_scale():
    assert equivariance.direction_smoothness(arcs(VALUES)) > 0.98
    assert equivariance.direction_smoothness(arcs(np.linspace(0, 360, S))) > 0.9
    assert equivariance.direction_smoothness(9 * arcs(VALUES)) > 0.98


def test_jumps_and_zigzags_are_not_smooth():
    jump = np.where(np.arange(S) < S // 2, 0, 90)
    # One step among S − 1, two second differences among S − 2.
    expected = 1 - 2 * (S - 1) / (S - 2) / 3
    assert equivariance.direction_smoothness(arcs(jump)) == pytest.approx(expected)
    assert equivariance.direction_smoothness(arcs(np.arange(S) % 2 * 30)) < -0.2
    assert equivariance.direction_smoothness(np.ones((S, N, D))) == 0


def test_random_order_has_smoothness_zero():
    assert abs(equivariance.direction_smoothness(noise())) < 0.1
    vectors = arcs(VALUES)
    shuffled = equivariance._shuffle_steps(vectors, seed=0)
    assert abs(equivariance.direction_smoothness(shuffled)) < 0.1
    # Each example keeps its vectors, in a different order.
    np.testing.assert_array_equal(np.sort(shuffled, 0), np.sort(vectors, 0))
    orders = np.array(
        [[np.where((vectors[:, n] == v).all(1))[0][0] for v in shuffled[:, n]] for n in range(N)]
    )
    assert len(np.unique(orders, axis=0)) == N


def test_linear_dependence_on_the_parameter_is_decoded():
    rng = np.random.default_rng(2)
    slopes = rng.normal(size=(4, D))[CLASSES]
    vectors = VALUES[:, None, None] / 60 * slopes + rng.normal(size=(N, D)) * 0.01
    decoded = equivariance.decode(vectors, VALUES, CLASSES)
    np.testing.assert_allclose(decoded, np.broadcast_to(VALUES[:, None], (S, N)), atol=5)
    assert equivariance.decodability(decoded, VALUES, CLASSES) > 0.99


def test_memorised_training_vectors_do_not_generalise():
    # Enough dimensions to memorise every training vector.
    vectors = np.random.default_rng(3).normal(size=(S, N, 80))
    decoded = equivariance.decode(vectors, VALUES, CLASSES)
    assert -0.5 < equivariance.decodability(decoded, VALUES, CLASSES) < 0.1
    constant = np.broadcast_to(np.random.default_rng(4).normal(size=(N, D)), (S, N, D))
    decoded = equivariance.decode(constant, VALUES, CLASSES)
    assert equivariance.decodability(decoded, VALUES, CLASSES) < 0.01


def test_almost_inactive_units_do_not_disturb_the_regression():
    vectors = np.concatenate([VALUES[:, None, None] / 60 + 0.1 * noise(), np.zeros((S, N, 1))], -1)
    vectors[..., -1] = 1e-6 * np.random.default_rng(7).normal(size=(S, N))
    vectors[:, 3, -1] = 1  # in one example's other half it is noise
    decoded = equivariance.decode(vectors, VALUES, CLASSES)
    assert equivariance.decodability(decoded, VALUES, CLASSES) > 0.9


def test_ridge_regression_equals_least_squares_with_penalty_rows():
    vectors, unknown = noise(5)[:, :8], noise(6)[:, :3]
    middle, scale = vectors.mean((0, 1)), np.sqrt(vectors.reshape(-1, D).var(0).mean())
    known = ((vectors - middle) / scale).reshape(-1, D)
    targets = np.repeat(VALUES - VALUES.mean(), 8)
    rows = np.concatenate([known, np.sqrt(0.1 * len(known)) * np.eye(D)])
    weights = np.linalg.lstsq(rows, np.concatenate([targets, np.zeros(D)]), rcond=None)[0]
    found = equivariance._ridge_predictor(vectors, VALUES, unknown)(np.array([7.0, 0.1]))[1]
    np.testing.assert_allclose(found, (unknown - middle) / scale @ weights + VALUES.mean())


def test_decodability_is_averaged_over_classes():
    decoded = np.broadcast_to(VALUES[:, None], (S, N)).copy()
    decoded[:, CLASSES == 1] = VALUES.mean()
    assert equivariance.decodability(decoded, VALUES, CLASSES) == pytest.approx(3 / 4)


def test_principal_components_are_within_classes():
    vectors = noise() * np.array([5.0, 1, 0.1, 0.1, 4, 0.1]) + 100 * CLASSES[:, None]
    few = equivariance._principal_components(vectors, 2, CLASSES)
    assert few.shape == (S, N, 2)
    assert few[..., 0].std() == pytest.approx(5, rel=0.1)
    assert few[..., 1].std() == pytest.approx(4, rel=0.1)
    whole = equivariance._principal_components(vectors, 99, CLASSES)
    assert whole.shape == (S, N, D)
    distances = [np.linalg.norm(x[1:, 0] - x[0, 0], axis=-1) for x in (vectors, whole)]
    np.testing.assert_allclose(*distances)


def test_measures_have_their_controls():
    vectors = arcs(VALUES) * np.linspace(0.5, 1, N)[:, None]
    original = arcs(np.zeros(S))[0] * np.linspace(0.5, 1, N)[:, None]
    measures, curve = equivariance.measure_sweep(
        original, vectors, VALUES, CLASSES, dimensions=2, seed=0
    )
    assert (
        measures["direction_smoothness"]
        > 0.98
        > 0.1
        > abs(measures["direction_smoothness_shuffled"])
    )
    assert measures["length_stability"] == pytest.approx(1)
    assert measures["decodability_shuffled"] < 0.1
    assert {*measures} == {
        f"{name}{kind}"
        for name, kinds in (
            ("length_stability", [""]),
            ("direction_smoothness", ["", "_shuffled"]),
            ("decodability", ["", "_shuffled", "_reduced"]),
        )
        for kind in kinds
    }
    np.testing.assert_allclose(curve.lengths, 1)
    np.testing.assert_allclose(curve.angles, np.abs(VALUES)[:, None] + np.zeros(N), atol=1e-5)
    assert curve.decoded.shape == (S, N)


def test_zero_vectors_have_finite_measures():
    zero = np.zeros((S, N, D))
    measures, curve = equivariance.measure_sweep(
        zero[0], zero, VALUES, CLASSES, dimensions=2, seed=0
    )
    assert all(np.isfinite(value) for value in measures.values())
    assert all(np.isfinite(part).all() for part in curve)
