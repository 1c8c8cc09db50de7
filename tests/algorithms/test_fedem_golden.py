"""FedEM against golden values in float64.

They were computed by an independent program and checked against the official classes.
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform

from fedjax_mtl import Solver, algorithms, tasks
from fedjax_mtl.algorithms._fedem import responsibilities, update_mixture
from fedjax_mtl.clients import training
from fedjax_mtl.core import batching, federation, sampling
from fedjax_mtl.models import Model
from fedjax_mtl.server.clusters import bipartition, cosine_distances, split_norms

GOLDEN = json.loads((pathlib.Path(__file__).parents[1] / "golden" / "fedem.json").read_text())
CASES = [case["name"] for case in GOLDEN["cases"]]
TOLERANCE = {"rtol": 0, "atol": 1e-9}


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def case_named(name):
    return next(case for case in GOLDEN["cases"] if case["name"] == name)


def affine_model(weights, bias):
    """outputs = x W^T + b, the layout of the golden file."""
    start = {"W": jnp.asarray(weights), "b": jnp.asarray(bias)}
    return Model(lambda key: start, lambda params, x, key=None: x @ params["W"].T + params["b"])


class Problem:
    """A golden case as a federation, a model and a task."""

    def __init__(self, case):
        self.inputs = case["inputs"]
        self.lr = self.inputs["lr"]
        self.components = self.inputs["n_components"]
        binary = self.inputs["n_classes"] == 2
        self.task = tasks.binary_classification() if binary else tasks.classification()
        self.model = affine_model(self.inputs["W"][0], self.inputs["b"][0])
        self.params = {"W": jnp.array(self.inputs["W"]), "b": jnp.array(self.inputs["b"])}
        self.train = self.make(self.inputs["X"], self.inputs["y"])
        self.test = self.make(self.inputs["X_test"], self.inputs["y_test"])

    def make(self, xs, ys):
        sizes = [len(y) for y in ys]
        rows = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
        examples = {
            "inputs": np.concatenate([np.array(x) for x in xs]),
            "labels": np.concatenate(ys),
        }
        return federation.make_federation(examples, rows)

    def fedem(self, optimizer, **settings):
        return algorithms.fedem(
            self.model,
            self.task,
            num_clients=self.train.num_clients,
            num_components=self.components,
            solver=Solver(optimizer, batching.epochs(1, None)),
            **settings,
        )

    def state(self, algorithm):
        """The algorithm's initial state with the golden parameters and mixture weights."""
        state = algorithm.init(jax.random.key(0))
        params = self.params
        if state.params["W"].ndim == 4:
            count = self.train.num_clients
            params = jax.tree.map(lambda p: jnp.broadcast_to(p, (count, *p.shape)), params)
        clients_state = state.clients._replace(mixture=jnp.array(self.inputs["pi"]))
        return state._replace(params=params, clients=clients_state)

    def cohort(self):
        return sampling.full_participation()(jax.random.key(0), jnp.int32(0), self.train)


@pytest.mark.parametrize("name", CASES)
def test_e_step_and_mixture(name):
    case = case_named(name)
    problem, expected = Problem(case), case["one_round_plain_sgd"]
    losses = tasks.example_losses(problem.model, problem.task)
    for t in range(problem.train.num_clients):
        x, y = jnp.array(problem.inputs["X"][t]), jnp.array(problem.inputs["y"][t])
        values = jax.vmap(lambda p, x=x, y=y: losses(p, {"inputs": x, "labels": y}))(problem.params)
        np.testing.assert_allclose(values, expected["losses"][t], **TOLERANCE)
        prior = jnp.array(problem.inputs["pi"][t])
        q = responsibilities(values, prior)
        np.testing.assert_allclose(q, expected["q"][t], **TOLERANCE)
        pi = update_mixture(q, jnp.ones(len(y), bool), prior)
        np.testing.assert_allclose(pi, expected["pi_new"][t], **TOLERANCE)


@pytest.mark.parametrize("name", CASES)
def test_weighted_losses_and_gradients(name):
    case = case_named(name)
    problem, expected = Problem(case), case["one_round_plain_sgd"]
    gradient = training.loss_gradient(tasks.example_losses(problem.model, problem.task))
    for t in range(problem.train.num_clients):
        x, y = jnp.array(problem.inputs["X"][t]), jnp.array(problem.inputs["y"][t])
        for m in range(problem.components):
            weights = jnp.array(expected["q"][t][m])
            batch = batching.Batch({"inputs": x, "labels": y}, jnp.ones(len(y), bool), weights)
            params = jax.tree.map(lambda p, m=m: p[m], problem.params)
            loss, grads = gradient(params, batch, jax.random.key(0))
            np.testing.assert_allclose(loss, expected["weighted_loss"][t][m], **TOLERANCE)
            np.testing.assert_allclose(grads["W"], expected["grad_W"][t][m], **TOLERANCE)
            np.testing.assert_allclose(grads["b"], expected["grad_b"][t][m], **TOLERANCE)


