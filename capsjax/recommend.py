"""Multi-interest recommendation: several vectors a user, extracted from the items of a history.

Input capsules are items, output capsules are interests. Four published layers, each as one call:

    # MIND in DeepMatch, weights [P, D]
    multi_interests(items, weights, max_interests=J, num_interests=n, mask=mask, key=key)
    # ComiRec-DR, weights [I, P, J, D]
    multi_interests(items, weights, mask=mask)
    # EasyRec, weights [P, D]
    multi_interests(items, weights, routing="kmeans", max_interests=J, num_interests=n, mask=mask,
                    key=key)
    # TorchEasyRec, weights [P, D]
    multi_interests(items, weights, routing="kmeans", carry_couplings=True, max_interests=J,
                    num_interests=n, mask=mask, key=key)

Here n is `count_interests(lengths, J, formula=...)`, with the formula of the same library.
ComiRec-SA is `self_attentive_interests`; `label_aware_attention` is the readout while training.
"""

from decimal import Decimal, localcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from capsjax import shapes
from capsjax.kernels.dtypes import accumulation_dtype
from capsjax.kernels.vote_passes.passes import Implementation
from capsjax.routing import _arguments
from capsjax.routing.dynamic import dynamic_routing
from capsjax.routing.kmeans import kmeans_routing

ROUTINGS = ("dynamic", "kmeans")
FORMULAS = ("mind", "deepmatch", "torcheasyrec", "easyrec")
# The default of EasyRec and TorchEasyRec.
TEMPERATURE = 20.0


