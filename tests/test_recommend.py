"""Multi-interest layers against published numbers, float64 oracles, and their users' complaints."""

import math
import pathlib
import re
from fractions import Fraction
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.test_util import check_grads

import capsjax

pytestmark = pytest.mark.usefixtures("float64", "quick_compilation")

ROOT = pathlib.Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"
B, I, P, J, D = 3, 6, 4, 3, 5  # noqa: E741
LENGTHS = np.array([6, 2, 0])


def normal(*shape, seed=0):
    return np.random.default_rng((seed, *shape)).normal(size=shape)


def before(lengths, size):
    """A mask `[b, size]` of the first positions."""
    return np.arange(size)[None] < np.reshape(lengths, (-1, 1))


def values_and_gradients(function, arrays, cotangent):
    @jax.jit
    def run(*arrays):
        outputs, vjp = jax.vjp(function, *arrays)
        return outputs, vjp(jnp.asarray(cotangent, outputs.dtype))

    return run(*map(jnp.asarray, arrays))


def assert_equal(actual, wanted, **tolerances):
    for a, w in zip(*map(jax.tree.leaves, (actual, wanted)), strict=True):
        np.testing.assert_allclose(a, w, **{"rtol": 1e-10, "atol": 1e-12, **tolerances})


# One call of each library, as the module's docstring writes it. Weights of all positions are those
# of the longest history.


def key():
    return jax.random.key(7)


def deepmatch(items, weights, **settings):
    return capsjax.multi_interests(items, weights, **{"max_interests": J, "key": key(), **settings})


def comirec(items, weights, **settings):
    return capsjax.multi_interests(items, weights[: items.shape[-2]], **settings)


easyrec = partial(deepmatch, routing="kmeans")
torcheasyrec = partial(easyrec, carry_couplings=True)


def comirec_sa(items, weights, **settings):
    hidden, queries, bias, positions = weights
    return capsjax.self_attentive_interests(
        items,
        hidden,
        queries,
        hidden_bias=bias,
        position_embeddings=positions[: items.shape[-2]],
        **settings,
    )


MATRIX = normal(P, D)
ROUTED = {
    "deepmatch": (deepmatch, MATRIX),
    "comirec": (comirec, 0.5 * normal(2 * I, P, J, D)),
    "easyrec": (easyrec, MATRIX),
    "easyrec, soft": (partial(easyrec, temperature=2, squash_power=0.2), MATRIX),
    "torcheasyrec": (torcheasyrec, MATRIX),
    "torcheasyrec, soft": (partial(torcheasyrec, temperature=0.3, squash_power=0.2), MATRIX),
}
ATTENTIVE = normal(P, 7), normal(7, J), normal(7), normal(2 * I, P)
CALLS = {**ROUTED, "comirec_sa": (comirec_sa, ATTENTIVE)}
LIBRARIES = [name for name in CALLS if name not in ("easyrec, soft", "torcheasyrec, soft")]
every_call = pytest.mark.parametrize("name", CALLS)


def output_shape(name):
    return B, J, P if name == "comirec_sa" else D


# Numbers that the libraries themselves, and independent programs, compute. `max_interests` is the
# number of columns of the weights' logits; the squash of MIND's programs adds 1e-9 to a square.

MIND = {"tolerance": 1e-8}
KMEANS = {"tolerance": 1e-10, "routing": "kmeans"}
TORCHEASYREC = {**KMEANS, "carry_couplings": True}


def programs(**settings):
    """Names of the arrays in a file of a library's own program."""
    names = {"items": "in_x", "weights": "w", "outputs": "out", "cotangent": "ct"}
    return {**names, "d_items": "grad_x", "d_weights": "grad_w", **settings}


