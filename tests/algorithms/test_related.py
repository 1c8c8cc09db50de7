"""Systems in which clients keep models of their own: golden one-step values, and identities."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
    MODEL,
    NUM_CLIENTS,
    PLAN,
    SOLVER,
    TASK,
    VMAP,
    assert_trees_close,
    small_federation,
)

from fedjax_mtl import (
    Group,
    Solver,
    algorithms,
    decentralized,
    evaluate_clients,
    federated,
    local_trainer,
    make_federation,
    models,
    relational,
    server,
    simulate,
    tasks,
)
from fedjax_mtl.algorithms._fedmtl import fedmtl_exponent, fedmtl_pull
from fedjax_mtl.clients.training import proximal, quadratic_pull
from fedjax_mtl.core import batching, sampling, trees
from fedjax_mtl.relations import gossip, graphs

GOLDEN = json.loads((pathlib.Path(__file__).parents[1] / "golden" / "aggregation.json").read_text())
SETTINGS = {
    "model": MODEL,
    "task": TASK,
    "num_clients": NUM_CLIENTS,
    "execution": VMAP,
    "solver": SOLVER,
}
ENCODER = trees.under("encoder")


def fixed_gradient(value):
    return lambda params, batch, key: (jnp.zeros(()), jnp.asarray(value))


def test_fedprox_golden():
    given, expected = GOLDEN["fedprox"]["inputs"], GOLDEN["fedprox"]["outputs"]
    w, anchor = jnp.array(given["w"]), jnp.array(given["w_global"])
    _, grads = proximal(fixed_gradient(given["grad"]), given["mu"], anchor)(w, None, None)
    np.testing.assert_allclose(grads, expected["total_gradient"], rtol=1e-6)
    np.testing.assert_allclose(w - given["lr"] * grads, expected["sgd_step"], rtol=1e-6)
    np.testing.assert_allclose(
        given["mu"] / 2 * jnp.sum((w - anchor) ** 2), expected["prox_loss"], rtol=1e-6
    )


def test_ditto_golden():
    given, expected = GOLDEN["ditto"]["inputs"], GOLDEN["ditto"]["outputs"]
    v, anchor = jnp.array(given["v"]), jnp.array(given["w_global"])
    grads = jnp.array(given["grad_at_v"]) + quadratic_pull(given["lam"])(v, anchor)
    np.testing.assert_allclose(grads, expected["personal_gradient"], rtol=1e-6)
    np.testing.assert_allclose(v - given["lr"] * grads, expected["personal_step"], rtol=1e-6)


def test_ditto_takes_the_golden_steps():
    """One round of one client whose loss is linear, so that its gradient is the golden file's."""
    given, expected = GOLDEN["ditto"]["inputs"], GOLDEN["ditto"]["outputs"]
    model = models.Model(lambda key: jnp.zeros(3), lambda params, x, key: x @ params)
    task = tasks.Task("linear", lambda outputs, labels: outputs, {}, None)
    examples = {
        "inputs": np.array([given["grad_at_v"]], np.float32),
        "labels": np.zeros(1, np.int32),
    }
    federation = make_federation(examples, [np.array([0])])
    algorithm = algorithms.ditto(
        model,
        task,
        num_clients=1,
        solver=Solver(optax.sgd(given["lr"]), batching.steps(1, None)),
        penalty=given["lam"],
    )
    state = algorithm.init(jax.random.key(0))
    own = state.clients.own._replace(personal=jnp.array([given["v"]]))
    state = state._replace(
        params=jnp.array(given["w_global"]), clients=state.clients._replace(own=own)
    )
    cohort = sampling.make_cohort(federation, jnp.arange(1))
    state, _ = algorithm.round(state, cohort, jax.random.key(0))
    np.testing.assert_allclose(state.clients.own.personal[0], expected["personal_step"], rtol=1e-6)
    moved = np.array(given["w_global"]) - given["lr"] * np.array(given["grad_at_v"])
    np.testing.assert_allclose(state.params, moved, rtol=1e-6)


def test_fedmtl_golden():
    given, expected = GOLDEN["fedmtl"]["inputs"], GOLDEN["fedmtl"]["outputs"]
    columns = jnp.array(given["params"])
    count, size = columns.shape
    assert fedmtl_exponent(size) == expected["f_exponent"] and fedmtl_exponent(18_000_000) == 9
    factor = 10.0 ** -expected["f_exponent"]
    others = (columns.sum(0) - columns) / (count - 1)
    pull = jax.vmap(fedmtl_pull(count, factor))(columns, others)
    np.testing.assert_allclose(pull, expected["gradient_if_differentiated"], atol=1e-8)

    def regulariser(columns):
        omega = 1 - 1 / count
        return factor * (jnp.sum(columns**2) + jnp.sum((omega * columns.sum(0)) ** 2))

    np.testing.assert_allclose(regulariser(columns), expected["regulariser"], rtol=1e-6)
    np.testing.assert_allclose(jax.grad(regulariser)(columns), pull, rtol=1e-5)