def multi_interests(
    items: Array,
    weights: Array,
    *,
    max_interests: int | None = None,
    num_interests: Array | int | None = None,
    mask: Array | None = None,
    key: Array | None = None,
    initial_logits: Array | None = None,
    routing: str = "dynamic",
    num_iterations: int = 3,
    temperature: float | Array | None = None,
    squash_power: float | None = None,
    carry_couplings: bool = False,
    gradient: str = "last",
    implementation: str | Implementation | None = None,
) -> Array:
    """Extract the interests of a user from a history of items, by routing.

    Item i votes `items[i] @ weights` for each interest. Interests compete for an item: its
    couplings, a softmax over the user's interests, sum to 1.

    `"dynamic"` is `dynamic_routing`, the behaviour-to-interest routing of MIND and ComiRec-DR.
    `"kmeans"` is `kmeans_routing` by cosine, the layer of EasyRec and TorchEasyRec. With weights
    `[P, D]` all votes of an item are equal, and only the initial logits distinguish interests.

    The result has no hidden randomness: the same key gives the same interests. Keep the key with
    the parameters and serve with it. (The libraries draw logits anew for each example and at each
    call; for that pass `initial_logits` `[..., I, J]`.)

    Sources: Li et al., "Multi-Interest Network with Dynamic Routing for Recommendation at Tmall",
    section 3.3, https://arxiv.org/abs/1904.08030; Cen et al., "Controllable Multi-Interest
    Framework for Recommendation", section 3.2, https://arxiv.org/abs/2005.09347; the layers of
    https://github.com/alibaba/EasyRec and https://github.com/alibaba/TorchEasyRec.

    Args:
      items: `[..., I, P]`, floating.
      weights: `[P, D]`, one matrix for all, in the dtype of `items`; or `[P, J, D]`, one of each
        interest; or `[I, P, J, D]`, one of each position and interest.
      max_interests: J, for weights `[P, D]` only.
      num_interests: Integers `[...]`, or one for all users; interests from this number on are 0,
        and the others as if they were absent. None for J.
      mask: Booleans `[I]` or `[..., I]`; items at False, such as padding, are ignored.
      key: Of `jax.random`; draws initial logits `[I, J]` from a standard normal distribution, times
        `temperature` if `carry_couplings`. All users share them. Those of position i do not depend
        on I, so that padding at the end changes nothing, nor on the dtype.
      initial_logits: Logits of the first iteration, `[I, J]` or `[..., I, J]`, instead of a key.
        Later iterations add to them if `"dynamic"`, and replace them if `"kmeans"`.
      routing: `"dynamic"` or `"kmeans"`.
      num_iterations: T, at least 1.
      temperature: Factor of the cosines, for `"kmeans"` only; None for 20.
      squash_power: As in `kmeans_routing`, for `"kmeans"` only; None for 1.
      carry_couplings: Whether logits are those of TorchEasyRec, for `"kmeans"` only: the couplings
        of the iteration before plus the products of sums and unit votes, times `temperature`.
      gradient: `"last"`, with the last couplings constant, as in all four libraries; or `"full"`.
      implementation: As in `dynamic_routing`.

    Returns:
      Interests `[..., J, D]`, in the dtype of `items`; all 0 for a user without items.

    Raises:
      ValueError: A shape or setting is wrong, nothing distinguishes interests that share weights,
        or an argument has no effect on the routing; at lowering, the named implementation runs on
        another platform.
      TypeError: A dtype is wrong.
      Unsupported: At lowering, the named implementation does not accept the arguments.

    Example:
      A history of 3 items, padded to 5, and at most 4 interests:

      >>> items, weights = jnp.linspace(-1.0, 1.0, 30).reshape(1, 5, 6), jnp.eye(6)
      >>> lengths = jnp.array([3])
      >>> interests = multi_interests(
      ...     items,
      ...     weights,
      ...     max_interests=4,
      ...     num_interests=count_interests(lengths, 4, formula="deepmatch"),
      ...     mask=jnp.arange(5)[None] < lengths[:, None],
      ...     key=jax.random.key(0),
      ... )
      >>> interests.shape, jnp.any(interests != 0, axis=-1).tolist()
      ((1, 4, 6), [[True, True, False, False]])
    """
    name = "multi_interests"
    shapes.check_choice(name, "routing", routing, ROUTINGS)
    num_iterations = _arguments.check_settings(name, num_iterations, gradient, None)
    items, mask = _checked_items(name, items, mask)
    weights = shapes.as_array(name, "weights", weights)
    shapes.check_floating(name, items=items, weights=weights)
    parents = _checked_parents(items, weights, max_interests)
    if routing == "dynamic":
        given = {
            "temperature": temperature is not None,
            "squash_power": squash_power is not None,
            "carry_couplings": carry_couplings,
        }
        for argument, is_given in given.items():
            if is_given:
                raise ValueError(
                    f"{name}: {argument} must not be given unless routing is 'kmeans', since "
                    f"dynamic routing has none, got routing {routing!r}"
                )
    temperature = shapes.as_array(
        name, "temperature", TEMPERATURE if temperature is None else temperature
    )
    shapes.check_number_dtype(name, "temperature", temperature)
    if temperature.ndim > 0:
        raise ValueError(
            f"{name}: temperature must be a number, got an array of shape {temperature.shape}"
        )
    if squash_power is not None:
        shapes.check_positive_number(name, "squash_power", squash_power)
    if carry_couplings and gradient != "last":
        raise ValueError(
            f"{name}: carry_couplings must be False unless gradient is 'last', because no gradient "
            f"flows through couplings that are carried, got gradient {gradient!r}"
        )
    logits = _initial_logits(items, weights, parents, key, initial_logits)
    if logits is not None and key is not None and carry_couplings:
        logits = logits * temperature.astype(logits.dtype)
    num_interests = _checked_number(name, num_interests, items.shape[:-2])
    settings: dict[str, Any] = {
        "num_iterations": num_iterations,
        "mask": mask,
        "parent_mask": None if num_interests is None else _first(num_interests, parents),
        "gradient": gradient,
        "implementation": _arguments.check_implementation(name, implementation),
    }
    if routing == "dynamic":
        return dynamic_routing(items, weights, prior=logits, **settings)
    return kmeans_routing(
        items,
        weights,
        similarity="cosine",
        temperature=temperature,
        initial_logits=logits,
        unit_means=not carry_couplings,
        carry_couplings=carry_couplings,
        squash_power=1.0 if squash_power is None else squash_power,
        **settings,
    )


