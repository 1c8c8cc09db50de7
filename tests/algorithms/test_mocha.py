"""MOCHA: golden values, an independent numpy twin, and what the theory promises."""

import json
import pathlib

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from helpers import assert_trees_close, poisoned
from hypothesis import given, settings
from mocha_problems import every_fourth_is_test, federate, reference_data, related_tasks

from experiments.benchmarks.mocha_numpy import Twin
from fedjax_mtl import make_execution, simulate
from fedjax_mtl.algorithms import (
    cocoa,
    global_model,
    local_models,
    minibatch_sdca,
    minibatch_sgd,
    mocha,
)
from fedjax_mtl.algorithms._mocha import with_later_task
from fedjax_mtl.core import sampling
from fedjax_mtl.relations import covariance
from fedjax_mtl.rounds.dual import check_tasks, objective
from fedjax_mtl.rounds.dual_ascent import (
    Subproblem,
    coordinate_ascent,
    inexactness_bound,
    local_gap,
    local_objective,
)
from fedjax_mtl.tasks import dual

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
TINY = json.loads((GOLDEN / "mocha_tiny.json").read_text())
CURVES = json.loads((GOLDEN / "mocha_small_curves.json").read_text())
LOSSES = {
    "hinge": dual.hinge(),
    "smoothed_hinge": dual.smoothed_hinge(0.5),
    "squared": dual.squared(),
    "logistic": dual.logistic(),
}


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def tiny_federation(loss):
    labels = TINY["inputs"]["y_regression" if loss == "squared" else "y"]
    return federate([np.array(x) for x in TINY["inputs"]["X"]], [np.array(y) for y in labels])


def make(federation, loss, relationship, **changes):
    """MOCHA in double precision on a federation."""
    arguments = {
        "sizes": federation.sizes,
        "capacity": federation.capacity,
        "features": federation.examples["inputs"].shape[1],
        "penalty": 0.1,
        "dtype": jnp.float64,
        **changes,
    }
    return mocha(
        LOSSES[loss] if isinstance(loss, str) else loss, relationship=relationship, **arguments
    )


def cohort_with(federation, budgets=None, present=None):
    present = None if present is None else jnp.asarray(present)
    cohort = sampling.make_cohort(federation, jnp.arange(federation.num_clients), present)
    return cohort if budgets is None else cohort._replace(budgets=jnp.asarray(budgets, jnp.int32))


# --- Golden values.


@pytest.mark.parametrize(
    "name", [name for name, case in TINY["cases"].items() if "optimum" in case and "loss" in case]
)
def test_tiny_rounds(name):
    case = TINY["cases"][name]
    federation = tiny_federation(case["loss"])
    algorithm = make(
        federation,
        case["loss"],
        covariance.given(TINY["inputs"]["Sigma"]),
        aggregation=case["gamma"],
        order="cyclic",
        passes=10,
    )
    state, one_round = algorithm.init(jax.random.key(0)), jax.jit(algorithm.round)
    np.testing.assert_allclose(state.sigma_prime, case["sigma_prime"], rtol=1e-10)
    tolerance = {"rtol": 1e-7 if case["loss"] == "logistic" else 1e-9, "atol": 1e-11}
    for row in case["rounds"]:
        dropped = np.array(row["local_steps"]) == 0
        before = state
        state, metrics = one_round(
            state, cohort_with(federation, row["local_steps"], ~dropped), jax.random.key(1)
        )
        for task, alpha in enumerate(row["alpha"]):
            np.testing.assert_allclose(state.clients.alpha[task, : len(alpha)], alpha, **tolerance)
        np.testing.assert_allclose(state.clients.weights.T, row["W"], **tolerance)
        for value in ("primal", "dual", "gap"):
            np.testing.assert_allclose(metrics[value], row[value], **tolerance)
        thetas = measured_inexactness(LOSSES[case["loss"]], federation, before, state, case)
        for theta, expected in zip(thetas, row["theta"], strict=True):
            if expected is not None:
                assert abs(theta - expected) < 1e-6
    state = simulate(algorithm, federation, num_rounds=200).state
    state = jax.tree.map(lambda x: x[0], state)
    value = objective(LOSSES[case["loss"]], 0.1, state, federation)
    np.testing.assert_allclose(value.primal, case["optimum"]["primal_mocha_long_run"], rtol=1e-10)
    np.testing.assert_allclose(state.clients.weights.T, case["optimum"]["W"], atol=1e-7)


def measured_inexactness(loss, federation, before, after, case):
    """Theta of every node, by solving its subproblem with thousands of passes.

    The bound must lie above it.
    """
    for task in range(federation.num_clients):
        rows = federation.indices[task]
        curvature = before.sigma_prime * before.covariance[task, task] / 0.1
        problem = Subproblem(
            federation.examples["inputs"][rows],
            federation.examples["labels"][rows],
            federation.sizes[task],
            before.clients.alpha[task],
            before.clients.weights[task],
            curvature,
        )
        yield _theta(loss, problem, after.clients.alpha[task], case["gamma"])


def _theta(loss, problem, alpha, gamma):
    change = (alpha - problem.alpha) / gamma
    order = jnp.arange(problem.alpha.shape[0])
    exact = jax.jit(
        lambda problem: coordinate_ascent(loss, problem, order, jnp.int32(12000), 12000).alpha
    )(problem)
    best = local_objective(loss, problem, exact)
    assert float(local_gap(loss, problem, exact)) < 1e-9
    start = local_objective(loss, problem, jnp.zeros_like(change))
    theta = (local_objective(loss, problem, change) - best) / (start - best)
    if start - best > 1e-10:
        assert inexactness_bound(loss, problem, change) >= theta - 1e-7
    return float(theta)


def test_too_small_sigma_prime_diverges():
    case = TINY["cases"]["squared_sigma_prime_too_small_diverges"]
    inputs = [np.array(TINY["inputs"]["X"][2])] * 3
    federation = federate(inputs, [np.array(TINY["inputs"]["y_regression"][2])] * 3)
    for name in ("row_sum_bound", "one"):
        algorithm = make(
            federation,
            "squared",
            covariance.given(case["Sigma"]),
            sigma_prime=case[name]["sigma_prime"],
            order="cyclic",
            passes=10,
        )
        rounds = case[name]["rounds"]
        metrics = simulate(algorithm, federation, num_rounds=len(rounds)).metrics
        for value in ("primal", "dual"):
            np.testing.assert_allclose(metrics[value][0], [row[value] for row in rounds], rtol=1e-8)