FILES = {
    "mind_deepmatch": {**MIND, "logits": lambda f: f["noise"]},
    "mind_comirec_dr": {**MIND, "logits": lambda f: None},
    "mind_easyrec": {**KMEANS, "logits": lambda f: f["noise"]},
    "mind_easyrec_soft": {**KMEANS, "logits": lambda f: f["noise"]},
    "mind_torcheasyrec": {**TORCHEASYREC, "logits": lambda f: f["scale"] * f["noise"]},
    "deepmatch_mind_it1": programs(
        **MIND, weights="w_S", d_weights="grad_S", logits=lambda f: f["in_init_logits"][..., 0]
    ),
    "deepmatch_mind_it3": programs(
        **MIND, weights="w_S", d_weights="grad_S", logits=lambda f: f["in_init_logits"][..., 0]
    ),
    "comirec_bilinear0": programs(**MIND, logits=lambda f: f["in_init_logits"].swapaxes(1, 2)),
    "torcheasyrec_normal_it1": programs(
        **TORCHEASYREC,
        weights="w_bilinear_matrix",
        d_weights="grad_bilinear_matrix",
        squash_power=2.0,
        temperature=1.0,
        logits=lambda f: f["in_init_logits"],
    ),
    "torcheasyrec_normal_it3": programs(
        **TORCHEASYREC,
        weights="w_bilinear_matrix",
        d_weights="grad_bilinear_matrix",
        logits=lambda f: 20 * f["in_init_logits"],
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_one_call_gives_the_values_and_gradients_of_the_library(name):
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        file = dict(arrays)
    own = {
        "items": "poses",
        "weights": "weights",
        "outputs": "outputs",
        "cotangent": "cotangent",
        "d_items": "d_poses",
        "d_weights": "d_weights",
        **FILES[name],
    }
    tolerance, logits = own.pop("tolerance"), own.pop("logits")(file)
    names = ("items", "weights", "outputs", "cotangent", "d_items", "d_weights")
    found = {argument: file[own.pop(argument)] for argument in names}
    items, weights, outputs, cotangent, *gradients = found.values()
    mask = file.get("in_mask")
    if mask is None:
        lengths = file["lengths"] if "lengths" in file else file["in_seq_len"]
        mask = before(lengths, items.shape[1])
    number = file.get("interests")
    if "out_capsule_mask" in file:
        number = file["out_capsule_mask"].sum(1)
    if "scale" in file:
        own["temperature"] = file["scale"]
    if weights.ndim == 2:
        own |= {"max_interests": outputs.shape[1], "initial_logits": logits}
    function = partial(
        capsjax.multi_interests,
        num_iterations=1 if name.endswith("it1") else 3,
        mask=mask > 0,
        num_interests=None if number is None else number.astype(int),
        **own,
    )
    computed, computed_gradients = values_and_gradients(function, (items, weights), cotangent)
    results = zip((computed, *computed_gradients), (outputs, *gradients), strict=True)
    for result, wanted in results:
        assert result.dtype == jnp.float64
        assert np.abs(result - wanted).max() <= tolerance * np.abs(wanted).max()


# Oracles in NumPy.


def attentive_oracle(items, weights, mask, number):
    """ComiRec-SA, a user, an interest and an item at a time."""
    hidden, queries, bias, positions = weights
    outputs = np.zeros((len(items), queries.shape[1], items.shape[2]))
    for b, j in np.ndindex(outputs.shape[:2]):
        real = [i for i in range(items.shape[1]) if mask[b, i]]
        if j >= number[b] or not real:
            continue
        logits = [
            queries[:, j] @ np.tanh(hidden.T @ (items[b, i] + positions[i]) + bias) for i in real
        ]
        weight = np.exp(logits)
        outputs[b, j] = sum(w * items[b, i] for w, i in zip(weight, real, strict=True))
        outputs[b, j] /= weight.sum()
    return outputs


def test_self_attention_matches_the_oracle():
    items, mask, number = normal(B, I, P), before(LENGTHS, I), np.array([3, 2, 1])
    found = comirec_sa(items, ATTENTIVE, mask=mask, num_interests=number)
    assert_equal(found, attentive_oracle(items, ATTENTIVE, mask, number))
    everything = np.ones((B, I), bool)
    found = capsjax.self_attentive_interests(items, *ATTENTIVE[:2])
    without = *ATTENTIVE[:2], np.zeros(7), np.zeros((2 * I, P))
    assert_equal(found, attentive_oracle(items, without, everything, [J] * B))


def test_positions_weigh_items_and_are_not_averaged():
    items = np.ones((I, P))
    assert_equal(comirec_sa(items, ATTENTIVE), np.ones((J, P)))


def label_oracle(interests, target, power, number):
    """MIND's readout, a user at a time; scores keep their sign."""
    outputs = np.zeros(target.shape)
    for b, count in enumerate(number):
        real = interests[b, :count]
        scores = real @ target[b]
        if power == np.inf and count:
            outputs[b] = real[np.argmax(scores)]
        elif count:
            weight = np.exp(np.sign(scores) * np.abs(scores) ** power)
            outputs[b] = weight @ real / weight.sum()
    return outputs


POWERS = [1.0, 0.5, 2.0, 2.5, 3, float("inf")]


@pytest.mark.parametrize("power", POWERS)
def test_label_aware_attention_matches_the_oracle(power):
    interests, target, number = normal(B, J, D), normal(B, D, seed=1), np.array([3, 2, 0])
    scores = np.einsum("bjd,bd->bj", interests, target)
    assert (scores < 0).any()
    assert (scores > 0).any()
    found = capsjax.label_aware_attention(interests, target, power=power, num_interests=number)
    assert_equal(found, label_oracle(interests, target, power, number))
    found = capsjax.label_aware_attention(interests, target, power=power)
    assert_equal(found, label_oracle(interests, target, power, [J] * B))


@pytest.mark.parametrize("power", POWERS)
def test_gradients_of_label_aware_attention_are_derivatives(power):
    interests, target = normal(B, J, D), normal(B, D, seed=1)
    read = partial(capsjax.label_aware_attention, power=power, num_interests=np.array([3, 2, 0]))
    check_grads(read, (interests, target), order=1, modes=("fwd", "rev"))


@pytest.mark.parametrize("power", [1, 2, 3])
def test_label_aware_attention_is_deepmatchs_for_agreeing_interests(power):
    interests, target = np.abs(normal(B, J, D)), np.abs(normal(B, D))
    weight = jax.nn.softmax(jnp.einsum("bjd,bd->bj", interests, target) ** power)
    found = capsjax.label_aware_attention(interests, target, power=power)
    assert_equal(found, jnp.einsum("bj,bjd->bd", weight, interests))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("power", [30.0, 1000.0])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_large_powers_neither_overflow_nor_differ_from_a_hard_choice(scale, power, dtype):
    interests, target = scale * normal(B, J, D), normal(B, D, seed=1)
    target[1] = -target[1] * (interests[1] @ target[1]).max()  # all products may be negative
    interests, target = (jnp.asarray(x, dtype) for x in (interests, target))
    read = partial(capsjax.label_aware_attention, power=power)
    found, gradients = values_and_gradients(read, (interests, target), np.ones((B, D)))
    assert found.dtype == dtype
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in (found, *gradients))
    hard = capsjax.label_aware_attention(interests, target, power=float("inf"))
    products = jnp.einsum("bjd,bd->bj", interests, target, preferred_element_type="float32")
    two, one = jnp.sort(products)[:, -2:].T
    # A product above 1 that is a tenth above the others has all the weight.
    clear = np.asarray((one > 1.5) & (one > 1.1 * two))
    assert (scale < 1) or clear.any()
    assert_equal(found[clear].astype("float64"), hard[clear].astype("float64"), rtol=1e-2)


def test_a_hard_choice_takes_the_first_of_equal_interests_and_trains_it_alone():
    interests = np.array([[0.0, 1.0], [2.0, 0.0], [2.0, 5.0]])
    read = partial(capsjax.label_aware_attention, power=float("inf"))
    found, (d_interests, d_target) = values_and_gradients(
        read, (interests, np.array([1.0, 0.0])), np.array([3.0, 4.0])
    )
    assert_equal(found, interests[1])
    assert_equal(d_interests, np.array([[0, 0], [3, 4], [0, 0]]))
    assert not np.any(d_target)


@pytest.mark.parametrize("power", [1.0, 2.5, float("inf")])
def test_an_absent_interest_does_not_win_where_all_others_are_opposed(power):
    interests = np.array([[-5.0, 1.0], [np.nan, np.nan]])
    read = partial(capsjax.label_aware_attention, power=power, num_interests=1)
    assert_equal(read(interests, np.array([1.0, 0.0])), interests[0])


def test_numbers_of_interests_are_those_of_the_libraries():
    with np.load(GOLDEN / "interests" / "numbers_of_interests.npz") as file:
        for formula, column in {
            "mind": "mind_paper",
            "deepmatch": "deepmatch",
            "torcheasyrec": "torcheasyrec",
            "easyrec": "easyrec",
        }.items():
            found = capsjax.count_interests(file["lengths"], int(file["k_max"]), formula=formula)
            assert found.dtype == jnp.int32
            np.testing.assert_array_equal(found, file[column])


EULER = sum(Fraction(1, math.factorial(n)) for n in range(60))  # exact to 80 digits


def exact_counts(length):
    """The four formulas in integers and fractions."""
    return {
        "mind": length.bit_length() - 1,
        "deepmatch": (length + 1).bit_length() - 1,
        "torcheasyrec": (length - 1).bit_length(),
        "easyrec": sum(EULER**k <= length for k in range(1, 45)),
    }


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "uint32", "int64"])
def test_numbers_of_interests_are_exact_at_powers(dtype):
    largest = np.iinfo(dtype).max
    near = {2**k + step for k in range(1, 63, 3) for step in (-1, 0, 1)}
    near |= {int(EULER**k) + step for k in range(1, 44, 2) for step in (0, 1)}
    lengths = sorted({x for x in near if x < largest} | {int(largest)})
    wanted = [exact_counts(x) for x in lengths]
    for formula in wanted[0]:
        found = capsjax.count_interests(np.array(lengths, dtype), 70, formula=formula)
        np.testing.assert_array_equal(found, [max(1, x[formula]) for x in wanted], formula)


