"""EM and variational-Bayes routing against numbers of other projects' code.

Where a project adds constants to sums, the oracle with these constants gives its numbers to
rounding, and the library, which adds none, gives them as closely as the constants allow.
"""

import pathlib

import gaussian_oracles as oracles
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import capsjax

pytestmark = pytest.mark.usefixtures("float64", "quick_compilation")

GOLDEN = pathlib.Path(__file__).parent / "golden" / "gaussian"


def load(name):
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as arrays:
        return dict(arrays)


def errors(found, wanted):
    """Largest error of any array, of its largest entry."""
    pairs = zip(found, wanted, strict=True)
    return max(np.abs(np.asarray(a) - b).max() / np.abs(b).max() for a, b in pairs)


def check(function, golden, names, results, *, error, gradient_error=None):
    """Compare values and gradients of `function(*arrays)`, a tuple, with the golden ones."""
    inputs = [golden[name] for name in names]
    outputs = [golden[f"out{name}"] for name in results]
    cotangents = [golden[f"ct{name}"] for name in results]

    def loss(*arrays):
        found = function(*arrays)
        return sum((x * ct).sum() for x, ct in zip(found, cotangents, strict=True)), found

    every = tuple(range(len(inputs)))
    run = jax.jit(jax.grad(loss, every, has_aux=True))
    gradients, found = run(*map(jnp.asarray, inputs))
    wanted = [golden[f"grad{name[name.index('_') :]}"] for name in names]
    assert errors(found, outputs) < error
    assert errors(gradients, wanted) < (gradient_error or error)


def check_oracle(function, golden, names, results, *, error, entries=25):
    """Compare values and some gradients of an oracle, by complex steps, with the golden ones."""
    inputs = [golden[name] for name in names]
    found = [x.real for x in function(*inputs)]
    assert errors(found, [golden[f"out{name}"] for name in results]) < error
    rng = np.random.default_rng(0)
    for k, name in enumerate(names):
        gradient = golden[f"grad{name[name.index('_') :]}"]
        for n in rng.choice(gradient.size, min(gradient.size, entries), replace=False):
            at = np.unravel_index(n, gradient.shape)
            moved = [x.astype(np.complex128) for x in inputs]
            moved[k][at] += 1e-30j
            pairs = zip(function(*moved), results, strict=True)
            derivative = sum((x.imag * golden[f"ct{name}"]).sum() for x, name in pairs) / 1e-30
            # Batch normalisation makes the gradients of beta_a rounding errors.
            assert abs(derivative - gradient[at]) < error * max(np.abs(gradient).max(), 1e-3)


IBM = {"it1": (1, 0.01), "it2_lambda01": (2, 0.1), "it3": (3, 0.01)}
IBM_NAMES = ("in_a", "in_pose", "w_w", "w_beta_a", "w_beta_v")


@pytest.mark.parametrize("case", IBM)
def test_ibm(case):
    num_iterations, inverse_temperature = IBM[case]
    golden = load(f"ibm_em_conv_{case}")

    def routing(a, pose, w, beta_a, beta_v):
        poses, activations = capsjax.em_routing(
            pose.reshape(2, 4, 4, 2, 4, 4),
            a[..., 0],
            w.reshape(2, 2, 2, 3, 4, 4).transpose(0, 1, 2, 4, 3, 5),
            beta_u=beta_v.reshape(3),
            beta_a=beta_a.reshape(3),
            num_iterations=num_iterations,
            inverse_temperature=inverse_temperature,
            cost_scale=100 * 3 / (2 * 2 * 2),
            min_variance=1e-9,
            stride=1,
        )
        return poses.reshape(golden["out_pose"].shape), activations[..., None]

    # Its constants of 1e-9 move the couplings of far parents.
    check(routing, golden, IBM_NAMES, ("_pose", "_a"), error=1e-6)

    def oracle(a, pose, w, beta_a, beta_v):
        weights = w.reshape(2, 2, 2, 3, 4, 4).transpose(0, 1, 2, 4, 3, 5)
        votes, reaches = oracles.window_votes(pose.reshape(2, 4, 4, 2, 4, 4), weights, 1)
        means, activations = ibm_em(
            votes,
            reaches,
            a.reshape(2, -1),
            beta_v.reshape(3),
            beta_a.reshape(3),
            inverse_temperature * (1 - 0.95 ** np.arange(1, num_iterations + 1)),
        )
        return means.reshape(golden["out_pose"].shape), activations.reshape(2, 3, 3, 3, 1)

    check_oracle(oracle, golden, IBM_NAMES, ("_pose", "_a"), error=1e-10)