def test_hinge_with_an_unsafe_sigma_prime():
    case = TINY["cases"]["hinge_sigma_prime_1"]
    federation = tiny_federation("hinge")
    algorithm = make(
        federation,
        "hinge",
        covariance.given(TINY["inputs"]["Sigma"]),
        sigma_prime=1.0,
        order="cyclic",
    )
    metrics = simulate(algorithm, federation, num_rounds=len(case["rounds"])).metrics
    np.testing.assert_allclose(
        metrics["gap"][0], [row["gap"] for row in case["rounds"]], atol=1e-10
    )


def test_learned_relation_changes_the_objective():
    update = TINY["sigma_updates"]["mtrl_trace1"]
    rounds = TINY["cases"]["hinge_full_passes"]["rounds"]
    weights = np.array(TINY["sigma_updates"]["W_used"]).T
    count = next(
        i + 1 for i, row in enumerate(rounds) if np.allclose(np.array(row["W"]).T, weights)
    )
    federation = tiny_federation("hinge")
    first = covariance.given(TINY["inputs"]["Sigma"])
    learned = covariance.task_relationship()._replace(init=first.init)
    for fidelity, expected in (("paper", "primal_recomputed"), ("released", "primal_if_W_kept")):
        algorithm = make(
            federation,
            "hinge",
            learned,
            order="cyclic",
            relationship_every=count,
            fidelity=fidelity,
        )
        sim = simulate(algorithm, federation, num_rounds=count)
        np.testing.assert_allclose(sim.metrics["primal"][0, -1], update[expected], rtol=1e-8)
        np.testing.assert_allclose(sim.state.sigma_prime[0], update["sigma_prime"], rtol=1e-8)
        if fidelity == "paper":
            np.testing.assert_allclose(
                sim.metrics["dual"][0, -1], update["dual_recomputed"], rtol=1e-8
            )
            np.testing.assert_allclose(
                sim.state.clients.weights[0].T, update["W_recomputed"], rtol=1e-8
            )


def rotated(period):
    """The golden runs' order of coordinates.

    In round r of an outer iteration, step s takes coordinate ``(s + 7 r) mod n``. All of them count
    from 1.
    """

    def order(key, round_index, size, capacity):
        n = jnp.maximum(size, 1)
        return ((jnp.arange(capacity) + 1) % n + 7 * (round_index % period + 1)) % n

    return order


OFFICIAL = {
    "mocha_w_update": (mocha, {}),
    "mbsdca": (minibatch_sdca, {}),
    "mbsgd": (minibatch_sgd, {"fidelity": "released"}),
    "cocoa_theta_0p5": (cocoa, {"inexactness": 0.5, "fidelity": "released"}),
    "cocoa_theta_0p01": (cocoa, {"inexactness": 0.01, "fidelity": "released"}),
}


def small_settings(train):
    return {
        "sizes": train.sizes,
        "capacity": train.capacity,
        "features": 9,
        "penalty": 1e-3,
        "dtype": jnp.float64,
    }


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_curves(name):
    train, test = every_fourth_is_test(reference_data("mocha_small"))
    factory, changes = OFFICIAL[name]
    algorithm = factory(
        dual.hinge(),
        relationship=covariance.independent(),
        order=rotated(10**6),
        **small_settings(train),
        **changes,
    )
    rows = [row for row in CURVES[name]["curve"] if row["round"] > 0]
    metrics = simulate(algorithm, train, num_rounds=rows[-1]["round"]).metrics
    for row in rows:
        for value in {"primal", "dual", "gap"} & set(row) & set(metrics):
            expected, ours = row[value], metrics[value][0, row["round"] - 1]
            np.testing.assert_allclose(
                ours, expected, rtol=1e-8 if row["round"] <= 50 else 1e-6, atol=1e-9
            )
        if "max_its" in row and row["round"] < len(metrics["slowest_steps"][0]):
            assert metrics["slowest_steps"][0, row["round"]] + 1 == row["max_its"]


@pytest.mark.parametrize("name", ["mocha_full_official", "mocha_full_recomputed_W"])
def test_official_alternation(name):
    train, test = every_fourth_is_test(reference_data("mocha_small"))
    algorithm = mocha(
        dual.hinge(),
        relationship=covariance.task_relationship(),
        relationship_every=20,
        passes=0.5,
        order=rotated(20),
        fidelity="released" if name == "mocha_full_official" else "paper",
        **small_settings(train),
    )
    sim = simulate(algorithm, train, num_rounds=220)
    for row in CURVES[name]["curve"][1:]:
        index = 20 * row["outer"] - 1
        np.testing.assert_allclose(sim.metrics["primal"][0, index], row["primal"], rtol=1e-6)
        np.testing.assert_allclose(sim.metrics["dual"][0, index], row["dual"], rtol=1e-6)
    final = CURVES[name]["final"]
    np.testing.assert_allclose(
        sim.state.covariance[0, 0, :5], final["Sigma_row0_first5"], rtol=1e-5
    )
    np.testing.assert_allclose(sim.state.sigma_prime[0], final["rho"], rtol=1e-5)
    if name == "mocha_full_official":
        errors = test_errors(sim.state.clients.weights[0], test)
        assert np.isfinite(errors)


def test_errors(weights, test):
    """Mean over tasks of the test error."""
    inputs, labels = np.asarray(test.examples["inputs"]), np.asarray(test.examples["labels"])
    rows = [np.asarray(own[:size]) for own, size in zip(test.indices, test.sizes, strict=True)]
    return np.mean(
        [
            np.mean(np.sign(inputs[r] @ w) != labels[r])
            for r, w in zip(rows, np.asarray(weights), strict=True)
        ]
    )


test_errors.__test__ = False