def test_numbers_of_interests_are_within_1_and_the_most():
    lengths = np.array([[-1, 0], [1, 1_000_000]])
    for formula in ("mind", "deepmatch", "torcheasyrec", "easyrec"):
        found = jax.jit(partial(capsjax.count_interests, max_interests=4, formula=formula))(lengths)
        np.testing.assert_array_equal(found, [[1, 1], [1, 4]])
        assert capsjax.count_interests(1_000_000, 1, formula=formula) == 1


# Complaints of these libraries' users.


def sums_of_votes(interests):
    """The weighted sums of which the interests are the squash: |v| = |s|²/(1 + |s|²)."""
    lengths = np.linalg.norm(interests, axis=-1, keepdims=True)
    return interests / np.sqrt(np.where(lengths > 0, lengths * (1 - lengths), 1))


@pytest.mark.parametrize("name", ["deepmatch", "easyrec", "torcheasyrec"])
@pytest.mark.parametrize("num_iterations", [1, 3])
def test_interests_compete_for_an_item(name, num_iterations):
    """Complaints 1 to 3: couplings over interests sum to 1, over those of the user, and differ."""
    function, weights = CALLS[name]
    items, mask, number = normal(B, I, P), before(LENGTHS, I), np.array([3, 2, 1])
    found = function(items, weights, mask=mask, num_interests=number, num_iterations=num_iterations)
    sums = sums_of_votes(found)
    total = (items * mask[..., None]).sum(1) @ weights
    assert_equal(sums.sum(1), total, rtol=1e-8)
    assert np.abs(sums[0] - total[:1] / J).max() > 0.1
    assert np.abs(sums[0] - total[:1]).max() > 0.1


