"""Equivariance measures of vectors along a sweep of an image transformation.

Shape letters: S steps of a sweep, evenly spaced; N examples; D dimensions of a vector; n and m
training and test examples of a regression; P penalties; R principal components.
"""

from collections.abc import Callable

import numpy as np

from experiments.figures.poses import SweepCurves

_FOLDS = 4
# Ridge penalties in units of the mean variance of a dimension, selected by cross-validation.
_PENALTIES = np.array([1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0])


def measure_sweep(
    original: np.ndarray,
    swept: np.ndarray,
    values: np.ndarray,
    classes: np.ndarray,
    *,
    dimensions: int,
    seed: int,
) -> tuple[dict[str, float], SweepCurves]:
    """Measure length stability, direction smoothness and decodability along a sweep.

    Args:
      original: Vectors of the untransformed examples, `[N, D]`.
      swept: Vectors of the transformed examples, `[S, N, D]`.
      values: The transformation's parameter at each step, `[S]`.
      classes: Classes of the examples, `[N]`.
      dimensions: Number of principal components R for `decodability_reduced`.
      seed: Seed of the `_shuffled` controls, in which each example's steps are in random order.

    Returns:
      The measures and their controls by name, and the curves of all examples.
    """
    shuffled = _shuffle_steps(swept, seed=seed)
    decoded = decode(swept, values, classes)
    reduced = _principal_components(swept, dimensions, classes)
    measures = {
        "length_stability": length_stability(swept),
        "direction_smoothness": direction_smoothness(swept),
        "direction_smoothness_shuffled": direction_smoothness(shuffled),
        "decodability": decodability(decoded, values, classes),
        "decodability_shuffled": decodability(decode(shuffled, values, classes), values, classes),
        "decodability_reduced": decodability(decode(reduced, values, classes), values, classes),
    }
    lengths, original_lengths = (np.linalg.norm(x, axis=-1) for x in (swept, original))
    divisors = np.where(original_lengths > 0, original_lengths, 1)
    products = np.where(lengths > 0, lengths, 1) * divisors
    cosines = np.einsum("snd,nd->sn", swept, original) / products
    angles = np.degrees(np.arccos(cosines.clip(-1, 1)))
    return measures, SweepCurves(lengths / divisors, angles, decoded)


def length_stability(vectors: np.ndarray) -> float:
    """Return the shortest length over the longest along the sweep, averaged over examples.

    1 means constant length. A ratio makes capsules comparable with CNN features, whose scale is
    arbitrary. A vector that is zero at all steps counts as 0.

    Args:
      vectors: `[S, N, D]`.
    """
    lengths = np.linalg.norm(vectors, axis=-1)
    longest = lengths.max(0)
    return float(np.mean(lengths.min(0) / np.where(longest > 0, longest, 1)))


def direction_smoothness(vectors: np.ndarray) -> float:
    """Return how smoothly unit vectors move along the sweep: 1 for straight, 0 for random order.

    With f and s the mean squares of the first and second differences of the unit vectors, this is
    1 − s / (3 f). In random order, |a − 2b + c|² is three times |a − b|² in expectation, which
    gives 0; jumps and zigzags give low or negative values, a gentle curve one near 1. Constant
    directions count as 0.

    Args:
      vectors: `[S, N, D]`.
    """
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    directions = vectors / np.where(lengths > 0, lengths, 1)
    first, second = (np.mean(np.square(np.diff(directions, k, axis=0))) for k in (1, 2))
    return float(1 - second / (3 * first)) if first > 0 else 0.0


def _shuffle_steps(vectors: np.ndarray, *, seed: int) -> np.ndarray:
    """Permute the steps of vectors `[S, N, D]`, independently for each example."""
    size = vectors.shape[:2]
    # Raw bits of Philox are stable between versions of NumPy; `Generator`'s numbers are not.
    bits = np.random.Philox(key=np.array([seed, 0], np.uint64)).random_raw(size)
    return np.take_along_axis(vectors, np.argsort(bits, 0, kind="stable")[..., None], 0)