def ibm_em(votes, reaches, activations, beta_u, beta_a, inverse_temperatures, tiny=1e-9):
    """EM with IBM's constants; unreached parents have the logit min(smallest, -100)."""
    parents = votes.shape[3]
    reached = np.broadcast_to(reaches[None, :, :, None], votes.shape[:-1])
    couplings = reaches / (reaches.sum(1, keepdims=True) * parents + tiny)
    couplings = np.broadcast_to(couplings[None, :, :, None], reached.shape)
    scale = 100 * parents / reaches.sum(0)[0]
    for step, inverse in enumerate(inverse_temperatures):
        weights = couplings * activations[:, :, None, None]
        mass = weights.sum(1)
        mean = (weights[..., None] * votes).sum(1) / (mass[..., None] + tiny)
        second = (weights[..., None] * (votes - mean[:, None]) ** 2).sum(1)
        variance = second / (mass[..., None] + tiny) + tiny
        cost = ((beta_u[:, None] + np.log(variance) / 2) * mass[..., None] * scale).sum(-1)
        activation = 1 / (1 + np.exp(-inverse * (beta_a - cost)))
        if step == len(inverse_temperatures) - 1:
            return mean, activation
        logits = -((votes - mean[:, None]) ** 2) / (2 * variance[:, None])
        logits = (logits - np.log(2 * np.pi * variance[:, None]) / 2).sum(-1)
        logits = logits + np.log(activation + tiny)[:, None]
        lowest = min(logits[reached].real.min(), -100)
        exponentials = np.exp(np.where(reached, logits, lowest))
        couplings = exponentials / exponentials.sum((2, 3), keepdims=True) * reached
    raise AssertionError("unreachable")


SR = {
    "dense_it1": (1, 0.01, 2, 1, 0),  # T, inverse temperature, window, stride, padding
    "dense_it3": (3, 0.01, 2, 1, 0),
    "dense_it3_lambda1": (3, 1.0, 2, 1, 0),
    "conv_it3": (3, 0.01, 3, 2, 1),
}


@pytest.mark.parametrize("case", SR)
def test_srcapsnet(case):
    num_iterations, inverse_temperature, window, stride, padding = SR[case]
    golden = load(f"srcapsnet_em_{case}")
    batch, types, height, width = golden["in_a"].shape
    parents = golden["w_W"].shape[1]

    def routing(a, pose, w, beta_u, beta_a):
        pose = pose.reshape(batch, types, 4, 4, height, width).transpose(0, 4, 5, 1, 2, 3)
        a = a.transpose(0, 2, 3, 1)
        around = (0, 0), (padding, padding), (padding, padding)
        poses, activations = capsjax.em_routing(
            jnp.pad(pose, (*around, (0, 0), (0, 0), (0, 0))),
            jnp.pad(a, (*around, (0, 0))),
            w.reshape(window, window, types, parents, 4, 4).transpose(0, 1, 2, 4, 3, 5),
            beta_u=beta_u.reshape(-1),
            beta_a=beta_a.reshape(-1),
            num_iterations=num_iterations,
            inverse_temperature=inverse_temperature,
            # Its couplings start at 1, not at 1/J: the first cost is J times as high.
            cost_scale=jnp.array([parents] + [1.0] * (num_iterations - 1)),
            min_variance=1e-12,
            stride=stride,
            competition="types",
        )
        poses = poses.transpose(0, 3, 4, 5, 1, 2)
        return poses.reshape(golden["out_pose"].shape), activations.transpose(0, 3, 1, 2)

    names = "in_a", "in_pose", "w_W", "w_beta_u", "w_beta_a"
    # It adds 1e-12 to sums of couplings too, which shows where windows are mostly padding.
    error = 2e-9 if case == "conv_it3" else 1e-10
    check(routing, golden, names, ("_pose", "_a"), error=1e-10, gradient_error=error)


YL = {  # window, stride, whether all positions share the weights, inverse temperatures
    "dense_ones_it3": (2, 1, False, [1e-3] * 3),
    "dense_it1": (2, 1, False, [1e-3]),
    "dense_it3": (2, 1, False, [1e-3] * 3),
    "conv_it2_lambda1": (2, 1, False, [1.0] * 2),
    "conv_it3": (3, 2, False, [1e-3] * 3),
    "class_it3": (3, 1, True, [1e-3] * 3),
    "class_coor_it3": (3, 1, True, [1e-3] * 3),
}