def test_a_softmax_over_items_fails_the_test_of_competition():
    """The numbers of torch-rechub's layer, which has that bug, are not of such couplings."""
    with np.load(GOLDEN / "mind_deepmatch.npz") as file:
        total = (file["poses"] * before(file["lengths"], 7)[..., None]).sum(1) @ file["weights"]
        softmax = jax.nn.softmax(file["noise"], 1)
        votes = file["poses"] @ file["weights"]
        wrong = jnp.einsum("bij,bid->bjd", softmax, votes).sum(1)
        assert_equal(sums_of_votes(file["outputs"]).sum(1), total, rtol=1e-6)
        assert np.abs(wrong - total).max() > 0.1


@pytest.mark.parametrize("name", LIBRARIES)
def test_padding_of_any_length_and_content_changes_nothing(name):
    """Complaint 2."""
    function, weights = CALLS[name]
    items, cotangent = normal(B, I, P), normal(*output_shape(name))

    def run(items, length):
        settings = {"mask": before(LENGTHS, length), "num_interests": np.array([3, 2, 1])}
        return values_and_gradients(
            lambda items, *weights: function(
                items, weights if name == "comirec_sa" else weights[0], **settings
            ),
            (items, *(weights if name == "comirec_sa" else (weights,))),
            cotangent,
        )

    short = np.where(before(LENGTHS, I)[..., None], items, 0)
    outputs, (d_items, *d_weights) = run(short, I)
    assert not np.any(outputs[2])  # a user without items
    content = np.resize([np.nan, np.inf, 1e6, -np.inf], 2 * I)[None, :, None]
    long = np.concatenate([items, np.zeros_like(items)], 1)
    long = np.where(before(LENGTHS, 2 * I)[..., None], long, content)
    padded, (d_padded, *d_padded_weights) = run(long, 2 * I)
    assert_equal(padded, outputs)
    assert_equal(d_padded[:, :I], d_items)
    assert not np.any(d_padded[:, I:])
    assert not np.any(d_items[2])
    assert_equal(d_padded_weights, d_weights)
    assert all(np.all(np.isfinite(x)) for x in (d_items, *d_weights))


def test_padding_may_have_any_initial_logits():
    items, logits, mask = normal(B, I, P), normal(B, I, J), before(LENGTHS, I)
    padded = np.where(mask[..., None], logits, np.nan)
    for given in (deepmatch, easyrec, torcheasyrec):
        run = partial(given, items, MATRIX, key=None, mask=mask)
        assert_equal(run(initial_logits=padded), run(initial_logits=logits))


@pytest.mark.parametrize("gradient", ["last", "full"])
def test_iterations_differ_and_all_have_gradients(gradient):
    """Complaint 4."""
    items, cotangent, found = normal(B, I, P), normal(B, J, D), []
    for t in (1, 2, 3, 4):
        function = partial(deepmatch, num_iterations=t, gradient=gradient)
        outputs, gradients = values_and_gradients(function, (items, MATRIX), cotangent)
        assert all(np.abs(x).max() > 1e-2 for x in gradients)
        found.append(outputs)
    for one, other in pairwise(found):
        assert np.abs(one - other).max() > 1e-3


@every_call
def test_interests_beyond_a_users_number_are_0_and_the_others_as_if_alone(name):
    """Complaint 5."""
    function, weights = CALLS[name]
    items, number = normal(B, I, P), np.array([3, 2, 0])
    found = function(items, weights, num_interests=number)
    assert not np.any(found[~before(number, J)])
    if name == "comirec_sa":
        wanted = function(items, weights)[:, :2]
    elif name == "comirec":
        wanted = function(items, weights[:, :, :2])
    else:
        logits = drawn_logits(name, 2)
        wanted = function(items, weights, key=None, max_interests=2, initial_logits=logits)
    assert_equal(found[1, :2], wanted[1])
    assert_equal(function(items, weights, num_interests=2)[:, :2], wanted)
    assert_equal(function(items, weights, num_interests=J + 1), function(items, weights))


