"""Corners of the systems: published defaults, what FedBone reports, methods without their data."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import NUM_CLIENTS, TASK, VMAP, small_federation
from mocha_problems import federate

from fedjax_mtl import Solver, algorithms, models, server, tasks
from fedjax_mtl.core import batching, sampling, trees
from fedjax_mtl.core.model import Part
from fedjax_mtl.models.cut import CutModel
from fedjax_mtl.relations import covariance
from fedjax_mtl.tasks import dual

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)

# --- Defaults.

# Values of the papers or of released codes, and choices that results depend on.
DEFAULTS = {
    "apfl": {"alpha": 0.5, "alpha_learning_rate": 0.0, "weighting": "samples"},
    "clustered": {"mean_below": 0.4, "largest_above": 1.6, "max_clusters": None},
    "cocoa": {"inexactness": 0.5, "max_passes": 50},
    "decentralized_fedem": {"adaptation_iterations": 10},
    "ditto": {"penalty": 0.1, "personal_plan": None, "weighting": "samples"},
    "fedamp": {
        "penalty": 1.0,
        "scale": 1.0,
        "bandwidth": 1.0,
        "per_parameter": False,
        "clip": False,
        "parts": None,
    },
    "fedavg": {"server": None, "weighting": "samples", "proximal_strength": 0.0},
    "fedbone": {"schedule": "step", "embedding_sync": "fedavg", "weighting": "uniform"},
    "fedem": {"weighting": "population", "adaptation_iterations": 10},
    "fedgradnorm": {
        "weight_learning_rate": 0.02,
        "exponent": 0.6,
        "norms": "update",
        "loss_point": "shared",
        "local_weighting": False,
        "minimum": 1e-3,
        "renormalise": True,
        "dynamic": True,
    },
    "fedhca2": {"alpha": 0.4, "groups": None, "owned": None},
    "fedit": {"weighting": "samples"},
    "fedmtl": {"penalty": None, "regulariser": "sum"},
    "fedu": {"neighbours": "sampled"},
    "hota_fedgradnorm": {"weight_learning_rate": 0.02, "exponent": 0.6, "dynamic": True},
    "l2sgd": {"probability": 0.1, "batch_size": None},
    "local_models": {"passes": 1.0, "order": "random"},
    "matfl": {"num_clusters": 2, "soft": False, "threshold": 0.0},
    "minibatch_sdca": {"passes": 1.0, "scaling": 10.0, "order": "random"},
    "minibatch_sgd": {"passes": 1.0, "scaling": 0.1, "order": "random"},
    "mira": {"neighbours": "sampled"},
    "mocha": {
        "relationship_every": None,
        "passes": 1.0,
        "aggregation": 1.0,
        "sigma_prime": "row_sum",
        "order": "random",
        "adaptation_passes": 100,
    },
    "pfedme": {"penalty": 15.0, "learning_rate": 0.005, "inner_steps": 5, "server_step": 1.0},
    "sheaf_fmtl": {"compression": 0.1, "deviation": 0.01, "map_seed": 0},
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults(name):
    parameters = inspect.signature(getattr(algorithms, name)).parameters
    assert {own: parameters[own].default for own in DEFAULTS[name]} == DEFAULTS[name]


def test_algorithms_are_the_papers_unless_asked():
    for name in algorithms.__all__:
        parameters = inspect.signature(getattr(algorithms, name)).parameters
        if "fidelity" in parameters:
            assert parameters["fidelity"].default == "paper", name


# --- MaT-FL.


ENCODER, DECODER = RNG.normal(size=(4, 2)), RNG.normal(size=(2, 3))


def two_layers():
    """A linear encoder and a linear decoder, which start where they are told."""

    def init(key):
        del key
        starts = {"encoder": ENCODER, "decoder": DECODER}
        return {name: {"w": jnp.asarray(w, jnp.float32)} for name, w in starts.items()}

    def apply(params, inputs, key=None):
        del key
        return inputs @ params["encoder"]["w"] @ params["decoder"]["w"]

    return models.Model(init, apply)


def encoders_after(make, **settings):
    """The encoders of all clients after a round of full batches, ``[clients, 4, 2]``."""
    solver = Solver(optax.sgd(0.5), batching.steps(1, None))
    common = {"num_clients": NUM_CLIENTS, "solver": solver, "execution": VMAP}
    algorithm = make(two_layers(), TASK, **common, **settings)
    cohort = sampling.full_participation()(KEY, 0, small_federation())

    @jax.jit
    def run(cohort):
        return algorithm.round(algorithm.init(KEY), cohort, KEY)[0].params["encoder"]["w"]

    return np.asarray(run(cohort))


def test_soft_groups_of_matfl():
    """Models weigh by the cosines of their encoders' deviations from the mean.

    A threshold is added to the cosines.
    """
    alone = encoders_after(algorithms.mixed_clients, personal=trees.under("decoder"))
    assert np.ptp(alone, axis=0).min() > 1e-2
    deviations = (alone - alone.mean(axis=0)).reshape(NUM_CLIENTS, -1)
    units = deviations / np.linalg.norm(deviations, axis=1, keepdims=True)
    scores = np.maximum(units @ units.T + 0.2, 0)
    assert 0 < (scores == 0).sum() < NUM_CLIENTS**2 / 2
    shares = scores / scores.sum(axis=1, keepdims=True)
    settings = {"encoder": trees.under("encoder"), "soft": True, "threshold": 0.2}
    ours = encoders_after(algorithms.matfl, **settings)
    np.testing.assert_allclose(ours, np.einsum("ij,jkl->ikl", shares, alone), rtol=1e-3, atol=1e-5)


# --- FedBone.


def linear_part(name, *shape):
    """A part that multiplies its inputs with a matrix, which starts where it is told."""
    matrix = RNG.normal(size=shape).astype(np.float32)
    return Part(
        lambda key, inputs: {name: jnp.asarray(matrix)},
        lambda params, inputs: inputs @ params[name],
    )


FEDBONE_SIZES = {"b": 1, "a": 2}
EXAMPLES = 3


def small_fedbone():
    """FedBone with a linear embedding, trunk and head for every group.

    It makes one step of full batches in each round.
    """
    uppers = {name: linear_part("w", 4) for name in FEDBONE_SIZES}
    example = jax.ShapeDtypeStruct((1, 3), jnp.float32)
    parts = linear_part("p", 3, 5), linear_part("t", 5, 4)
    model = CutModel(*parts, uppers, example, models={})
    squared = tasks.Task("squared", lambda o, y: jnp.square(o - y), {}, None)
    return algorithms.fedbone(
        model,
        squared,
        num_clients=FEDBONE_SIZES,
        solver=Solver(optax.sgd(0.01), batching.steps(1, EXAMPLES)),
        server=server.step_from(optax.sgd(0.01)),
    )


def test_fedbone_reports_the_loss_of_every_group():
    """The mean of all groups counts every client once, and the state counts the rounds."""
    population = {
        name: federate(
            list(RNG.normal(size=(count, EXAMPLES, 3)).astype(np.float32)),
            list(RNG.normal(size=(count, EXAMPLES)).astype(np.float32)),
        )
        for name, count in FEDBONE_SIZES.items()
    }
    cohorts = sampling.by_group(sampling.full_participation())(KEY, 0, population)
    algorithm = small_fedbone()
    one_round = jax.jit(algorithm.round)
    start = state = jax.jit(algorithm.init)(KEY)
    state, info = one_round(state, cohorts, KEY)
    losses = {}
    for name, count in FEDBONE_SIZES.items():
        own, data = start.clients[name], population[name].examples
        x = np.asarray(data["inputs"]).reshape(count, EXAMPLES, 3)
        y = np.asarray(data["labels"]).reshape(count, EXAMPLES)
        features = x @ np.asarray(own.lower["p"]) @ np.asarray(start.params["t"])
        scores = np.einsum("cef,cf->ce", features, own.upper["w"])
        losses[name] = np.square(scores - y).mean(axis=1)
        np.testing.assert_allclose(info[f"loss/{name}"], losses[name].mean(), rtol=1e-4)
    everybody = np.concatenate(list(losses.values()))
    np.testing.assert_allclose(info["loss"], everybody.mean(), rtol=1e-4)
    assert info["diverged"] == 0
    for _ in range(2):
        state, _ = one_round(state, cohorts, KEY)
    assert state.round == 3
    # Five embeddings and four features an example, and the embedding's matrix, in float32.
    assert algorithm.traffic(state) == (4 * (EXAMPLES * 9 + 15),) * 2


# --- Methods for MOCHA's problem, without its data.

TASK_SIZES = (4, 2, 5)
INPUTS = [RNG.normal(size=(size, 3)) for size in TASK_SIZES]
LABELS = [np.where(RNG.normal(size=size) > 0, 1.0, -1.0) for size in TASK_SIZES]
ROOT = RNG.normal(size=(3, 3))
SIGMA = ROOT @ ROOT.T / 3 + 0.5 * np.eye(3)
PENALTY = 0.3


def dual_method(make, **settings):
    """Makes a method for the small problem, in double precision and in the order of storage."""
    return make(
        dual.hinge(),
        sizes=np.array(TASK_SIZES),
        capacity=max(TASK_SIZES),
        features=3,
        penalty=PENALTY,
        relationship=covariance.given(SIGMA),
        order="cyclic",
        dtype=jnp.float64,
        **settings,
    )


def run_rounds(algorithm, presence):
    """Returns the state and the report after one round for each row of ``presence``."""
    federation = federate(INPUTS, LABELS)
    one_round, state = jax.jit(algorithm.round), algorithm.init(KEY)
    for present in presence:
        cohort = sampling.make_cohort(federation, jnp.arange(3), jnp.asarray(present))
        state, info = one_round(state, cohort, KEY)
    return jax.device_get((state, info))


def slopes_of(weights, counts):
    """Each task's summed subgradient of the hinge over its first examples."""
    sums = []
    for own, x, y, count in zip(weights, INPUTS, LABELS, counts, strict=True):
        active = (y * (x @ own) < 1) & (np.arange(len(y)) < count)
        sums.append(-(active * y) @ x)
    return np.array(sums)