@pytest.mark.parametrize("name", CASES)
def test_one_round_and_the_mixture_predictor(name):
    case = case_named(name)
    problem, expected = Problem(case), case["one_round_plain_sgd"]
    algorithm = problem.fedem(optax.sgd(problem.lr))
    state, _ = jax.jit(algorithm.round)(
        problem.state(algorithm), problem.cohort(), jax.random.key(1)
    )
    np.testing.assert_allclose(state.params["W"], expected["agg_W"], **TOLERANCE)
    np.testing.assert_allclose(state.params["b"], expected["agg_b"], **TOLERANCE)
    np.testing.assert_allclose(state.clients.mixture, expected["pi_new"], **TOLERANCE)
    ids = jnp.arange(problem.train.num_clients)
    outputs = algorithm.predict(state, ids, jnp.array(problem.inputs["X_test"]))
    labels = jnp.array(problem.inputs["y_test"])
    if problem.inputs["n_classes"] == 2:
        probabilities = jax.nn.sigmoid(outputs[..., 0])
    else:
        probabilities = jax.nn.softmax(outputs)
    test = expected["eval_test"]
    np.testing.assert_allclose(probabilities, test["mixture_prob"], **TOLERANCE)
    nll = jnp.mean(problem.task.loss(outputs, labels), axis=1)
    np.testing.assert_allclose(nll, test["nll"], **TOLERANCE)
    accuracy = jnp.mean(problem.task.metrics["accuracy"].measure(outputs, labels), axis=1)
    np.testing.assert_allclose(accuracy, test["acc"], **TOLERANCE)


@pytest.mark.parametrize("name", CASES)
def test_three_rounds_of_the_released_solver(name):
    case = case_named(name)
    problem = Problem(case)
    optimizer = optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(problem.lr, momentum=0.9))
    algorithm = problem.fedem(optimizer, fidelity="released")
    state, step = problem.state(algorithm), jax.jit(algorithm.round)
    for expected in case["three_rounds_official_sgd"]:
        state, _ = step(state, problem.cohort(), jax.random.key(1))
        np.testing.assert_allclose(state.clients.mixture, expected["pi"], **TOLERANCE)
        np.testing.assert_allclose(state.params["W"], expected["W"], **TOLERANCE)
        np.testing.assert_allclose(state.params["b"], expected["b"], **TOLERANCE)


@pytest.mark.parametrize("name", CASES)
def test_an_unseen_client_learns_its_mixture(name):
    case = case_named(name)
    problem = Problem(case)
    for expected in case["unseen_client_pi_only"]:
        if "iterations" not in expected:
            continue
        algorithm = problem.fedem(
            optax.sgd(problem.lr), adaptation_iterations=expected["iterations"]
        )
        state = problem.state(algorithm)
        adapted = algorithm.adapt(state, unseen_of(case, problem), jax.random.key(0))
        np.testing.assert_allclose(adapted.clients.mixture[0], expected["pi"], **TOLERANCE)


def unseen_of(case, problem):
    """The golden file lets the first client's data play the newcomer.

    Its parameters are the golden initial ones.
    """
    return problem.train.take(jnp.array([0]))


@pytest.mark.parametrize("name", CASES)
def test_gossip(name):
    case = case_named(name)
    problem, expected = Problem(case), case["decentralized"]
    algorithm = algorithms.decentralized_fedem(
        problem.model,
        problem.task,
        num_clients=problem.train.num_clients,
        mixing_matrix=jnp.array(expected["mixing_matrix"]),
        num_components=problem.components,
        solver=Solver(optax.sgd(problem.lr), batching.epochs(1, None)),
    )
    state, _ = jax.jit(algorithm.round)(
        problem.state(algorithm), problem.cohort(), jax.random.key(1)
    )
    np.testing.assert_allclose(state.params["W"], expected["W"], **TOLERANCE)
    np.testing.assert_allclose(state.params["b"], expected["b"], **TOLERANCE)


@pytest.mark.parametrize("name", CASES)
def test_proximal_steps(name):
    case = case_named(name)
    problem, expected = Problem(case), case["prox_sgd_two_steps"]
    component = [jax.tree.map(lambda p, m=m: p[m], problem.params) for m in range(2)]
    gradient = training.proximal(
        training.loss_gradient(tasks.example_losses(problem.model, problem.task)),
        expected["mu"],
        component[1],
    )
    optimizer = optax.chain(
        optax.add_decayed_weights(expected["weight_decay"]), optax.sgd(problem.lr)
    )
    x, y = jnp.array(problem.inputs["X"][0]), jnp.array(problem.inputs["y"][0])
    batch = batching.Batch({"inputs": x, "labels": y}, jnp.ones(len(y), bool), jnp.ones(len(y)))
    params, state = component[0], optimizer.init(component[0])
    for step in expected["steps"]:
        _, grads = gradient(params, batch, jax.random.key(0))
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(params["W"], step["W"], **TOLERANCE)
        np.testing.assert_allclose(params["b"], step["b"], **TOLERANCE)


def test_simplex_projection_of_the_agnostic_server():
    for case in GOLDEN["aux"]["simplex_projection"]:
        projected = optax.projections.projection_simplex(jnp.array(case["v"]))
        np.testing.assert_allclose(projected, case["projection"], **TOLERANCE)


def test_clustered_split():
    expected = GOLDEN["aux"]["clustered_split"]
    updates = jnp.array(expected["updates"])
    members = jnp.ones(len(updates), bool)
    distance = cosine_distances(updates)
    np.testing.assert_allclose(distance, expected["cosine_distance"], **TOLERANCE)
    second = bipartition(distance, members)
    groups = {frozenset(np.nonzero(np.array(second) == side)[0].tolist()) for side in (0, 1)}
    assert groups == {frozenset(g) for g in expected["groups_by_complete_linkage"]}
    by_scipy = fcluster(
        linkage(squareform(np.array(distance), checks=False), "complete"), 2, "maxclust"
    )
    assert groups == {frozenset(np.nonzero(by_scipy == side)[0].tolist()) for side in (1, 2)}
    norms = split_norms(updates, members)
    np.testing.assert_allclose(norms.mean_update, expected["norm_of_mean_update"], **TOLERANCE)
    np.testing.assert_allclose(norms.largest_update, expected["max_update_norm"], **TOLERANCE)
    np.testing.assert_allclose(
        norms.largest_coordinate, expected["max_abs_coordinate"], **TOLERANCE
    )