@pytest.mark.parametrize("case", YL)
def test_yl_1993(case):
    window, stride, shares, temperatures = YL[case]
    golden = load(f"ylem_{case}")
    batch, height, width, channels = golden["in_x"].shape
    types, parents = channels // 17, len(golden["w_beta_u"])
    rows = np.arange(window, dtype=np.float32) / np.float32(window)
    coordinates = np.zeros((window, window, types, 4, 4))
    if "coor" in case:
        coordinates[..., 0, 0] = rows[:, None, None]
        coordinates[..., 0, 1] = rows[:, None]

    def arranged(x, w):
        weights = w[0].reshape(-1, types, parents, 4, 4).transpose(0, 1, 3, 2, 4)
        if shares:
            weights = weights + np.zeros((window**2, 1, 1, 1, 1))
        return (
            x[..., : 16 * types].reshape(batch, height, width, types, 4, 4),
            weights.reshape(window, window, *weights.shape[1:]),
        )

    def results(poses, activations):
        if "class" in case:
            return (activations.reshape(batch, parents),)
        grid = golden["out"].shape[:3]
        poses = poses.reshape(*grid, 16 * parents), activations.reshape(*grid, parents)
        return (jnp.concatenate(poses, -1),)

    def routing(x, w, beta_u, beta_a):
        poses, weights = arranged(x, w)
        if "class" in case:  # One window: a dense layer, which takes coordinates.
            poses = poses.reshape(batch, -1, 4, 4)
            weights = weights.reshape(-1, *weights.shape[3:])
        return results(
            *capsjax.em_routing(
                poses,
                jnp.ones(poses.shape[:-2]),
                weights,
                beta_u=beta_u,
                beta_a=beta_a,
                num_iterations=len(temperatures),
                inverse_temperature=jnp.array(temperatures),
                min_variance=1e-8,
                coordinates=coordinates.reshape(-1, 4, 4) if "coor" in case else None,
                stride=None if "class" in case else stride,
                competition="positions" if "class" in case else "types",
            )
        )

    names = "in_x", "w_weights", "w_beta_u", "w_beta_a"
    # Its couplings times activations are divided by their sums plus 1e-8: activations cancel. A
    # temperature of 1 leaves parents with so little mass that 1e-8 shows.
    check(routing, golden, names, ("",), error=5e-3 if case == "conv_it2_lambda1" else 5e-6)

    def oracle(x, w, beta_u, beta_a, tiny=1e-8):
        poses, weights = arranged(x, w)
        votes, reaches = oracles.window_votes(poses, weights, stride)
        if "coor" in case:
            votes = votes + coordinates.reshape(1, -1, 1, 1, 16)
        couplings = np.broadcast_to(reaches[None, :, :, None] / parents, votes.shape[:-1])
        activations = x[..., 16 * types :].reshape(batch, -1)[:, :, None, None]
        for step, temperature in enumerate(temperatures):
            couplings = couplings * activations
            couplings = couplings / (couplings.sum(3, keepdims=True) + tiny)
            mass = couplings.sum(1)
            shares = (couplings / (mass[:, None] + tiny))[..., None]
            mean = (shares * votes).sum(1)
            variance = (shares * (votes - mean[:, None]) ** 2).sum(1) + tiny
            cost = ((beta_u[:, None] + np.log(variance) / 2) * mass[..., None]).sum(-1)
            activation = 1 / (1 + np.exp(-temperature * (beta_a - cost)))
            if step < len(temperatures) - 1:
                logits = -((votes - mean[:, None]) ** 2) / (2 * variance[:, None])
                logits = (logits - np.log(2 * np.pi * variance[:, None]) / 2).sum(-1)
                couplings = oracles.softmax(logits + np.log(activation)[:, None], (3,))
                couplings = couplings * reaches[None, :, :, None]
        grid = golden["out"].shape[:-1]
        if "class" in case:
            return (activation.reshape((*grid, parents)),)
        found = mean.reshape(*grid, 16 * parents), activation.reshape(*grid, parents)
        return (np.concatenate(found, -1),)

    check_oracle(oracle, golden, names, ("",), error=1e-10)