def hinge_primal(weights):
    losses = [
        np.maximum(0, 1 - y * (x @ w)).mean()
        for w, x, y in zip(weights, INPUTS, LABELS, strict=True)
    ]
    precision = np.linalg.inv(SIGMA)
    return np.array(losses), np.sum(losses) + PENALTY / 2 * np.sum(weights * (precision @ weights))


PRESENCE = [[True, True, True], [True, False, True], [True, True, True]]


@pytest.mark.parametrize("fidelity", ["paper", "released"])
def test_minibatch_sgd(fidelity):
    """Steps fall as 1 / round, in the paper's and in the released reading.

    One task is absent in the second of three rounds.
    """
    scaling, passes = 0.4, 0.5
    with jax.enable_x64(True):
        method = dual_method(
            algorithms.minibatch_sgd, fidelity=fidelity, passes=passes, scaling=scaling
        )
        state, info = run_rounds(method, PRESENCE)
    weights, cut = np.zeros((3, 3)), 0
    for number, present in enumerate(PRESENCE, 1):
        counts = np.floor(passes * np.array(TASK_SIZES)) * present
        decay = np.linalg.inv(SIGMA) @ weights
        if fidelity == "paper":
            mean = slopes_of(weights, counts) / np.maximum(counts, 1)[:, None]
            weights = weights - scaling / number * (PENALTY * decay + mean)
        else:
            data = scaling / counts.sum() * slopes_of(weights, counts)
            weights = weights - scaling / number * decay - data
            norms = np.linalg.norm(weights, axis=1, keepdims=True)
            limit = 1 / np.sqrt(PENALTY)
            cut += np.sum(norms > limit)
            weights = weights * np.minimum(1, limit / np.maximum(norms, 1e-300))
    np.testing.assert_allclose(state.clients.weights, weights, rtol=1e-9)
    losses, primal = hinge_primal(weights)
    np.testing.assert_allclose(info["loss"], losses.mean(), rtol=1e-6)
    np.testing.assert_allclose(info["primal"], primal, rtol=1e-6)
    assert info["num_steps"] == counts.sum() and info["slowest_steps"] == counts.max()
    assert info["num_examples"] == 11 and state.round == 3