def self_attentive_interests(
    items: Array,
    hidden_weights: Array,
    query_weights: Array,
    *,
    hidden_bias: Array | None = None,
    position_embeddings: Array | None = None,
    mask: Array | None = None,
    num_interests: Array | int | None = None,
) -> Array:
    """Extract the interests of a user from a history of items, by self-attention (ComiRec-SA).

    Interest j is the mean of the items, weighted by a softmax over them of
    `query_weights[:, j] · tanh(items[i] @ hidden_weights)`. Items compete within an interest;
    interests do not compete for an item.

    A bias of the queries, which ComiRec's code has, adds the same to each logit of a softmax: it
    changes nothing, and is no argument here.

    Source: Cen et al., "Controllable Multi-Interest Framework for Recommendation", section 3.2,
    https://arxiv.org/abs/2005.09347, with `hidden_bias` and `position_embeddings` of its code,
    https://github.com/THUDM/ComiRec.

    Args:
      items: `[..., I, P]`, floating. Sums are accumulated in float32 at least.
      hidden_weights: `[P, N]`, in the dtype of `items`.
      query_weights: `[N, J]`, in the dtype of `items`.
      hidden_bias: `[N]`, added before the tanh.
      position_embeddings: `[I, P]`, added to the items in the logits, but not in the weighted mean.
      mask: Booleans `[I]` or `[..., I]`; items at False, such as padding, are ignored.
      num_interests: Integers `[...]`, or one for all users; interests from this number on are 0.

    Returns:
      Interests `[..., J, P]`, in the dtype of `items`; all 0 for a user without items.

    Raises:
      ValueError: A shape is wrong.
      TypeError: A dtype is wrong.

    Example:
      >>> items, mask = jnp.array([[1.0, 2.0], [3.0, 4.0], [jnp.nan, 0.0]]), [True, True, False]
      >>> self_attentive_interests(items, jnp.zeros((2, 8)), jnp.zeros((8, 2)), mask=mask)
      Array([[2., 3.],
             [2., 3.]], dtype=float32)
    """
    name = "self_attentive_interests"
    items, mask = _checked_items(name, items, mask)
    hidden_weights = shapes.as_array(name, "hidden_weights", hidden_weights)
    query_weights = shapes.as_array(name, "query_weights", query_weights)
    shapes.check_floating(
        name, items=items, hidden_weights=hidden_weights, query_weights=query_weights
    )
    children, length = items.shape[-2:]
    shapes.check_shape(name, "hidden_weights", hidden_weights, "[P, N]", (length, None))
    hidden = hidden_weights.shape[1]
    shapes.check_shape(name, "query_weights", query_weights, "[N, J]", (hidden, None))
    hidden_bias = _arguments.check_parameter(
        name, "hidden_bias", hidden_bias, "[N]", (hidden,), items
    )
    position_embeddings = _arguments.check_parameter(
        name, "position_embeddings", position_embeddings, "[I, P]", (children, length), items
    )
    num_interests = _checked_number(name, num_interests, items.shape[:-2])
    wide = accumulation_dtype(items.dtype)
    if num_interests is not None:
        known = _first(num_interests, query_weights.shape[1])
        known = _arguments.any_example(known.reshape(-1, known.shape[-1]))
        query_weights = jnp.where(known[None], query_weights, 0)
    kept = None if mask is None else jnp.broadcast_to(mask, items.shape[:-1])[..., None]
    if kept is not None:
        items = jnp.where(kept, items, 0)
    placed = items
    if position_embeddings is not None:
        placed = items + _with_leading(position_embeddings.astype(items.dtype), items.ndim)
        placed = placed if kept is None else jnp.where(kept, placed, 0)
    sums = jnp.matmul(placed, hidden_weights, preferred_element_type=wide)
    if hidden_bias is not None:
        sums = sums + _with_leading(hidden_bias.astype(wide), sums.ndim)
    logits = jnp.matmul(
        jnp.tanh(sums).astype(items.dtype), query_weights, preferred_element_type=wide
    )
    attention = _softmax(logits, kept, axis=-2).astype(items.dtype)
    interests = jnp.einsum("...ij,...ip->...jp", attention, items, preferred_element_type=wide)
    if num_interests is not None:
        interests = jnp.where(_first(num_interests, interests.shape[-2])[..., None], interests, 0)
    return interests.astype(items.dtype)