VB = {  # window, whether all positions share the weights, T
    "dense_diag_it1": (2, False, 1),
    "dense_diag_it3": (2, False, 3),
    "conv_diag_it3": (3, False, 3),
    "class_shared_it3": (3, True, 3),
    "dense_diag_it3_bntrain": (2, False, 3),
    "conv_diag_it3_bntrain": (3, False, 3),
    "class_shared_coor_it3": (3, True, 3),
}
VB_NAMES = ("in_a", "in_pose", "w_W", "w_beta_u", "w_beta_a")


@pytest.mark.parametrize("case", VB)
def test_variational_bayes(case):
    window, shares, num_iterations = VB[case]
    golden = load(f"vb_{case}")
    batch, types, height, width = golden["in_a"].shape
    parents = golden["w_W"].shape[2]
    # Its "coordinates" of a class layer are one number for every child, in two components.
    coordinates = np.zeros((4, 4))
    coordinates[:2, 3] = np.float32(0.1) if "coor" in case else 0

    def arranged(a, pose, w):
        weights = w[0, :, :, 0, :, :, 0, 0].transpose(4, 5, 0, 2, 1, 3)
        if shares:
            weights = weights + np.zeros((window, window, 1, 1, 1, 1))
        return pose.transpose(0, 4, 5, 1, 2, 3), a.transpose(0, 2, 3, 1), weights

    def normalised(x, axes):
        """Batch normalisation, in training or with fresh statistics."""
        if "bntrain" not in case:
            return x / (1 + 1e-5) ** 0.5
        moved = x - x.mean(axes, keepdims=True)
        return moved / ((moved * moved).mean(axes, keepdims=True) + 1e-5) ** 0.5

    def results(means, logits):
        means, logits = means.transpose(0, 3, 4, 5, 1, 2), logits.transpose(0, 3, 1, 2)
        means = normalised(means, (0, 2, 3, 4, 5))
        logits = normalised(logits, (0, 2, 3))
        return (
            means.reshape(golden["out_pose"].shape),
            (1 / (1 + np.e**-logits)).reshape(golden["out_a"].shape),
        )

    def oracle(a, pose, w, beta_u, beta_a, *, least=1e-11, library=False):
        pose, a, weights = arranged(a, pose, w)
        grid = height - window + 1, width - window + 1
        if library:
            windows = {"stride": 1, "starts_at_types": True}
            if "coor" in case:  # One window: a dense layer, which takes coordinates.
                children = height * width * types
                windows = {"coordinates": np.broadcast_to(coordinates, (children, 4, 4))}
                pose, a = pose.reshape(batch, children, 4, 4), a.reshape(batch, children)
                weights = weights.reshape(children, *weights.shape[3:])
            means, logits = capsjax.variational_bayes_routing(
                pose,
                a,
                weights,
                beta_u=beta_u.reshape(-1),
                beta_a=beta_a.reshape(-1),
                num_iterations=num_iterations,
                **windows,
            )
            rows = pose.shape[-2:]
            return results(
                means.reshape(batch, *grid, parents, *rows), logits.reshape(batch, *grid, parents)
            )
        votes, reaches = oracles.window_votes(pose, weights, 1)
        if "coor" in case:
            votes = votes + coordinates.reshape(-1)
        base = np.where(reaches[None, ..., None], np.zeros(votes.shape[:-1]), -np.inf)
        means, logits = oracles.variational_bayes(
            votes,
            a.reshape(batch, -1),
            beta_u.reshape(-1),
            beta_a.reshape(-1),
            base,
            num_iterations=num_iterations,
            axes=(2, 3),
            first=np.where(base == 0, 1 / parents, 0),
            least=least,
        )
        rows = pose.shape[-2:]
        return results(
            means.reshape(batch, *grid, parents, *rows), logits.reshape(batch, *grid, parents)
        )

    # Its normaliser of the responsibilities is at least 1e-11, which exceeds most sums here.
    check_oracle(oracle, golden, VB_NAMES, ("_pose", "_a"), error=1e-9)
    inputs = [golden[name] for name in VB_NAMES]
    found = jax.jit(lambda *x: oracle(*x, library=True))(*map(jnp.asarray, inputs))
    # Without that bound the library computes what the oracle does, and in one iteration all do.
    assert errors(found, oracle(*inputs, least=0)) < 1e-12
    if num_iterations == 1:
        routing = lambda *x: oracle(*x, library=True)  # noqa: E731
        check(routing, golden, VB_NAMES, ("_pose", "_a"), error=1e-9)