def test_small_set_reaches_the_optimum():
    train, _ = every_fourth_is_test(reference_data("mocha_small"))
    algorithm = mocha(dual.hinge(), relationship=covariance.independent(), **small_settings(train))
    metrics = simulate(algorithm, train, num_rounds=4000).metrics
    np.testing.assert_allclose(
        metrics["primal"][0, -1], CURVES["optimum_fixed_Omega"]["primal_generic_solver"], rtol=1e-9
    )
    assert metrics["gap"][0, -1] < 1e-9


@pytest.mark.claim
def test_school_optimum():
    """The figures of the reference's School regression, round by round and at the optimum."""
    data = reference_data("school")
    inputs = data["X"].astype(float)
    fourth = np.concatenate([np.arange(1, n + 1) % 4 == 0 for n in data["task_sizes"]])
    mean, std = inputs[~fourth, :27].mean(0), inputs[~fourth, :27].std(0)
    inputs[:, :27] = (inputs[:, :27] - mean) / std
    train, test = every_fourth_is_test(data, inputs)
    labels = train.examples["labels"] - np.asarray(data["y"], float)[~fourth].mean()
    train, test = (f._replace(examples={**f.examples, "labels": labels}) for f in (train, test))
    algorithm = mocha(
        dual.squared(),
        relationship=covariance.mean_regularised(1.0, 2.0, 0.1),
        order="cyclic",
        **{**small_settings(train), "features": 28, "penalty": 1.0},
    )
    sim = simulate(algorithm, train, num_rounds=500)
    np.testing.assert_allclose(sim.state.sigma_prime[0], 18.358490566, rtol=1e-9)
    expected = {
        1: (7985.655374, 4060.399328),
        10: (7298.033910, 6735.021560),
        500: (7102.419380, 7101.957008),
    }
    for round_index, values in expected.items():
        ours = [sim.metrics[value][0, round_index - 1] for value in ("primal", "dual")]
        np.testing.assert_allclose(ours, values, rtol=1e-8)
    tight = mocha(
        dual.squared(),
        relationship=covariance.mean_regularised(1.0, 2.0, 0.1),
        sigma_prime="eigenvalue",
        passes=5,
        **{**small_settings(train), "features": 28, "penalty": 1.0},
    )
    metrics = simulate(tight, train, num_rounds=1500).metrics
    np.testing.assert_allclose(metrics["primal"][0, -1], 7102.171784, rtol=1e-8)


@pytest.mark.claim
@pytest.mark.parametrize(
    ("coupling", "optimum", "rounds"),
    [
        (0.0, 5.44380818, 60),
        (0.01, 5.70923257, 100),
        (0.1, 6.02083461, 500),
        (100.0, 6.28966088, 1500),
    ],
)
def test_landmine_optima(coupling, optimum, rounds):
    data = reference_data("landmine")
    inputs = np.concatenate([data["X"], np.ones((len(data["X"]), 1))], axis=1)
    train, _ = every_fourth_is_test(data, inputs)
    algorithm = mocha(
        dual.logistic(),
        relationship=covariance.mean_regularised(1.0, coupling, 1e-3),
        sigma_prime="eigenvalue",
        passes=5,
        **{**small_settings(train), "features": 10, "penalty": 1.0},
    )
    metrics = simulate(algorithm, train, num_rounds=rounds).metrics
    np.testing.assert_allclose(metrics["dual"][0, -1], optimum, rtol=2e-5)
    np.testing.assert_allclose(metrics["primal"][0, -1], optimum, rtol=2e-5)


# --- Against independent solvers.


@pytest.mark.parametrize("passes", [0.4, 1.0, 2.6])
@pytest.mark.parametrize("loss", ["hinge", "squared"])
def test_equals_the_slow_twin(loss, passes):
    inputs, labels = related_tasks(regression=loss == "squared")
    federation = federate(inputs, labels)
    rng = np.random.default_rng(3)
    root = rng.normal(size=(6, 6))
    sigma = root @ root.T + np.eye(6)
    twin = Twin(loss, inputs, labels, sigma, 0.2)
    algorithm = make(
        federation, loss, covariance.given(sigma), penalty=0.2, order="cyclic", passes=passes
    )
    state, one_round = algorithm.init(jax.random.key(0)), jax.jit(algorithm.round)
    for _ in range(12):
        budgets = rng.integers(0, int(13 * passes) + 1, 6)
        steps = np.minimum(budgets, np.floor(passes * np.asarray(federation.sizes)).astype(int))
        state, metrics = one_round(
            state, cohort_with(federation, budgets, budgets > 0), jax.random.key(0)
        )
        twin.round(steps)
        np.testing.assert_allclose(state.clients.weights, twin.weights, atol=1e-10)
        np.testing.assert_allclose(
            [metrics["primal"], metrics["dual"]], twin.objective(), rtol=1e-9
        )
        assert metrics["num_steps"] == steps.sum()


def dual_optimum(loss, inputs, labels, covariance, penalty):
    """The maximum of the dual by L-BFGS-B, a generic solver for smooth problems in a box."""
    sizes = np.array([len(y) for y in labels])
    y = np.concatenate(labels)
    task = np.repeat(np.arange(len(sizes)), sizes)
    x = np.concatenate(inputs)
    n = sizes[task]
    gram = covariance[task][:, task] * (x @ x.T) / np.outer(n, n) / penalty

    def negative(alpha):
        value = loss.conjugate(jnp.asarray(alpha), jnp.asarray(y))
        slope = jax.vmap(jax.grad(loss.conjugate))(jnp.asarray(alpha), jnp.asarray(y))
        return float(np.sum(np.asarray(value) / n) + alpha @ gram @ alpha / 2), np.asarray(
            slope
        ) / n + gram @ alpha

    edge = 1e-12 if loss.name == "logistic" else 0.0
    bounds = None
    if loss.labels == "signs":
        bounds = [(edge, 1 - edge) if sign > 0 else (-1 + edge, -edge) for sign in y]
    start = np.where(np.array(y) > 0, 0.5, -0.5) if bounds else np.zeros(len(y))
    options = {"maxiter": 20000, "maxfun": 100000, "ftol": 1e-16, "gtol": 1e-12, "maxcor": 60}
    found = scipy.optimize.minimize(
        negative, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options
    )
    return -found.fun