def drawn_logits(name, parents):
    """The first columns of the logits that the key draws, recovered from uniform items.

    With one item and one iteration, an interest is the squash of coupling times vote.
    """
    scale = {"torcheasyrec": 20.0, "torcheasyrec, soft": 0.3}.get(name, 1.0)
    couplings = []
    for i in range(I):
        alone = np.arange(I) == i
        settings = {"mask": alone, "num_iterations": 1, "key": key(), "max_interests": J}
        found = capsjax.multi_interests(np.ones((I, 1)), np.ones((1, 1)), **settings)
        couplings.append(sums_of_votes(found)[:, 0])
    return scale * np.log(np.array(couplings))[:, :parents]


def test_a_key_gives_the_same_standard_normal_logits_to_all():
    """Complaint 7, and padding of any length."""
    logits = drawn_logits("deepmatch", J)
    items = normal(B, I, P)
    wanted = deepmatch(items, MATRIX, key=None, initial_logits=logits)
    assert_equal(deepmatch(items, MATRIX), wanted)
    assert_equal(deepmatch(items, MATRIX), deepmatch(items, MATRIX))
    assert_equal(deepmatch(items[1], MATRIX), wanted[1])
    assert_equal(deepmatch(items[:, :2], MATRIX), deepmatch(items, MATRIX, mask=np.arange(I) < 2))
    assert np.abs(deepmatch(items, MATRIX, key=jax.random.key(8)) - wanted).max() > 1e-2
    draws = capsjax.recommend._random_logits("", key(), 4000, 5)
    assert abs(float(draws.mean())) < 0.03
    assert abs(float(draws.std()) - 1) < 0.03
    assert np.abs(np.corrcoef(draws.T) - np.eye(5)).max() < 0.07
    np.testing.assert_array_equal(draws[:7], capsjax.recommend._random_logits("", key(), 7, 5))