def test_released_minibatch_sgd_cuts_long_models():
    """Models are cut to the length 1 / sqrt(penalty), which one large step exceeds."""
    with jax.enable_x64(True):
        method = dual_method(algorithms.minibatch_sgd, fidelity="released", scaling=50.0)
        state, _ = run_rounds(method, PRESENCE[:1])
    lengths = np.linalg.norm(state.clients.weights, axis=1)
    np.testing.assert_allclose(lengths, 1 / np.sqrt(PENALTY), rtol=1e-6)


def test_what_mocha_reports():
    """MOCHA reports its steps and the values of the problem.

    The steps are those of all nodes that came, and those of the slowest of them.
    """
    with jax.enable_x64(True):
        method = dual_method(algorithms.mocha, passes=1.5)
        state, info = run_rounds(method, PRESENCE[:2])
    assert info["num_steps"] == 6 + 7 and info["slowest_steps"] == 7
    assert info["num_examples"] == 11 and state.round == 2
    bound = np.max(np.abs(SIGMA).sum(axis=1) / np.diag(SIGMA))
    np.testing.assert_allclose(info["sigma_prime"], bound, rtol=1e-6)
    losses, primal = hinge_primal(state.clients.weights)
    np.testing.assert_allclose(info["loss"], losses.mean(), rtol=1e-6)
    np.testing.assert_allclose(info["primal"], primal, rtol=1e-6)
    sums = np.array(
        [
            a[: len(y)] @ x / len(y)
            for a, x, y in zip(state.clients.alpha, INPUTS, LABELS, strict=True)
        ]
    )
    means = [(a[: len(y)] @ y) / len(y) for a, y in zip(state.clients.alpha, LABELS, strict=True)]
    value = np.sum(means) - np.sum(sums * (SIGMA @ sums)) / (2 * PENALTY)
    np.testing.assert_allclose(info["dual"], value, rtol=1e-6)
    np.testing.assert_allclose(info["gap"], primal - value, rtol=1e-5)
    np.testing.assert_allclose(state.clients.weights, SIGMA @ sums / PENALTY, rtol=1e-6)


def test_minibatch_sdca_is_scaled_by_all_steps():
    """Dual variables are maximised at the models that the round starts from.

    Only a part of the change is applied, and at most all of it.
    """
    scalings = np.array([2.0, 4.0, 1000.0])
    federation = federate(INPUTS, LABELS)

    @jax.jit
    @jax.vmap
    def run(scaling):
        method = dual_method(algorithms.minibatch_sdca, scaling=scaling)
        cohort = sampling.make_cohort(federation, jnp.arange(3))
        state, info = method.round(method.init(KEY), cohort, KEY)
        return state.clients.alpha, info["num_steps"]

    with jax.enable_x64(True):
        alphas, steps = run(scalings)
    np.testing.assert_array_equal(steps, 11)
    best = np.zeros((3, 5))
    for task, (x, y) in enumerate(zip(INPUTS, LABELS, strict=True)):
        curvature = SIGMA[task, task] / PENALTY * np.square(x).sum(axis=1) / len(y)
        best[task, : len(y)] = y * np.clip(1 / curvature, 0, 1)
    for alpha, share in zip(alphas, (2 / 11, 4 / 11, 1.0), strict=True):
        np.testing.assert_allclose(alpha, share * best, rtol=1e-6)