@pytest.mark.parametrize("loss", LOSSES)
def test_gap_closes_at_a_generic_solvers_optimum(loss):
    inputs, labels = related_tasks(seed=2, regression=loss == "squared")
    federation = federate(inputs, labels)
    relation = covariance.mean_regularised(0.1, 0.3, 0.05)
    sigma = np.asarray(relation.init(6, jnp.float64))
    algorithm = make(federation, loss, relation, passes=20, sigma_prime="eigenvalue")
    metrics = simulate(algorithm, federation, num_rounds=400).metrics
    assert metrics["gap"][0, -1] < 1e-9
    expected = dual_optimum(LOSSES[loss], inputs, labels, sigma, 0.1)
    np.testing.assert_allclose(metrics["primal"][0, -1], expected, rtol=1e-7)
    assert metrics["primal"][0, -1] >= expected - 1e-9  # weak duality


def test_limits_of_mean_regularisation():
    """Without coupling every task is solved alone.

    Much coupling gives the pooled problem, in which every task counts alike.
    """
    inputs, labels = related_tasks(seed=4, regression=True)
    federation = federate(inputs, labels)

    def solve(coupling, rounds):
        relation = covariance.mean_regularised(0.1, coupling, 0.05)
        algorithm = make(federation, "squared", relation, passes=10, sigma_prime="eigenvalue")
        return simulate(algorithm, federation, num_rounds=rounds).state.clients.weights[0]

    for task, weights in enumerate(solve(0.0, 60)):
        x, y = inputs[task], labels[task]
        ridge = np.linalg.solve(x.T @ x / len(y) + 0.1 * np.eye(4), x.T @ y / len(y))
        np.testing.assert_allclose(weights, ridge, atol=1e-8)
    gram = sum(x.T @ x / len(x) for x in inputs) + 6 * 0.1 * np.eye(4)
    pooled = np.linalg.solve(
        gram, sum(x.T @ y / len(y) for x, y in zip(inputs, labels, strict=True))
    )
    np.testing.assert_allclose(solve(1e4, 400), np.tile(pooled, (6, 1)), atol=1e-4)


# --- What the theory promises.


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    loss=st.sampled_from(sorted(LOSSES)),
    aggregation=st.sampled_from([0.3, 1.0]),
    bound=st.sampled_from(["row_sum", "eigenvalue"]),
)
def test_dual_never_decreases(seed, loss, aggregation, bound):
    """The dual never decreases under random budgets and drops with a safe sigma'.

    Dual variables stay feasible, and absent nodes leave theirs alone.
    """
    federation, algorithm, one_round = _monotone(loss, aggregation, bound)
    rng = np.random.default_rng(seed)
    state, previous = algorithm.init(jax.random.key(0)), -np.inf
    for round_index in range(6):
        present = rng.random(6) > 0.4
        cohort = cohort_with(federation, rng.integers(0, 30, 6), present)
        before, (state, metrics) = (
            state,
            one_round(state, cohort, jax.random.key(seed + round_index)),
        )
        assert metrics["dual"] >= previous - 1e-10
        assert metrics["gap"] >= -1e-10
        # The mean over nobody is no number.
        assert not present.any() or 0 <= metrics["inexactness"] <= 1
        np.testing.assert_array_equal(state.clients.alpha[~present], before.clients.alpha[~present])
        if loss != "squared":
            product = np.asarray(state.clients.alpha) * padded_labels(federation)
            assert product.min() >= -1e-12 and product.max() <= 1 + 1e-12
        consistent = state.covariance @ state.dual_sums / 0.1
        np.testing.assert_allclose(state.clients.weights, consistent, atol=1e-10)
        previous = metrics["dual"]


def padded_labels(federation):
    real = np.arange(federation.capacity) < np.asarray(federation.sizes)[:, None]
    return np.where(
        real, np.asarray(federation.examples["labels"])[np.asarray(federation.indices)], 0
    )


_COMPILED = {}


def _monotone(loss, aggregation, bound):
    if (loss, aggregation, bound) not in _COMPILED:
        inputs, labels = related_tasks(seed=7, regression=loss == "squared")
        federation = federate(inputs, labels)
        root = np.random.default_rng(8).normal(size=(6, 6))
        relation = covariance.given(root @ root.T + 0.1 * np.eye(6))
        algorithm = make(
            federation,
            loss,
            relation,
            aggregation=aggregation,
            sigma_prime=bound,
            passes=2,
            measure_inexactness=True,
        )
        _COMPILED[loss, aggregation, bound] = federation, algorithm, jax.jit(algorithm.round)
    return _COMPILED[loss, aggregation, bound]


def test_padding_and_execution_change_nothing():
    inputs, labels = related_tasks(seed=5)
    relation = covariance.task_relationship(ridge=0.1)
    results = []
    for capacity, mode in ((None, "vmap"), (40, "vmap"), (None, "map")):
        federation = federate(inputs, labels, capacity)
        algorithm = make(
            federation,
            "hinge",
            relation,
            max_steps=11,
            relationship_every=3,
            execution=make_execution(mode),
        )
        results.append(simulate(algorithm, federation, num_rounds=9))
    for other in results[1:]:
        np.testing.assert_allclose(
            other.state.clients.weights, results[0].state.clients.weights, atol=1e-12
        )
        np.testing.assert_allclose(other.metrics["gap"], results[0].metrics["gap"], atol=1e-12)


def test_order_of_tasks_does_not_matter():
    inputs, labels = related_tasks(seed=5)
    permutation = np.array([3, 1, 5, 0, 4, 2])
    root = np.random.default_rng(1).normal(size=(6, 6))
    sigma = root @ root.T + np.eye(6)
    straight, shuffled = (
        federate(inputs, labels),
        federate([inputs[p] for p in permutation], [labels[p] for p in permutation]),
    )
    first = make(straight, "hinge", covariance.given(sigma), order="cyclic")
    second = make(
        shuffled, "hinge", covariance.given(sigma[permutation][:, permutation]), order="cyclic"
    )
    a = simulate(first, straight, num_rounds=5).state.clients.weights[0]
    b = simulate(second, shuffled, num_rounds=5).state.clients.weights[0]
    np.testing.assert_allclose(a[permutation], b, atol=1e-12)