@pytest.mark.parametrize("partitionable", [True, False])
@pytest.mark.parametrize("generator", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_keys_of_any_generator_draw_rows_that_padding_does_not_change(generator, partitionable):
    with jax.threefry_partitionable(partitionable):
        drawn = jax.random.key(3, impl=generator)
        items = normal(B, I, P)
        found = deepmatch(items, MATRIX, key=drawn, mask=np.arange(I) < 2)
        assert_equal(deepmatch(items[:, :2], MATRIX, key=drawn), found)
        rows = capsjax.recommend._random_logits("", drawn, I, J)
    assert len(np.unique(rows)) == rows.size


def test_a_key_of_the_old_kind_and_a_traced_key():
    items = normal(B, I, P)
    wanted = deepmatch(items, MATRIX)
    assert_equal(deepmatch(items, MATRIX, key=jax.random.key_data(key())), wanted)
    keys = jax.random.split(key(), 2)
    found = jax.jit(jax.vmap(lambda key: deepmatch(items, MATRIX, key=key)))(keys)
    assert_equal(found[1], deepmatch(items, MATRIX, key=keys[1]))


def test_half_precision_draws_the_logits_of_single_precision():
    with jax.enable_x64(False):
        items, weights = (jnp.asarray(np.eye(3)[None], "float32"), jnp.eye(3))
        found = deepmatch(items, weights)
        half = deepmatch(items.astype("bfloat16"), weights.astype("bfloat16"))
    assert half.dtype == jnp.bfloat16
    assert_equal(half.astype("float32"), found, rtol=2e-2)


@pytest.mark.parametrize("name", ["deepmatch", "easyrec", "torcheasyrec", "comirec"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_large_negative_logits_have_finite_values_and_gradients(name, dtype):
    """Complaint 6: some logits of an item, all of an item, and all of an interest."""
    function, weights = CALLS[name]
    settings = {"num_interests": jnp.array([3, 2, 1]), "mask": before(LENGTHS, I)}
    if name != "comirec":
        settings["key"] = None

    def run(items, weights, logits):
        return function(items, weights, initial_logits=logits, **settings)

    @jax.jit
    def with_gradients(*arrays):
        outputs, vjp = jax.vjp(run, *arrays)
        return outputs, vjp(jnp.ones_like(outputs))

    for logit in (-np.inf, -1e30):
        logits = normal(I, J)
        logits[0, :2] = logits[1] = logits[:, 2] = logit
        arrays = [jnp.asarray(x, dtype) for x in (normal(B, I, P), weights, logits)]
        outputs, gradients = with_gradients(*arrays)
        assert all(bool(jnp.all(jnp.isfinite(x))) for x in (outputs, *gradients))
        assert np.any(outputs[0, :2])
        if logit == -np.inf and not name.endswith("easyrec"):  # whose logits are replaced
            assert not np.any(outputs[:, 2])


# As a function of JAX.


@every_call
def test_vmap_and_jit_over_users(name):
    function, weights = CALLS[name]
    items, mask, number = normal(B, I, P), before(LENGTHS, I), np.array([3, 2, 1])

    def one(items, mask, number):
        return function(items, weights, mask=mask, num_interests=number)

    together = one(items, mask, number)
    assert_equal(jax.jit(jax.vmap(one))(items, mask, number), together)
    several = one(items[:, None], mask[:, None], number[:, None])
    assert_equal(several[:, 0], together)
    assert jax.jit(one)(items[:0], mask[:0], number[:0]).shape == (0, *together.shape[1:])


def test_vmap_of_a_readout_over_candidates():
    interests, targets = normal(J, D), normal(B, D)
    read = partial(capsjax.label_aware_attention, power=2.0, num_interests=2)
    found = jax.jit(jax.vmap(read, (None, 0)))(interests, targets)
    assert_equal(found, np.stack([read(interests, target) for target in targets]))


@pytest.mark.parametrize("name", ["deepmatch", "easyrec", "torcheasyrec", "comirec_sa"])
def test_training_and_serving_export_with_a_symbolic_batch(name):
    function, weights = CALLS[name]
    weights = jax.tree.map(lambda x: jnp.asarray(x, "float32"), weights)

    def loss(items, lengths, target):
        mask = jnp.arange(I)[None] < lengths[:, None]
        number = capsjax.count_interests(lengths, J, formula="deepmatch")
        interests = function(items, weights, mask=mask, num_interests=number)
        read = capsjax.label_aware_attention(interests, target, power=2.0, num_interests=number)
        return (read * target).sum(), interests

    compiled = jax.jit(jax.grad(loss, has_aux=True))
    width = output_shape(name)[-1]
    arrays = [
        jnp.asarray(normal(B, I, P), "float32"),
        jnp.asarray(LENGTHS, "int32"),
        jnp.asarray(normal(B, width), "float32"),
    ]
    (batch,) = jax.export.symbolic_shape("b")
    structs = [jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype) for x in arrays]
    exported = jax.export.export(compiled, platforms=("cpu", "cuda", "tpu"))(*structs)
    assert_equal(exported.call(*arrays), compiled(*arrays), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_batch_over_an_axis_of_a_mesh(name):
    """Explicit axes, whose shardings are types, and a `shard_map` that checks what varies."""
    function, weights = CALLS[name]
    items, target = normal(B, I, P), normal(B, output_shape(name)[-1])

    def read(items, lengths, target):
        mask = jnp.arange(I)[None] < lengths[:, None]
        number = capsjax.count_interests(lengths, J, formula="mind")
        interests = function(items, weights, mask=mask, num_interests=number)
        one, hard = (
            capsjax.label_aware_attention(interests, target, power=power, num_interests=number)
            for power in (2.5, float("inf"))
        )
        return one + hard

    wanted = read(items, LENGTHS, target)
    for axis_type in (AxisType.Explicit, AxisType.Auto):
        mesh = jax.make_mesh((1,), ("users",), axis_types=(axis_type,))
        if axis_type == AxisType.Auto:
            users = jax.P("users")
            placed = jax.shard_map(read, mesh=mesh, in_specs=(users,) * 3, out_specs=users)
        else:
            placed = read
        with jax.set_mesh(mesh):
            place = NamedSharding(mesh, jax.P("users"))
            arrays = [jax.device_put(x, place) for x in (items, LENGTHS, target)]
            found = jax.jit(placed)(*arrays)
        assert_equal(found, wanted)


@every_call
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lower_precision_is_near(name, dtype):
    function, weights = CALLS[name]
    settings = {"mask": before(LENGTHS, I), "num_interests": np.array([3, 2, 1])}
    wanted = function(normal(B, I, P), weights, **settings)
    lower = jax.tree.map(lambda x: jnp.asarray(x, dtype), (normal(B, I, P), weights))
    found = function(*lower, **settings)
    assert found.dtype == dtype
    tolerance = {"float32": 1e-5, "bfloat16": 1e-1}[dtype] * np.abs(wanted).max()
    assert_equal(found.astype("float64"), wanted, rtol=0, atol=tolerance)


def test_the_examples_of_the_documentation_run():
    text = (ROOT / "docs" / "recommend.md").read_text()
    names, results = {}, []
    names["print"] = lambda *values: results.extend(values)
    with jax.enable_x64(False):
        for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
            exec(compile(block, "docs/recommend.md", "exec"), names)
    trained, recommended, attentive = results
    assert trained < 0.5 * np.log(8)  # of a user that resembles no item more than another
    assert recommended.shape == (8, 10)
    # The user read this item last, and was trained to get it.
    assert np.mean([x in row for x, row in zip(names["targets"], recommended, strict=True)]) > 0.5
    assert attentive.shape == (8, 4, 16)
    assert not np.any(attentive[-1])


# Errors: one sentence with the function, the argument, the rule and the value.

MIND_OK = {"items": np.ones((2, 6, 4)), "weights": np.ones((4, 5)), "max_interests": 3}
WITH_KEY = {**MIND_OK, "key": jax.random.key(0)}
WITH_KMEANS = {**WITH_KEY, "routing": "kmeans"}
COMIREC_OK = {"items": np.ones((2, 6, 4)), "weights": np.ones((6, 4, 3, 5))}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            MIND_OK,  # complaint 8
            ValueError,
            r"key or initial_logits must distinguish interests that share weights \[P, D\], which "
            "stay equal without them, got None",
        ),
        (
            {**WITH_KEY, "max_interests": None},
            ValueError,
            r"max_interests must be given for weights \[P, D\], which do not tell J, got None",
        ),
        (
            {**WITH_KEY, "max_interests": 0},
            ValueError,
            "max_interests must be an integer of at least 1, got 0",
        ),
        (
            {**COMIREC_OK, "max_interests": 3},
            ValueError,
            r"max_interests must be None for weights \[I, P, J, D\], which have J = 3, got 3",
        ),
        (
            {**COMIREC_OK, "weights": np.ones((4, 3, 5)), "max_interests": 3},
            ValueError,
            r"max_interests must be None for weights \[P, J, D\], which have J = 3, got 3",
        ),
        (
            {**WITH_KEY, "initial_logits": np.ones((6, 3))},
            ValueError,
            "key must be None if initial_logits are given, got both",
        ),
        (
            {**MIND_OK, "initial_logits": np.ones((6, 4))},
            ValueError,
            r"initial_logits must have shape \[I, J\] or \[..., I, J\] = \[6, 3\], got \(6, 4\)",
        ),
        (
            {**MIND_OK, "initial_logits": np.ones((3, 6, 3))},
            ValueError,
            r"initial_logits must have shape .* = \[2, 6, 3\], got \(3, 6, 3\)",
        ),
        (
            {**MIND_OK, "initial_logits": np.ones((6, 3), np.float16)},
            TypeError,
            "initial_logits must be float64, got float16",
        ),
        ({**MIND_OK, "key": 3.5}, TypeError, "key must be one key of jax.random, got a float"),
        (
            {**MIND_OK, "key": jax.random.split(jax.random.key(0), 2)},
            TypeError,
            r"key must be one key of jax.random, got an array of shape \(2,\)",
        ),
        (
            {**WITH_KEY, "items": np.ones(4)},
            ValueError,
            r"items must have shape \[..., I, P\] = \[any, any\], got \(4,\)",
        ),
        (
            {**WITH_KEY, "items": np.ones((6, 4), int)},
            TypeError,
            "items must be floating, got int64",
        ),
        (
            {**WITH_KEY, "weights": np.ones((4, 5), np.float32)},
            TypeError,
            "weights must have the dtype of items, float64, got float32",
        ),
        (
            {**WITH_KEY, "weights": np.ones(4)},
            ValueError,
            r"weights must have shape \[P, D\], \[P, J, D\] or \[I, P, J, D\] with I = 6 and "
            r"P = 4, got \(4,\)",
        ),
        (
            {**WITH_KEY, "weights": np.ones((3, 5))},
            ValueError,
            r"weights must have shape \[P, D\] = \[4, any\], got \(3, 5\)",
        ),
        (
            {**COMIREC_OK, "weights": np.ones((5, 4, 3, 5))},
            ValueError,
            r"weights must have shape \[I, P, J, D\] = \[6, 4, any, any\], got \(5, 4, 3, 5\)",
        ),
        (
            {**WITH_KEY, "num_interests": np.ones(3, int)},
            ValueError,
            r"num_interests must be a number or have shape \[...\] = \(2,\), got \(3,\)",
        ),
        (
            {**WITH_KEY, "num_interests": np.ones(2)},
            TypeError,
            "num_interests must be integers, got float64",
        ),
        (
            {**WITH_KEY, "mask": np.ones((2, 5), bool)},
            ValueError,
            r"mask must have shape \[I\] or \[..., I\] = \(2, 6\), got \(2, 5\)",
        ),
        ({**WITH_KEY, "mask": np.ones((2, 6))}, TypeError, "mask must be bool, got float64"),
        (
            {**WITH_KEY, "routing": "em"},
            ValueError,
            "routing must be one of dynamic, kmeans, got 'em'",
        ),
        *(
            (
                {**WITH_KEY, argument: value},
                ValueError,
                f"{argument} must not be given unless routing is 'kmeans', .*, got routing "
                "'dynamic'",
            )
            for argument, value in {
                "temperature": 20.0,
                "squash_power": 1.0,
                "carry_couplings": True,
            }.items()
        ),
        (
            {**WITH_KMEANS, "temperature": np.ones(3)},
            ValueError,
            r"temperature must be a number, got an array of shape \(3,\)",
        ),
        (
            {**WITH_KMEANS, "squash_power": 0},
            ValueError,
            "squash_power must be a number above 0, got 0",
        ),
        (
            {**WITH_KMEANS, "carry_couplings": True, "gradient": "full"},
            ValueError,
            "carry_couplings must be False unless gradient is 'last', .*, got gradient 'full'",
        ),
        ({**WITH_KEY, "gradient": "all"}, ValueError, "gradient must be one of full, last"),
        (
            {**WITH_KEY, "num_iterations": 0},
            ValueError,
            "num_iterations must be an integer of at least 1, got 0",
        ),
        (
            {**WITH_KEY, "implementation": "cuda"},
            ValueError,
            "implementation must be None or one of",
        ),
    ],
)
def test_multi_interests_refuses(arguments, error, message):
    refuses(capsjax.multi_interests, arguments, error, message)