def decode(vectors: np.ndarray, values: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Predict the transformation's parameter from vectors by ridge regression, class by class.

    Predictions are two-fold cross-validated: the regression for one half of a class is fitted to
    all steps of the other half, with a penalty that is itself selected by cross-validation there.

    Args:
      vectors: `[S, N, D]`.
      values: The parameter at each step, `[S]`.
      classes: Classes of the examples, `[N]`, each with at least 2 examples.

    Returns:
      Predicted parameters, `[S, N]`.
    """
    result = np.empty(vectors.shape[:2])
    for label in np.unique(classes):
        members = np.flatnonzero(classes == label)
        for half in (0, 1):
            test, train = members[half::2], members[1 - half :: 2]
            result[:, test] = _ridge_predict(vectors[:, train], values, vectors[:, test])
    return result


def decodability(decoded: np.ndarray, values: np.ndarray, classes: np.ndarray) -> float:
    """Return the coefficient of determination R² of `decode`, averaged over classes.

    Args:
      decoded: Predicted parameters, `[S, N]`.
      values: True parameters, `[S]`.
      classes: Classes of the examples, `[N]`.
    """
    errors = np.square(decoded - values[:, None]).mean(0)
    variance = np.mean(np.square(values - values.mean()))
    return float(np.mean([1 - errors[classes == k].mean() / variance for k in np.unique(classes)]))


def _principal_components(vectors: np.ndarray, dimensions: int, classes: np.ndarray) -> np.ndarray:
    """Project vectors onto the first principal components of their class, `[S, N, R]`.

    R is `dimensions`, at most D: CNN features are compared with capsules at equal dimension.
    """
    rank = min(dimensions, vectors.shape[-1])
    result = np.empty((*vectors.shape[:2], rank))
    for label in np.unique(classes):
        members = vectors[:, classes == label]
        centred = members - members.mean((0, 1))
        _, axes = np.linalg.eigh(np.einsum("snd,sne->de", centred, centred))
        result[:, classes == label] = centred @ axes[:, ::-1][:, :rank]
    return result


def _ridge_predict(vectors: np.ndarray, values: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Fit training vectors `[S, n, D]` and predict test vectors `[S, m, D]`: `[S, m]`."""
    folds = np.arange(vectors.shape[1]) % min(_FOLDS, vectors.shape[1])
    penalty = _PENALTIES[-1]
    if folds.any():
        errors = np.zeros(len(_PENALTIES))
        for fold in range(folds.max() + 1):
            predict = _ridge_predictor(vectors[:, folds != fold], values, vectors[:, folds == fold])
            errors += np.square(predict(_PENALTIES) - values[:, None]).sum((1, 2))
        penalty = _PENALTIES[errors.argmin()]
    return _ridge_predictor(vectors, values, test)(np.array([penalty]))[0]


def _ridge_predictor(
    vectors: np.ndarray, values: np.ndarray, test: np.ndarray
) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function from ridge penalties `[P]` to predictions `[P, S, m]` for `test`."""
    S, n, D = vectors.shape
    mean = vectors.mean((0, 1))
    # One scale for all dimensions, because scaling each by its own standard deviation would amplify
    # hidden units that are almost never active in the training half.
    scale = np.sqrt(np.mean(np.square(vectors - mean))) or 1
    inputs = ((vectors - mean) / scale).reshape(S * n, D)
    gram = inputs.T @ inputs / len(inputs)
    target = inputs.T @ np.repeat(values - values.mean(), n) / len(inputs)
    test_inputs = (test - mean) / scale

    def predict(penalties: np.ndarray) -> np.ndarray:
        weights = [np.linalg.solve(gram + penalty * np.eye(D), target) for penalty in penalties]
        return np.einsum("smd,pd->psm", test_inputs, weights) + values.mean()

    return predict