def test_slots_of_a_cohort_in_any_order():
    inputs, labels = related_tasks(seed=6)
    federation = federate(inputs, labels)
    algorithm = make(federation, "hinge", covariance.mean_regularised(0.1, 1.0, 0.1))
    state = algorithm.init(jax.random.key(0))
    straight, _ = algorithm.round(state, cohort_with(federation), jax.random.key(1))
    ids = jnp.array([4, 0, 5, 2, 1, 3])
    mixed, metrics = algorithm.round(
        state, sampling.make_cohort(federation, ids), jax.random.key(1)
    )
    np.testing.assert_allclose(straight.clients.weights, mixed.clients.weights, atol=1e-14)
    value = objective(LOSSES["hinge"], 0.1, straight, federation)
    np.testing.assert_allclose(metrics["gap"], value.gap, atol=1e-12)


RELATED = {
    "mocha": (mocha, {}),
    "cocoa": (cocoa, {"inexactness": 0.3}),
    "cocoa_released": (cocoa, {"inexactness": 0.3, "fidelity": "released"}),
    "minibatch_sdca": (minibatch_sdca, {"scaling": 40.0}),
    "minibatch_sgd": (minibatch_sgd, {}),
    "minibatch_sgd_released": (minibatch_sgd, {"fidelity": "released"}),
    "global_model": (global_model, {}),
}


def related_method(name, federation):
    factory, changes = RELATED[name]
    if factory is not global_model:
        changes = {**changes, "relationship": covariance.mean_regularised(0.1, 1.0, 0.1)}
    return factory(dual.hinge(), **baseline_settings(federation), **changes)


@pytest.mark.parametrize("name", sorted(set(RELATED) - {"cocoa_released"}))
def test_cohorts_in_any_order_and_absence(name):
    """The order of slots has no influence.

    An absent node acts like one without a budget, and its examples have no influence.
    """
    inputs, labels = related_tasks(seed=6)
    federation = federate(inputs, labels)
    algorithm = related_method(name, federation)
    one_round = jax.jit(algorithm.round)
    present = jnp.array([True, False, True, True, False, True])

    def three_rounds(ids):
        state = algorithm.init(jax.random.key(0))
        for index in range(3):
            there = present if index == 1 else jnp.ones(6, bool)
            cohort = sampling.make_cohort(federation, ids, there[ids])
            state, metrics = one_round(state, cohort, jax.random.key(index))
        return state, metrics

    straight, _ = three_rounds(jnp.arange(6))
    mixed, metrics = three_rounds(jnp.array([4, 0, 5, 2, 1, 3]))
    np.testing.assert_allclose(straight.clients.weights, mixed.clients.weights, atol=1e-12)
    if name == "global_model":
        assert metrics["gap"] >= -1e-10
    elif "sgd" not in name:
        state = algorithm.init(jax.random.key(0))
        state, _ = one_round(state, cohort_with(federation, present=present), jax.random.key(1))
        np.testing.assert_array_equal(state.clients.alpha[~present], 0)


@pytest.mark.parametrize("name", sorted(set(RELATED) - {"global_model"}))
def test_a_diverged_node_counts_as_absent(name):
    """For the models of the others, for its own dual variables, and for what the round reports."""
    federation = federate(*related_tasks(seed=6))
    algorithm = related_method(name, federation)
    one_round = jax.jit(algorithm.round)
    start, _ = one_round(
        algorithm.init(jax.random.key(0)), cohort_with(federation), jax.random.key(0)
    )
    present = jnp.arange(6) != 2
    ours, info = one_round(start, cohort_with(poisoned(federation, 2)), jax.random.key(1))
    absent = cohort_with(federation, present=present)
    theirs, expected = one_round(start, absent, jax.random.key(1))
    assert_trees_close(ours, theirs, rtol=1e-12, atol=1e-14)
    assert info["diverged"] == 1 and info["participants"] == 5
    assert expected["diverged"] == 0 and expected["participants"] == 5
    assert info["num_steps"] == expected["num_steps"] and np.isfinite(info["loss"])


@pytest.mark.parametrize("name", sorted(set(RELATED) - {"global_model"}))
def test_a_round_that_nobody_attends(name):
    federation = federate(*related_tasks(seed=6))
    algorithm = related_method(name, federation)
    one_round = jax.jit(algorithm.round)
    start, _ = one_round(
        algorithm.init(jax.random.key(0)), cohort_with(federation), jax.random.key(0)
    )
    nobody = cohort_with(federation, present=jnp.zeros(6, bool))
    after, info = one_round(start, nobody, jax.random.key(1))
    assert info["participants"] == info["num_steps"] == info["slowest_steps"] == 0
    if "sgd" not in name:  # whose decay needs no data
        np.testing.assert_allclose(after.clients.weights, start.clients.weights, rtol=1e-12)


@pytest.mark.parametrize("name", ["mocha", "minibatch_sdca"])
def test_a_share_of_the_work_is_a_share_of_the_planned_steps(name):
    federation = federate(*related_tasks(seed=6))
    algorithm = related_method(name, federation)
    cohort = cohort_with(federation)._replace(work=jnp.full(6, 0.5, jnp.float32))
    _, info = jax.jit(algorithm.round)(algorithm.init(jax.random.key(0)), cohort, jax.random.key(1))
    assert info["num_steps"] == np.sum(np.floor(0.5 * np.asarray(federation.sizes)))