SA_OK = {
    "items": np.ones((2, 6, 4)),
    "hidden_weights": np.ones((4, 7)),
    "query_weights": np.ones((7, 3)),
}
READ_OK = {"interests": np.ones((2, 3, 5)), "target": np.ones((2, 5))}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {**SA_OK, "hidden_weights": np.ones((5, 7))},
            ValueError,
            r"hidden_weights must have shape \[P, N\] = \[4, any\], got \(5, 7\)",
        ),
        (
            {**SA_OK, "query_weights": np.ones((6, 3))},
            ValueError,
            r"query_weights must have shape \[N, J\] = \[7, any\], got \(6, 3\)",
        ),
        (
            {**SA_OK, "query_weights": np.ones((7, 3), np.float32)},
            TypeError,
            "query_weights must have the dtype of items, float64, got float32",
        ),
        (
            {**SA_OK, "hidden_bias": np.ones(3)},
            ValueError,
            r"hidden_bias must have shape \[N\] = \[7\], got \(3,\)",
        ),
        (
            {**SA_OK, "position_embeddings": np.ones((5, 4))},
            ValueError,
            r"position_embeddings must have shape \[I, P\] = \[6, 4\], got \(5, 4\)",
        ),
        (
            {**SA_OK, "mask": np.ones(5, bool)},
            ValueError,
            r"mask must have shape \[I\] or \[..., I\] = \(2, 6\), got \(5,\)",
        ),
        (
            {**SA_OK, "num_interests": np.ones((2, 1), int)},
            ValueError,
            r"num_interests must be a number or have shape \[...\] = \(2,\), got \(2, 1\)",
        ),
    ],
)
def test_self_attentive_interests_refuses(arguments, error, message):
    refuses(capsjax.self_attentive_interests, arguments, error, message)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {**READ_OK, "interests": np.ones(5)},
            ValueError,
            r"interests must have shape \[..., J, D\] = \[any, any\], got \(5,\)",
        ),
        (
            {**READ_OK, "target": np.ones((2, 3, 5))},
            ValueError,
            r"target must have shape \[..., D\] = \[2, 5\], got \(2, 3, 5\)",
        ),
        (
            {**READ_OK, "target": np.ones((2, 5), np.float32)},
            TypeError,
            "target must have the dtype of interests, float64, got float32",
        ),
        ({**READ_OK, "power": 0}, ValueError, "power must be a number above 0, got 0"),
        ({**READ_OK, "power": -np.inf}, ValueError, "power must be a number above 0, got -inf"),
        ({**READ_OK, "power": "hard"}, ValueError, "power must be a number above 0, got 'hard'"),
        (
            {**READ_OK, "num_interests": 2.0},
            TypeError,
            "num_interests must be integers, got float64",
        ),
    ],
)
def test_label_aware_attention_refuses(arguments, error, message):
    refuses(capsjax.label_aware_attention, arguments, error, message)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"lengths": np.ones(3, int), "max_interests": 4, "formula": "log"},
            ValueError,
            "formula must be one of mind, deepmatch, torcheasyrec, easyrec, got 'log'",
        ),
        (
            {"lengths": np.ones(3, int), "max_interests": 0, "formula": "mind"},
            ValueError,
            "max_interests must be an integer of at least 1, got 0",
        ),
        (
            {"lengths": np.ones(3), "max_interests": 4, "formula": "mind"},
            TypeError,
            "lengths must be integers, got float64",
        ),
    ],
)
def test_count_interests_refuses(arguments, error, message):
    refuses(capsjax.count_interests, arguments, error, message)


def refuses(function, arguments, error, message):
    with pytest.raises(error, match=f"^{function.__name__}: {message}") as e:
        function(**arguments)
    assert "\n" not in str(e.value)
