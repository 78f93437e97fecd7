"""How a vector behaves while what it describes is moved: three numbers.

Shape letters: S steps of a sweep, evenly spaced; N examples; D dimensions of the vector.
"""

from collections.abc import Callable

import numpy as np

from experiments.figures.poses import Curve

_FOLDS = 4
# Of ridge regression, as shares of a component's mean variance: chosen by cross-validation.
_PENALTIES = np.array([1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0])


def measured(
    still: np.ndarray,
    swept: np.ndarray,
    values: np.ndarray,
    classes: np.ndarray,
    *,
    dimensions: int,
    seed: int,
) -> tuple[dict[str, float], Curve]:
    """The three numbers of a sweep with their controls, and its curves.

    Args:
      still: The vectors of unmoved examples, `[N, D]`.
      swept: Those of moved ones, `[S, N, D]`.
      values: The parameter at each step, `[S]`.
      classes: Of the examples, `[N]`.
      dimensions: To how many principal components `decodability_reduced` is restricted.
      seed: Of the controls, which have every example's steps in random order.
    """
    mixed = _shuffled(swept, seed=seed)
    read = decoded(swept, values, classes)
    few = _reduced(swept, dimensions, classes)
    numbers = {
        "length_stability": length_stability(swept),
        "direction_smoothness": direction_smoothness(swept),
        "direction_smoothness_shuffled": direction_smoothness(mixed),
        "decodability": decodability(read, values, classes),
        "decodability_shuffled": decodability(decoded(mixed, values, classes), values, classes),
        "decodability_reduced": decodability(decoded(few, values, classes), values, classes),
    }
    lengths, unmoved = (np.linalg.norm(x, axis=-1) for x in (swept, still))
    products = np.where(lengths > 0, lengths, 1) * np.where(unmoved > 0, unmoved, 1)
    cosines = np.einsum("snd,nd->sn", swept, still) / products
    curve = Curve(
        lengths / np.where(unmoved > 0, unmoved, 1),
        np.degrees(np.arccos(cosines.clip(-1, 1))),
        read,
    )
    return numbers, curve


def length_stability(vectors: np.ndarray) -> float:
    """The shortest length of a vector in the sweep as a share of its longest; mean over examples.

    1: the length stays. A ratio, because only a capsule's length has a scale of its own. A vector
    that is always zero counts as 0.
    """
    lengths = np.linalg.norm(vectors, axis=-1)
    longest = lengths.max(0)
    return float(np.mean(lengths.min(0) / np.where(longest > 0, longest, 1)))


def direction_smoothness(vectors: np.ndarray) -> float:
    """How evenly directions move: 1 steadily, 0 as if the steps came in random order.

    Of the unit vectors `[S, N, D]`, second differences are compared with first ones (means of
    squares over steps and examples). Both are zero for no motion, and only the second are for a
    steady one; a jump and a zigzag make them large, a gentle bend does not. In random order,
    |a − 2b + c|² is three times |a − b|² in expectation, so 1 − second / (3 first) is 0 then. The
    angle between the ends over the sum of the steps was the alternative: it punishes bends and
    forgives jumps. Directions that do not move at all have no smoothness: 0.
    """
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    directions = vectors / np.where(lengths > 0, lengths, 1)
    first, second = (np.mean(np.square(np.diff(directions, k, axis=0))) for k in (1, 2))
    return float(1 - second / (3 * first)) if first > 0 else 0.0


def _shuffled(vectors: np.ndarray, *, seed: int) -> np.ndarray:
    """The vectors `[S, N, D]`, each example's in a random order of its own: the control."""
    size = vectors.shape[:2]
    # As in data._batches: bits whose meaning does not change between versions of NumPy.
    bits = np.random.Philox(key=np.array([seed, 0], np.uint64)).random_raw(size)
    return np.take_along_axis(vectors, np.argsort(bits, 0, kind="stable")[..., None], 0)


def decoded(vectors: np.ndarray, values: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """The parameter of the sweep as ridge regressions read it from vectors, one for each class.

    Each example is read by a regression on the other half of its class, with all of its steps. The
    penalty is chosen on the training half alone, by cross-validation over its examples.

    Args:
      vectors: `[S, N, D]`.
      values: The parameter at each step, `[S]`.
      classes: `[N]`, with at least 2 examples of each class that occurs.

    Returns:
      `[S, N]`, in units of the values.
    """
    result = np.empty(vectors.shape[:2])
    for label in np.unique(classes):
        members = np.flatnonzero(classes == label)
        for half in (0, 1):
            read, learnt = members[half::2], members[1 - half :: 2]
            result[:, read] = _ridge(vectors[:, learnt], values, vectors[:, read])
    return result


def decodability(read: np.ndarray, values: np.ndarray, classes: np.ndarray) -> float:
    """The share of the parameter's variance that `decoded` explains: R², mean over classes."""
    errors = np.square(read - values[:, None]).mean(0)
    spread = np.mean(np.square(values - values.mean()))
    return float(np.mean([1 - errors[classes == k].mean() / spread for k in np.unique(classes)]))


def _reduced(vectors: np.ndarray, dimensions: int, classes: np.ndarray) -> np.ndarray:
    """The first principal components of each class's vectors, `[S, N, dimensions]` or all.

    For a comparison of what equally many numbers tell. The components are found without looking at
    the parameter.
    """
    kept = min(dimensions, vectors.shape[-1])
    result = np.empty((*vectors.shape[:2], kept))
    for label in np.unique(classes):
        own = vectors[:, classes == label]
        centred = own - own.mean((0, 1))
        _, axes = np.linalg.eigh(np.einsum("snd,sne->de", centred, centred))
        result[:, classes == label] = centred @ axes[:, ::-1][:, :kept]
    return result


def _ridge(vectors: np.ndarray, values: np.ndarray, unknown: np.ndarray) -> np.ndarray:
    """What the vectors `[S, n, D]` with their values say of others, `[S, m]`."""
    folds = np.arange(vectors.shape[1]) % min(_FOLDS, vectors.shape[1])
    penalty = _PENALTIES[-1]
    if folds.any():
        errors = np.zeros(len(_PENALTIES))
        for fold in range(folds.max() + 1):
            found = _fitted(vectors[:, folds != fold], values, vectors[:, folds == fold])
            errors += np.square(found(_PENALTIES) - values[:, None]).sum((1, 2))
        penalty = _PENALTIES[errors.argmin()]
    return _fitted(vectors, values, unknown)(np.array([penalty]))[0]


def _fitted(
    vectors: np.ndarray, values: np.ndarray, unknown: np.ndarray
) -> Callable[[np.ndarray], np.ndarray]:
    """The prediction of a ridge regression as a function of its penalties: `[penalties, S, m]`."""
    S, n, D = vectors.shape
    middle = vectors.mean((0, 1))
    # One scale for all components: one each would blow up a unit that hardly ever acts in training.
    scale = np.sqrt(np.mean(np.square(vectors - middle))) or 1
    known = ((vectors - middle) / scale).reshape(S * n, D)
    gram = known.T @ known / len(known)
    target = known.T @ np.repeat(values - values.mean(), n) / len(known)
    asked = (unknown - middle) / scale

    def predict(penalties: np.ndarray) -> np.ndarray:
        weights = [np.linalg.solve(gram + penalty * np.eye(D), target) for penalty in penalties]
        return np.einsum("smd,pd->psm", asked, weights) + values.mean()

    return predict