def products(jaxpr):
    """``(shape, shape, precision)`` of all matrix products, also of inner loops."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            shapes = [operand.aval.shape for operand in equation.invars]
            yield *shapes, equation.params["precision"]
        for inner in jax.core.jaxprs_in_params(equation.params):
            yield from products(inner)


@pytest.mark.parametrize("name", ["mocha", "cocoa", "minibatch_sdca"])
def test_models_are_made_at_full_precision(name):
    """Sigma B, whose factors some devices round unless told not to."""
    federation = federate(*related_tasks(seed=6))
    algorithm = related_method(name, federation)
    state, cohort = algorithm.init(jax.random.key(0)), cohort_with(federation)
    jaxpr = jax.make_jaxpr(algorithm.round)(state, cohort, jax.random.key(0)).jaxpr
    highest = (jax.lax.Precision.HIGHEST,) * 2
    mixing = [precision for a, b, precision in products(jaxpr) if {a, b} == {(6, 6), (6, 4)}]
    assert mixing and all(precision == highest for precision in mixing)


def test_few_steps_keep_minibatch_duals_in_their_domain():
    inputs, labels = related_tasks(seed=6)
    federation = federate(inputs, labels)
    algorithm = related_method("minibatch_sdca", federation)
    state, metrics = algorithm.init(jax.random.key(0)), None
    for index in range(5):
        cohort = cohort_with(federation, jnp.ones(6), jnp.arange(6) < 2)
        state, metrics = algorithm.round(state, cohort, jax.random.key(index))
    product = np.asarray(state.clients.alpha) * padded_labels(federation)
    assert product.min() >= 0 and product.max() <= 1
    assert metrics["gap"] >= 0


def test_clusters_of_nothing():
    for dtype in (jnp.float32, jnp.float64):
        relation = covariance.clustered_tasks(2)
        sigma = relation.update(jnp.zeros((4, 3), dtype), relation.init(4, dtype))
        np.testing.assert_allclose(sigma, 0.5 * np.eye(4))


def test_penalties_are_mapped():
    inputs, labels = related_tasks(seed=6)
    federation = federate(inputs, labels)

    def build(penalty):
        relation = covariance.mean_regularised(penalty, 1.0, 0.1)
        return make(federation, "hinge", relation, penalty=penalty, order="cyclic")

    penalties = jnp.array([0.05, 0.5])
    both = simulate(build, federation, num_rounds=5, hyperparameters={"penalty": penalties})
    alone = simulate(build(0.5), federation, num_rounds=5)
    np.testing.assert_allclose(both.metrics["gap"][1], alone.metrics["gap"], rtol=1e-9)


def test_alternation_never_raises_the_joint_objective():
    """Exact W steps and the Sigma step take turns.

    The joint objective is ``P`` with a ``Sigma`` of trace one.
    """
    inputs, labels = related_tasks(seed=9, low=10, high=20)
    federation = federate(inputs, labels)
    algorithm = make(
        federation,
        "squared",
        covariance.task_relationship(floor=1e-4),
        relationship_every=60,
        passes=5,
        sigma_prime="eigenvalue",
    )
    primal = np.asarray(simulate(algorithm, federation, num_rounds=360).metrics["primal"][0])
    # The last round of an outer iteration already reports the new Sigma, so take the one before.
    before_update = primal[58::60]
    assert (np.diff(before_update) <= 1e-6).all()
    assert before_update[-1] < before_update[0] - 1e-3


def test_dropped_for_ever_converges_to_a_wrong_point():
    inputs, labels = related_tasks(seed=3)
    federation = federate(inputs, labels)
    algorithm = make(federation, "hinge", covariance.mean_regularised(0.1, 1.0, 0.1))
    probability = np.array([1.0, 0, 0, 0, 0, 0])
    sampler = sampling.dropping(sampling.full_participation(), probability)
    everybody = simulate(algorithm, federation, num_rounds=300).metrics
    without = simulate(algorithm, federation, num_rounds=300, sampler=sampler).metrics
    assert everybody["gap"][0, -1] < 1e-3
    assert without["gap"][0, -1] > 0.05
    sampler = sampling.dropping(sampling.full_participation(), 0.5)
    half = simulate(algorithm, federation, num_rounds=600, sampler=sampler).metrics
    assert half["gap"][0, -1] < 1e-3


def test_one_compilation_and_seeds():
    inputs, labels = related_tasks(seed=1)
    federation = federate(inputs, labels)
    traces = []

    def counted(key, round_index, size, capacity):
        traces.append(1)
        return jax.random.permutation(key, capacity)

    inputs = [x[:5] for x in inputs]
    federation = federate(inputs, [y[:5] for y in labels])
    algorithm = make(
        federation, "hinge", covariance.task_relationship(), relationship_every=4, order=counted
    )
    sim = simulate(algorithm, federation, num_rounds=12, eval_every=4, seeds=(0, 1))
    assert len(traces) <= 2  # shapes, then the program
    alone = simulate(algorithm, federation, num_rounds=12, eval_every=4, seeds=(1,))
    np.testing.assert_allclose(
        sim.state.clients.weights[1], alone.state.clients.weights[0], atol=1e-12
    )


@pytest.mark.parametrize("loss", LOSSES)
def test_a_coordinate_step_is_the_maximiser(loss):
    """No other value of the coordinate does better, whatever score and curvature."""
    rng = np.random.default_rng(0)
    count = 500
    y = rng.normal(size=count) if loss == "squared" else rng.choice([-1.0, 1.0], count)
    alpha = y * rng.random(count) ** rng.choice([1, 5, 20], count)
    score, curvature = (
        rng.normal(size=count) * rng.choice([0.1, 3, 30], count),
        10 ** rng.uniform(-3, 4, count),
    )
    law = LOSSES[loss]

    def decrease(new):
        """What a change of the coordinate adds to G."""
        change = new - alpha
        return (
            np.asarray(law.conjugate(jnp.asarray(new), jnp.asarray(y)))
            + score * change
            + curvature / 2 * change**2
        )

    best = np.asarray(law.ascend(*map(jnp.asarray, (alpha, y, score, curvature))))
    for other in (
        alpha,
        *(y * level for level in (0.0, 1e-6, 0.01, 0.3, 0.7, 0.99, 1 - 1e-6, 1.0)),
    ):
        assert (decrease(best) <= decrease(other) + 1e-9 * (1 + np.abs(decrease(best)))).all()
    for shift in (-1e-5, 1e-5):
        near = y * np.clip(y * best + shift, 0, 1) if loss != "squared" else best + shift
        assert (decrease(best) <= decrease(near) + 1e-9 * (1 + np.abs(decrease(best)))).all()


# --- The methods it is compared with.


def baseline_settings(federation):
    return {
        "sizes": federation.sizes,
        "capacity": federation.capacity,
        "features": 4,
        "penalty": 0.1,
        "dtype": jnp.float64,
    }


def test_cocoa_keeps_its_theta():
    inputs, labels = related_tasks(seed=11)
    federation = federate(inputs, labels)
    algorithm = cocoa(
        dual.hinge(),
        inexactness=0.2,
        relationship=covariance.mean_regularised(0.1, 1.0, 0.1),
        measure_inexactness=True,
        **baseline_settings(federation),
    )
    metrics = simulate(algorithm, federation, num_rounds=12).metrics
    assert metrics["worst_inexactness"][0].max() <= 0.2
    assert (np.diff(metrics["dual"][0]) >= -1e-10).all()


@pytest.mark.parametrize("factory", [minibatch_sdca, minibatch_sgd])
def test_minibatch_methods_approach_the_optimum(factory):
    inputs, labels = related_tasks(seed=12)
    federation = federate(inputs, labels)
    relation = covariance.mean_regularised(0.1, 0.2, 0.1)
    reference = make(federation, "hinge", relation, passes=10)
    best = simulate(reference, federation, num_rounds=300).metrics["primal"][0, -1]
    changes = {"scaling": 6.0} if factory is minibatch_sdca else {"scaling": 2.0}
    algorithm = factory(
        dual.hinge(), relationship=relation, **baseline_settings(federation), **changes
    )
    primal = simulate(algorithm, federation, num_rounds=800).metrics["primal"][0]
    assert best - 1e-9 <= primal[-1] < best + 0.02 * (primal[0] - best)


def test_released_minibatch_sgd_by_hand():
    """Two rounds of the code's formula: a constant data step, a decay without penalty, a ball."""
    inputs, labels = related_tasks(seed=12)
    federation = federate(inputs, labels)
    relation = covariance.mean_regularised(0.1, 0.2, 0.1)
    scaling, penalty = 3.0, 0.1
    algorithm = minibatch_sgd(
        dual.hinge(),
        relationship=relation,
        scaling=scaling,
        fidelity="released",
        **baseline_settings(federation),
    )
    precision = np.linalg.inv(np.asarray(relation.init(6, jnp.float64)))
    weights, total = np.zeros((6, 4)), sum(len(y) for y in labels)
    state = algorithm.init(jax.random.key(0))
    for index in range(2):
        gradient = np.stack(
            [-(y * (y * (x @ w) < 1)) @ x for x, y, w in zip(inputs, labels, weights, strict=True)]
        )
        decayed = scaling / (index + 1) * precision @ weights
        weights = weights - decayed - scaling / total * gradient
        norms = np.linalg.norm(weights, axis=1, keepdims=True)
        weights = weights * np.minimum(1, 1 / (np.sqrt(penalty) * norms))
        state, _ = algorithm.round(state, cohort_with(federation), jax.random.key(index))
        np.testing.assert_allclose(state.clients.weights, weights, rtol=1e-9)