def test_mean_regularised_fedmtl_is_its_gradient():
    columns = jnp.array(np.random.default_rng(0).normal(size=(4, 3)))
    others = (columns.sum(0) - columns) / 3
    pull = jax.vmap(quadratic_pull(2 * 0.7 * (1 - 1 / 4)))(columns, others)
    gradient = jax.grad(lambda w: 0.7 * jnp.sum((w - w.mean(0)) ** 2))(columns)
    np.testing.assert_allclose(pull, gradient, atol=1e-6)


def personal_models(algorithm, num_rounds=3):
    """Predictions of every client on the same inputs after some rounds, ``[clients, ...]``."""
    state = simulate(algorithm, small_federation(), num_rounds=num_rounds, seeds=(3,)).state
    state = jax.tree.map(lambda x: x[0], state)
    inputs = jnp.asarray(np.random.default_rng(1).normal(size=(NUM_CLIENTS, 7, 4)), jnp.float32)
    return np.asarray(algorithm.predict(state, jnp.arange(NUM_CLIENTS), inputs))


@pytest.fixture(scope="module")
def alone():
    return personal_models(algorithms.local(**SETTINGS))


ALONE = {
    "fedu without strength": lambda: algorithms.fedu(
        **SETTINGS, graph=graphs.fixed(graphs.complete_weights(NUM_CLIENTS)), strength=0.0
    ),
    "fedu without edges": lambda: algorithms.fedu(
        **SETTINGS, graph=graphs.fixed(np.zeros((NUM_CLIENTS, NUM_CLIENTS))), strength=1.0
    ),
    "released fedamp": lambda: algorithms.fedamp(**SETTINGS, fidelity="released"),
    "released fedmtl": lambda: algorithms.fedmtl(**SETTINGS, fidelity="released"),
    "fedmtl without penalty": lambda: algorithms.fedmtl(
        **SETTINGS, penalty=0.0, regulariser="mean"
    ),
    "ditto without penalty": lambda: algorithms.ditto(**SETTINGS, penalty=0.0),
    "matfl, a cluster a client": lambda: algorithms.matfl(
        **SETTINGS, encoder=ENCODER, num_clusters=NUM_CLIENTS
    ),
    "fedhca2, weights frozen at 0": lambda: algorithms.fedhca2(
        **SETTINGS,
        encoder=ENCODER,
        decoder=trees.under("decoder"),
        hyper=server.HyperOptimizer(initial=0.0, learning_rate=0.0),
    ),
    "sheaf without strength": lambda: algorithms.sheaf_fmtl(
        **SETTINGS, adjacency=graphs.complete_weights(NUM_CLIENTS), strength=0.0, map_step=0.1
    ),
}


@pytest.mark.parametrize("name", ALONE)
def test_identical_to_training_alone(name, alone):
    np.testing.assert_allclose(personal_models(ALONE[name]()), alone, rtol=1e-4, atol=1e-5)


def test_one_cluster_is_fedper():
    ours = personal_models(algorithms.matfl(**SETTINGS, encoder=ENCODER, num_clusters=1))
    theirs = personal_models(
        algorithms.fedper(**SETTINGS, head=trees.under("decoder"), weighting="uniform")
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_complete_graph_at_one_over_clients_is_fedavg():
    graph = graphs.fixed(graphs.complete_weights(NUM_CLIENTS))
    ours = personal_models(algorithms.fedu(**SETTINGS, graph=graph, strength=1 / NUM_CLIENTS))
    theirs = personal_models(algorithms.fedavg(**SETTINGS, weighting="uniform"))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_decentralised_gossip_is_a_relational_server():
    """Metropolis weights as mixing coefficients give the decentralised composition."""
    matrix = jnp.asarray(gossip.metropolis_weights(gossip.ring(NUM_CLIENTS)), jnp.float32)
    group = Group(MODEL.init, local_trainer(MODEL, TASK, SOLVER), NUM_CLIENTS)
    chain = optax.chain(server.mix_models(lambda _: matrix), optax.sgd(1.0))
    ours = relational(group, chain, execution=VMAP)
    theirs = decentralized(group, matrix, execution=VMAP)
    key, cohort = (
        jax.random.key(0),
        sampling.make_cohort(small_federation(), jnp.arange(NUM_CLIENTS)),
    )
    a, _ = ours.round(ours.init(key), cohort, key)
    b, _ = theirs.round(theirs.init(key), cohort, key)
    assert_trees_close(a.params, b.params)


def test_averaging_in_a_relational_algorithm_is_refused():
    group = Group(MODEL.init, local_trainer(MODEL, TASK, SOLVER), NUM_CLIENTS)
    wrong = relational(group, server.step_from(optax.sgd(1.0)))
    cohort = sampling.make_cohort(small_federation(), jnp.arange(NUM_CLIENTS))
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="keeps it"):
        jax.eval_shape(lambda: wrong.round(wrong.init(key), cohort, key))