def label_aware_attention(
    interests: Array,
    target: Array,
    *,
    power: float = 1.0,
    num_interests: Array | int | None = None,
) -> Array:
    """Read out the interests of a user for one target item, which is known while training.

    The result is the mean of the interests, weighted by a softmax over them of
    `(interests[j] · target)^power`. At infinity it is the interest with the largest product, the
    first one of equal ones, as ComiRec picks it.

    A negative product x counts as -|x|^power, so that more agreement never weighs less. This is
    x^power for odd powers. DeepMatch computes `tf.pow(x, power)`, which for even powers weighs
    opposed interests like agreeing ones, and is NaN for other powers than integers; for products
    of at least 0 both are equal.

    Source: Li et al., "Multi-Interest Network with Dynamic Routing for Recommendation at Tmall",
    section 3.4, https://arxiv.org/abs/1904.08030.

    Args:
      interests: `[..., J, D]`, floating. Sums are accumulated in float32 at least.
      target: `[..., D]`, in the dtype of `interests`.
      power: A number above 0, or infinity. Powers of products are limited to the square root of
        the accumulation dtype's largest number, where a softmax is a choice of one anyway.
      num_interests: Integers `[...]`, or one for all users; interests from this number on are
        ignored. None for J.

    Returns:
      User vectors `[..., D]`, in the dtype of `interests`; 0 for a user without interests.

    Raises:
      ValueError: A shape or the power is wrong.
      TypeError: A dtype is wrong.

    Example:
      >>> interests, target = jnp.array([[3.0, 0.0], [0.0, 1.0]]), jnp.array([1.0, 2.0])
      >>> label_aware_attention(interests, target, power=float("inf"))
      Array([3., 0.], dtype=float32)
      >>> [round(float(x), 3) for x in label_aware_attention(interests, target)]
      [2.193, 0.269]
    """
    name = "label_aware_attention"
    interests = shapes.as_array(name, "interests", interests)
    target = shapes.as_array(name, "target", target)
    shapes.check_floating(name, interests=interests, target=target)
    leading = interests.shape[:-2]
    shapes.check_shape(name, "interests", interests, "[..., J, D]", (*leading, None, None))
    shapes.check_shape(name, "target", target, "[..., D]", (*leading, interests.shape[-1]))
    power = _checked_power(name, power)
    num_interests = _checked_number(name, num_interests, leading)
    parents, wide = interests.shape[-2], accumulation_dtype(interests.dtype)
    kept = None
    if num_interests is not None:
        kept = jnp.broadcast_to(_first(num_interests, parents), interests.shape[:-1])
        interests = jnp.where(kept[..., None], interests, 0)
    scores = jnp.einsum("...jd,...d->...j", interests, target, preferred_element_type=wide)
    if power == np.inf:
        known = scores if kept is None else jnp.where(kept, scores, -jnp.inf)
        attention = jax.nn.one_hot(jnp.argmax(known, -1), parents, dtype=interests.dtype)
    else:
        logits = scores if power == 1 else _signed_power(scores, power)
        attention = _softmax(logits, kept, axis=-1).astype(interests.dtype)
    read = jnp.einsum("...j,...jd->...d", attention, interests, preferred_element_type=wide)
    return read.astype(interests.dtype)