def test_global_model_is_the_pooled_problem_and_local_models_are_alone():
    inputs, labels = related_tasks(seed=13, regression=True)
    federation = federate(inputs, labels, 14)
    settings_ = baseline_settings(federation)
    pooled = simulate(
        global_model(dual.squared(), passes=5, **settings_), federation, num_rounds=60
    )
    x, y = np.concatenate(inputs), np.concatenate(labels)
    expected = np.linalg.solve(x.T @ x / len(y) + 0.1 * np.eye(4), x.T @ y / len(y))
    np.testing.assert_allclose(
        pooled.state.clients.weights[0], np.tile(expected, (6, 1)), atol=1e-9
    )
    alone = simulate(local_models(dual.squared(), passes=5, **settings_), federation, num_rounds=60)
    for task, weights in enumerate(alone.state.clients.weights[0]):
        x, y = inputs[task], labels[task]
        ridge = np.linalg.solve(x.T @ x / len(y) + 0.1 * np.eye(4), x.T @ y / len(y))
        np.testing.assert_allclose(weights, ridge, atol=1e-9)


def trained_as_released(inputs, labels, penalty):
    """One SVM by the released code's rule, in numpy.

    It makes at most 500 cyclic passes, until the primal changes by less than 1e-5.
    """
    twin, before = Twin("hinge", [inputs], [labels], np.eye(1), penalty), np.inf
    for _ in range(500):
        twin.round([len(labels)])
        primal = twin.objective()[0]
        if abs(primal - before) < 1e-5:
            break
        before = primal
    return twin.weights[0]


@pytest.mark.parametrize("penalty", [0.003, 0.3])
def test_released_local_and_global_models_stop_where_the_code_does(penalty):
    inputs, labels = related_tasks(seed=17)
    federation = federate(inputs, labels, 14)
    settings_ = {**baseline_settings(federation), "penalty": penalty, "fidelity": "released"}
    alone = simulate(local_models(dual.hinge(), **settings_), federation, num_rounds=1)
    expected = [trained_as_released(x, y, penalty) for x, y in zip(inputs, labels, strict=True)]
    np.testing.assert_allclose(alone.state.clients.weights[0], expected, rtol=1e-9, atol=1e-12)
    pooled = simulate(global_model(dual.hinge(), **settings_), federation, num_rounds=1)
    expected = trained_as_released(np.concatenate(inputs), np.concatenate(labels), penalty)
    np.testing.assert_allclose(
        pooled.state.clients.weights[0], np.tile(expected, (6, 1)), rtol=1e-9
    )


@pytest.mark.parametrize("factory", [local_models, global_model])
def test_unknown_fidelity_of_local_and_global_models(factory):
    federation = federate(*related_tasks(seed=17))
    with pytest.raises(ValueError, match="fidelity must be 'paper' or 'released', got 'code'"):
        factory(dual.hinge(), fidelity="code", **baseline_settings(federation))


@pytest.mark.parametrize(
    "row", CURVES["error_table_fixed_split"]["rows"], ids=lambda row: f"{row['lam']:g}"
)
def test_official_errors_of_local_and_global_models(row):
    train, test = every_fourth_is_test(reference_data("mocha_small"))
    for name, factory in (("local", local_models), ("global", global_model)):
        algorithm = factory(
            dual.hinge(), **{**small_settings(train), "penalty": row["lam"], "fidelity": "released"}
        )
        state = simulate(algorithm, train, num_rounds=1).state
        for part, federation in (("train", train), ("test", test)):
            np.testing.assert_allclose(
                mean_error(state.clients.weights[0], federation), row[f"{name}_{part}"], atol=1e-9
            )