def test_mixing_in_a_federated_algorithm_is_refused():
    group = Group(MODEL.init, local_trainer(MODEL, TASK, SOLVER), NUM_CLIENTS)
    wrong = federated(group, optax.chain(server.cluster_mixing(2), optax.sgd(1.0)))
    cohort = sampling.make_cohort(small_federation(), jnp.arange(NUM_CLIENTS))
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="relational"):
        jax.eval_shape(lambda: wrong.round(wrong.init(key), cohort, key))


def test_frozen_leaves_are_held_once_and_never_move():
    """A frozen encoder stays the initial one.

    It has no client axis, no traffic and no gradient.
    """
    trainer = local_trainer(MODEL, TASK, Solver(optax.adam(0.05), PLAN), frozen=ENCODER)
    graph = graphs.fixed(graphs.complete_weights(NUM_CLIENTS))
    chain = optax.chain(server.laplacian_mixing(graph, 0.05), optax.sgd(1.0))
    algorithm = relational(Group(MODEL.init, trainer, NUM_CLIENTS), chain, execution=VMAP)
    start = algorithm.init(jax.random.fold_in(jax.random.key(3), 0))
    end = jax.tree.map(
        lambda x: x[0], simulate(algorithm, small_federation(), num_rounds=3, seeds=(3,)).state
    )
    assert_trees_close(start.params["encoder"], end.params["encoder"], rtol=0, atol=0)
    assert end.params["encoder"]["Dense_0"]["kernel"].shape == (4, 5)
    assert end.params["decoder"]["kernel"].shape == (NUM_CLIENTS, 5, 3)
    assert (
        float(jnp.abs(end.params["decoder"]["kernel"] - start.params["decoder"]["kernel"]).max())
        > 1e-3
    )
    assert algorithm.traffic(end) == (4 * (5 * 3 + 3),) * 2
    adapted = algorithm.adapt(end, small_federation(), jax.random.key(0))
    outputs = algorithm.predict(adapted, jnp.arange(2), jnp.ones((2, 3, 4)))
    assert outputs.shape == (2, 3, 3)


def test_frozen_leaves_around_a_server():
    settings = {**SETTINGS, "frozen": ENCODER}
    algorithm = algorithms.fedavg(**settings, adaptation=PLAN)
    start = algorithm.init(jax.random.fold_in(jax.random.key(0), 0))
    end = jax.tree.map(lambda x: x[0], simulate(algorithm, small_federation(), num_rounds=2).state)
    assert_trees_close(start.params["encoder"], end.params["encoder"], rtol=0, atol=0)
    assert algorithm.traffic(end)[0] == 4 * (5 * 3 + 3)
    adapted = algorithm.adapt(end, small_federation(), jax.random.key(0))
    assert adapted.clients.personal["encoder"]["Dense_0"]["kernel"] is None


def test_fedamp_pulls_similar_clients_together():
    """Clients have opposite labels, and the attention finds the two kinds.

    The cloud models of one kind stay apart from those of the other.
    """
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(6 * 12, 4)).astype(np.float32)
    flip = np.repeat(np.arange(6) % 2, 12)
    labels = ((inputs[:, 0] > 0) ^ (flip == 1)).astype(np.int32)
    federation = make_federation({"inputs": inputs, "labels": labels}, np.split(np.arange(72), 6))
    solver = SOLVER._replace(plan=batching.epochs(2, 6))
    settings = {**SETTINGS, "model": models.linear((4,), 2), "solver": solver}
    algorithm = algorithms.fedamp(**settings, bandwidth="median", scale=0.1, penalty=0.05)
    state = jax.tree.map(lambda x: x[0], simulate(algorithm, federation, num_rounds=15).state)
    clouds = np.asarray(state.params["decoder"]["kernel"]).reshape(6, -1)
    distances = np.linalg.norm(clouds[:, None] - clouds, axis=-1)
    same = (np.arange(6)[:, None] - np.arange(6)) % 2 == 0
    assert distances[same].max() < 0.5 * distances[~same].min()


def test_judged_like_any_other():
    algorithm = algorithms.fedu(
        **SETTINGS, graph=graphs.fixed(graphs.complete_weights(NUM_CLIENTS)), strength=0.05
    )
    judge = evaluate_clients(algorithm, TASK, VMAP)
    sim = simulate(
        algorithm,
        small_federation(),
        num_rounds=4,
        sampler=sampling.uniform(3),
        seeds=(0, 1),
        evaluate=lambda algorithm, state, federation, key: judge(state, federation),
        evaluation_data=small_federation(),
    )
    assert sim.evaluations[-1]["accuracy"].shape == (2, NUM_CLIENTS)