def count_interests(lengths: Array, max_interests: int, *, formula: str) -> Array:
    """Compute how many interests a user has, from the number of items in the history.

    Four formulas are in use under one name; all are at least 1 and at most `max_interests`:

    - `"mind"`: floor(log2 L), of the paper of MIND;
    - `"deepmatch"`: floor(log2(L + 1)), of DeepMatch;
    - `"torcheasyrec"`: ceil(log2 L), which TorchEasyRec's comparison with log2 L amounts to;
    - `"easyrec"`: floor(ln L), of EasyRec.

    Lengths are compared with integers, so that no logarithm is rounded to the wrong side.

    Source: Li et al., "Multi-Interest Network with Dynamic Routing for Recommendation at Tmall",
    section 3.3, https://arxiv.org/abs/1904.08030, and the three libraries' code.

    Args:
      lengths: Integers `[...]`, L.
      max_interests: J, at least 1.
      formula: One of the names above.

    Returns:
      `[...]`, int32.

    Raises:
      ValueError: `max_interests` or the formula is wrong.
      TypeError: The lengths are not integers.

    Example:
      >>> lengths = jnp.array([0, 1, 50])
      >>> for formula in ("mind", "deepmatch", "torcheasyrec", "easyrec"):
      ...     print(count_interests(lengths, 8, formula=formula))
      [1 1 5]
      [1 1 5]
      [1 1 6]
      [1 1 3]
    """
    name = "count_interests"
    shapes.check_choice(name, "formula", formula, FORMULAS)
    max_interests = shapes.check_positive(name, "max_interests", max_interests)
    lengths = shapes.as_array(name, "lengths", lengths)
    _check_integers(name, "lengths", lengths)
    largest = int(jnp.iinfo(lengths.dtype).max)
    bounds = [
        bound for k in range(2, max_interests + 1) if (bound := _least(formula, k)) <= largest
    ]
    thresholds = _with_leading(jnp.asarray(bounds, lengths.dtype), lengths.ndim + 1)
    return 1 + jnp.sum(lengths[..., None] >= thresholds, -1, dtype=jnp.int32)


def _least(formula: str, interests: int) -> int:
    """Return the least number of items with which a formula gives so many interests, 2 or more."""
    if formula == "easyrec":
        with localcontext() as context:
            # e^k is no integer; its digits before the point, and some after it, are right.
            context.prec = interests + 20
            return int(Decimal(interests).exp()) + 1
    if formula == "torcheasyrec":
        return 2 ** (interests - 1) + 1
    return 2**interests - (formula == "deepmatch")


def _checked_items(function: str, items: Any, mask: Any) -> tuple[Array, Array | None]:
    """Check items `[..., I, P]` and their mask."""
    items = shapes.as_array(function, "items", items)
    shapes.check_floating(function, items=items)
    leading = items.shape[:-2]
    shapes.check_shape(function, "items", items, "[..., I, P]", (*leading, None, None))
    return items, _arguments.check_mask(function, "mask", mask, "I", items.shape[:-1], 1)


def _checked_parents(items: Array, weights: Array, max_interests: int | None) -> int:
    """Check the weights, and return J."""
    name = "multi_interests"
    children, length = items.shape[-2:]
    known = {
        2: ("[P, D]", (length, None)),
        3: ("[P, J, D]", (length, None, None)),
        4: ("[I, P, J, D]", (children, length, None, None)),
    }
    if weights.ndim not in known:
        raise ValueError(
            f"{name}: weights must have shape [P, D], [P, J, D] or [I, P, J, D] with "
            f"I = {children} and P = {length}, got {weights.shape}"
        )
    shapes.check_shape(name, "weights", weights, *known[weights.ndim])
    if weights.ndim == 2:
        if max_interests is None:
            raise ValueError(
                f"{name}: max_interests must be given for weights [P, D], which do not tell J, "
                "got None"
            )
        return shapes.check_positive(name, "max_interests", max_interests)
    if max_interests is not None:
        raise ValueError(
            f"{name}: max_interests must be None for weights {known[weights.ndim][0]}, which have "
            f"J = {weights.shape[-2]}, got {max_interests!r}"
        )
    return weights.shape[-2]