def mean_error(weights, federation):
    """Mean error over tasks; a score of 0 counts as wrong."""
    inputs, labels = (np.asarray(federation.examples[name]) for name in ("inputs", "labels"))
    errors = [
        np.mean(np.sign(inputs[rows[:size]] @ own) != labels[rows[:size]])
        for rows, size, own in zip(federation.indices, federation.sizes, weights, strict=True)
    ]
    return np.mean(errors)


# --- A task that arrives later.


def test_newcomer_minimises_its_own_part():
    inputs, labels = related_tasks(num_tasks=7, seed=14)
    federation, newcomer = federate(inputs[:6], labels[:6]), federate(inputs[6:], labels[6:])
    sigma = np.asarray(covariance.mean_regularised(0.1, 1.0, 0.1).init(7, jnp.float64))
    relation = covariance.mean_regularised(0.1, 1.0, 0.1)
    algorithm = make(federation, "logistic", relation, passes=5)
    state = jax.tree.map(lambda x: x[0], simulate(algorithm, federation, num_rounds=100).state)
    adapted = algorithm.adapt(state, newcomer, jax.random.key(5))
    precision = np.linalg.inv(sigma)
    others = np.asarray(state.clients.weights)

    def own_part(w):
        regulariser = precision[6, 6] * w @ w + 2 * w @ (precision[6, :6] @ others)
        return np.mean(np.logaddexp(0, -labels[6] * (inputs[6] @ w))) + 0.1 / 2 * regulariser

    best = scipy.optimize.minimize(own_part, np.zeros(4), method="BFGS", options={"gtol": 1e-10})
    np.testing.assert_allclose(adapted.clients.weights[0], best.x, atol=1e-5)
    scores = algorithm.predict(adapted, jnp.array([0]), inputs[6][None])
    np.testing.assert_allclose(scores[0], inputs[6] @ best.x, atol=1e-4)


def test_later_task_joins():
    inputs, labels = related_tasks(num_tasks=7, seed=15)
    capacity = max(map(len, labels))
    early, everybody = (
        federate(inputs[:6], labels[:6], capacity),
        federate(inputs, labels, capacity),
    )
    relation = covariance.task_relationship(ridge=0.1)
    first = make(early, "hinge", relation, relationship_every=10)
    state = jax.tree.map(lambda x: x[0], simulate(first, early, num_rounds=20).state)
    second = make(everybody, "hinge", relation, relationship_every=10)
    grown = with_later_task(state, relation, 0.1)
    np.testing.assert_allclose(jnp.trace(grown.covariance), jnp.trace(state.covariance))
    sim = simulate(
        second,
        everybody,
        num_rounds=60,
        state=jax.tree.map(lambda x: x[None], grown),
        start_round=20,
    )
    assert sim.metrics["gap"][0, -1] < sim.metrics["gap"][0, 0]
    assert np.abs(sim.state.clients.weights[0, 6]).max() > 0.01
    adapted = first.adapt(state, federate(inputs[6:], labels[6:]), jax.random.key(0))
    assert np.isfinite(adapted.clients.weights).all()


# --- Bad input.


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([np.ones(3), np.array([1.0, -1.0])], "all 3 training labels of task 0 are 1"),
        ([np.array([1.0, -1.0]), np.ones(1)], "task 1 has 1 training example"),
        ([np.array([1.0, -1.0]), np.array([0.0, 1.0])], "task 1 has label 0"),
    ],
)
def test_tasks_that_teach_nothing(labels, message):
    federation = federate([np.ones((len(y), 2)) for y in labels], labels)
    with pytest.raises(ValueError, match=message):
        check_tasks(federation, dual.hinge())


def test_regression_has_no_classes():
    check_tasks(federate([np.ones((3, 2))], [np.ones(3)]), dual.squared())


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        ([[1.0, 0.5], [0.2, 1.0]], r"not symmetric: entry \(0, 1\) is 0.5"),
        ([[1.0, 2.0], [2.0, 1.0]], "not positive definite: its smallest eigenvalue is -1"),
        ([[1.0, np.nan], [np.nan, 1.0]], "not finite"),
        ([[1.0, 0.0]], "2 tasks|1 tasks"),
    ],
)
def test_bad_relations(matrix, message):
    with pytest.raises(ValueError, match=message):
        covariance.given(np.array(matrix))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"relationship": covariance.given(np.eye(3))}, "6 tasks need"),
        ({"fidelity": "exact"}, "fidelity must be"),
        ({"passes": 0}, "passes is 0"),
        ({"inexactness": 1.0}, "inexactness is 1.0"),
        ({"tolerance": 0.0}, "tolerance is 0.0"),
        ({"tolerance": 1e-5, "inexactness": 0.5}, "give one of them"),
        ({"aggregation": 2.0}, "aggregation is 2.0"),
        ({"sigma_prime": "tight"}, "unknown sigma_prime 'tight'"),
        ({"relationship_every": 5}, "this relationship is fixed"),
        ({"relationship": covariance.clustered_tasks(9), "penalty": 1.0}, "9 clusters of 6 tasks"),
    ],
)
def test_bad_settings(changes, message):
    inputs, labels = related_tasks()
    federation = federate(inputs, labels)
    arguments = {"relationship": covariance.independent(), **changes}
    with pytest.raises(ValueError, match=message):
        make(federation, "hinge", **arguments).init(jax.random.key(0))


def test_double_precision_needs_x64():
    federation = tiny_federation("hinge")
    with jax.enable_x64(False), pytest.raises(ValueError, match="x64"):
        make(federation, "hinge", covariance.independent())


def test_bad_generators():
    for make_relation in (
        lambda: covariance.mean_regularised(1.0, 1.0, 0.0),
        lambda: covariance.clustered_tasks(0),
        lambda: covariance.sparse_precision(1.0, -1.0),
        lambda: dual.smoothed_hinge(0.0),
        lambda: sampling.dropping(sampling.full_participation(), 1.5),
        lambda: sampling.fraction_of_data(0.9, 0.1),
    ):
        with pytest.raises(ValueError):
            make_relation()