def _initial_logits(
    items: Array, weights: Array, parents: int, key: Any, initial_logits: Any
) -> Array | None:
    """Draw the initial logits, or check those given; without any, parents must differ."""
    name = "multi_interests"
    children, wide = items.shape[-2], accumulation_dtype(items.dtype)
    if key is None and initial_logits is None:
        if weights.ndim == 2:
            raise ValueError(
                f"{name}: key or initial_logits must distinguish interests that share weights "
                "[P, D], which stay equal without them, got None"
            )
        return None
    if initial_logits is None:
        return _random_logits(name, key, children, parents).astype(wide)
    if key is not None:
        raise ValueError(f"{name}: key must be None if initial_logits are given, got both")
    initial_logits = shapes.as_array(name, "initial_logits", initial_logits)
    own = children, parents
    shape = own if initial_logits.ndim == 2 else (*items.shape[:-2], *own)
    return _arguments.check_required(
        name, "initial_logits", initial_logits, "[I, J] or [..., I, J]", shape, items
    )


def _random_logits(function: str, key: Any, children: int, parents: int) -> Array:
    """Draw logits `[I, J]`, in float32, each row from a key of its own position."""
    try:
        seeds = jax.random.bits(key, (2,), jnp.uint32)
    except (TypeError, ValueError):
        raise TypeError(
            f"{function}: key must be one key of jax.random, got {_kind(key)}"
        ) from None
    # Threefry whatever the key's generator: others depend on the number of rows under vmap.
    own = jax.random.wrap_key_data(seeds, impl="threefry2x32")
    rows = jax.vmap(jax.random.fold_in, (None, 0))(own, jnp.arange(children, dtype=jnp.uint32))
    return jax.vmap(lambda row: jax.random.normal(row, (parents,), jnp.float32))(rows)


def _kind(value: Any) -> str:
    shape = getattr(value, "shape", None)
    return f"a {type(value).__name__}" if shape is None else f"an array of shape {shape}"


def _checked_number(function: str, num_interests: Any, leading: tuple[int, ...]) -> Array | None:
    """Check numbers of interests, integers of each example or one for all."""
    if num_interests is None:
        return None
    num_interests = shapes.as_array(function, "num_interests", num_interests)
    _check_integers(function, "num_interests", num_interests)
    if num_interests.shape not in {(), leading}:
        raise ValueError(
            f"{function}: num_interests must be a number or have shape [...] = {leading}, "
            f"got {num_interests.shape}"
        )
    return num_interests


def _check_integers(function: str, name: str, array: Array) -> None:
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"{function}: {name} must be integers, got {array.dtype}")


def _checked_power(function: str, power: Any) -> float:
    if power == np.inf:
        return np.inf
    return shapes.check_positive_number(function, "power", power)


def _first(numbers: Array, parents: int) -> Array:
    """Return the mask `[..., J]` of the first parents, as many as given."""
    return _with_leading(jnp.arange(parents), numbers.ndim + 1) < numbers[..., None]


def _with_leading(x: Array, ndim: int) -> Array:
    """Add leading axes of size 1, up to so many axes in all."""
    return x.reshape((1,) * (ndim - x.ndim) + x.shape)


def _softmax(logits: Array, kept: Array | None, *, axis: int) -> Array:
    """Compute a softmax over the logits that are kept; 0 everywhere if none is."""
    if kept is None:
        return jax.nn.softmax(logits, axis)
    top = jnp.max(jnp.where(kept, logits, -jnp.inf), axis, keepdims=True)
    top = lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0))
    powers = jnp.where(kept, jnp.exp(jnp.where(kept, logits - top, 0)), 0)
    total = jnp.sum(powers, axis, keepdims=True)
    return powers / jnp.where(total > 0, total, 1)


def _signed_power(x: Array, power: float) -> Array:
    """Compute sign(x) |x|^power along the last axis, without overflow; the derivative at 0 is 0."""
    largest = lax.stop_gradient(jnp.max(jnp.abs(x), -1, keepdims=True))
    largest = jnp.where(largest > 0, largest, 1)
    nonzero = x != 0
    relative = jnp.abs(jnp.where(nonzero, x, largest)) / largest
    limit = float(jnp.finfo(x.dtype).max) ** 0.5
    factor = jnp.minimum(largest**power, limit)
    return jnp.where(nonzero, factor * jnp.sign(x) * relative**power, 0)
