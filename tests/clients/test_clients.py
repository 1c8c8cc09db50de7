"""Local training of one client against plain numpy.

Objectives, weights, phases, and what stays personal.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
    ALGORITHMS,
    MODEL,
    NUM_CLIENTS,
    PLAN,
    SOLVER,
    TASK,
    VMAP,
    assert_trees_close,
    small_federation,
)

from fedjax_mtl import Solver, algorithms, models, simulate, tasks
from fedjax_mtl.clients import training
from fedjax_mtl.clients.updates import Phase, local_trainer
from fedjax_mtl.core import batching, sampling, trees
from fedjax_mtl.core.batching import Batch
from fedjax_mtl.core.federation import NO_BUDGET, ClientView

KEY = jax.random.key(0)
X = np.random.default_rng(1).normal(size=(6, 3)).astype(np.float32)
Y = X @ np.array([[1.0], [-2.0], [0.5]], np.float32) + 0.1
START = {"encoder": {"w": jnp.ones((3, 2)) * 0.3}, "decoder": {"w": jnp.ones((2, 1)) * 0.5}}
TWO_LAYER = models.Model(
    lambda key: START, lambda p, x, key=None: x @ p["encoder"]["w"] @ p["decoder"]["w"]
)
REGRESSION = tasks.regression()


def view(budget=NO_BUDGET):
    examples = {"inputs": jnp.asarray(X), "labels": jnp.asarray(Y)}
    zero = jnp.int32(0)
    return ClientView(examples, jnp.arange(6), jnp.int32(6), zero, jnp.int32(budget), zero, KEY)


def gradients(a, b):
    residual = X @ a @ b - Y
    return X.T @ residual @ b.T / 6, (X @ a).T @ residual / 6


def test_alternation_trains_head_then_body():
    """FedRep (arXiv 2102.07078) trains the head with the body frozen, then the body."""
    head, body = trees.under("decoder"), trees.under("encoder")
    update = local_trainer(
        TWO_LAYER,
        REGRESSION,
        Solver(optax.sgd(0.1, momentum=0.9), batching.epochs(1, None)),
        personal=head,
        phases=(Phase(head, batching.steps(3, None)), Phase(body, batching.steps(2, None))),
    )
    result = jax.jit(update.update)(START, update.init(START), view(), KEY)
    a, b = (np.array(START[k]["w"]) for k in ("encoder", "decoder"))
    start, velocity = a, 0
    for _ in range(3):
        velocity = 0.9 * velocity + gradients(a, b)[1]
        b = b - 0.1 * velocity
    velocity = 0
    for _ in range(2):
        velocity = 0.9 * velocity + gradients(a, b)[0]
        a = a - 0.1 * velocity
    np.testing.assert_allclose(result.pseudo_gradient["encoder"]["w"], start - a, rtol=1e-4)
    assert result.pseudo_gradient["decoder"]["w"] is None
    np.testing.assert_allclose(result.state.personal["decoder"]["w"], b, rtol=1e-4)
    assert result.state.personal["encoder"]["w"] is None


def test_personal_leaves_never_travel():
    algorithm = algorithms.fedavg(
        MODEL,
        TASK,
        num_clients=NUM_CLIENTS,
        solver=Solver(optax.sgd(0.1), PLAN),
        personal=trees.under("decoder"),
        execution=VMAP,
    )
    run = simulate(algorithm, small_federation(), num_rounds=3)
    heads = run.state.clients.personal["decoder"]["kernel"][0]
    assert not np.allclose(heads[0], heads[1])
    assert jax.tree.leaves(run.state.clients.personal["encoder"]) == []
    up, _ = algorithm.traffic(algorithm.init(KEY))
    assert up == 4 * (4 * 5 + 5)  # the encoder alone
    ids = jnp.arange(2)
    outputs = algorithm.predict(jax.tree.map(lambda x: x[0], run.state), ids, jnp.ones((2, 1, 4)))
    assert not np.allclose(outputs[0], outputs[1])


def test_the_proximal_gradient_is_that_of_the_penalised_loss():
    losses = tasks.example_losses(TWO_LAYER, REGRESSION)
    anchor = jax.tree.map(lambda p: p + 1.0, START)
    batch = Batch(
        {"inputs": jnp.asarray(X), "labels": jnp.asarray(Y)},
        jnp.array([True] * 4 + [False] * 2),
        jnp.arange(6.0),
    )

    def penalised(p):
        values = losses(p, batch.examples, None)
        data = jnp.sum(values[:4] * batch.weights[:4]) / 4
        return data + 0.35 * optax.tree.norm(optax.tree.sub(p, anchor), squared=True)

    loss, grads = training.proximal(training.loss_gradient(losses), 0.7, anchor)(START, batch, KEY)
    assert_trees_close(grads, jax.grad(penalised)(START), rtol=1e-4)
    expected = jnp.sum(losses(START, batch.examples, None)[:4] * batch.weights[:4]) / 4
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_a_client_out_of_budget_leaves_momentum_and_parameters_alone():
    """A client that stops after two steps equals one that had planned two steps.

    It stops by its budget or by a share of the work. Neither momentum nor decay act afterwards. A
    client that makes no step has no loss.
    """
    optimizer = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1, momentum=0.9))
    gradient = training.loss_gradient(tasks.example_losses(TWO_LAYER, REGRESSION))
    state = optimizer.init(START)

    def go(num_steps, budget=NO_BUDGET, work=1.0):
        me = view(budget)._replace(work=work)
        plan = batching.steps(num_steps, None)
        return training.train(gradient, optimizer, plan, START, state, me, KEY)

    short = go(2)
    assert_trees_close(go(9, budget=2), short, rtol=0, atol=0)
    assert_trees_close(go(9, work=0.3), short, rtol=0, atol=0)
    for none in (go(9, budget=0), go(9, work=0.1)):
        assert_trees_close(none.params, START, rtol=0, atol=0)
        assert none.num_steps == 0 and np.isnan(none.loss) and np.isnan(none.first_loss)


def test_schedules_scale_steps_by_round():
    algorithm = algorithms.fedavg(
        TWO_LAYER,
        REGRESSION,
        num_clients=1,
        solver=Solver(
            optax.sgd(0.1), batching.steps(1, None), lambda r: jnp.where(r == 0, 1.0, 0.0)
        ),
        execution=VMAP,
    )
    state = algorithm.init(KEY)
    federation = small_federation(sizes=(6,))._replace(examples=view().examples)
    cohort = sampling.full_participation()(KEY, 0, federation)
    first, _ = algorithm.round(state, cohort, KEY)
    second, _ = algorithm.round(first, cohort, KEY)
    assert not np.allclose(first.params["decoder"]["w"], START["decoder"]["w"])
    assert_trees_close(second.params, first.params, rtol=0, atol=0)


@pytest.mark.parametrize("batch_size", [None, 1, 4])
def test_local_losses(batch_size):
    losses = tasks.example_losses(TWO_LAYER, REGRESSION)
    padded = view()._replace(rows=jnp.concatenate([jnp.arange(6), jnp.full(5, 3)]))
    found = jax.jit(lambda p: training.local_losses(losses, p, padded, batch_size))(START)
    a, b = (np.array(START[k]["w"]) for k in ("encoder", "decoder"))
    np.testing.assert_allclose(found[:6], 0.5 * ((X @ a @ b - Y) ** 2)[:, 0], rtol=1e-5)
    np.testing.assert_array_equal(found[6:], 0)


def test_component_learning_rates():
    algorithm = algorithms.fedem(
        MODEL,
        TASK,
        num_clients=NUM_CLIENTS,
        num_components=2,
        solver=Solver(optax.sgd(0.1), PLAN),
        component_scales=jnp.array([1.0, 0.0]),
        execution=VMAP,
    )
    state = algorithm.init(KEY)
    cohort = sampling.full_participation()(KEY, 0, small_federation())
    new, _ = jax.jit(algorithm.round)(state, cohort, KEY)
    moved = jax.tree.map(
        lambda a, b: jnp.abs(a - b).reshape(2, -1).max(axis=1), new.params, state.params
    )
    for leaf in jax.tree.leaves(moved):
        assert leaf[0] > 0 and leaf[1] == 0


def test_refusals():
    with pytest.raises(ValueError, match="keep_optimizer works with a single phase"):
        local_trainer(
            MODEL,
            TASK,
            Solver(optax.sgd(0.1), PLAN, keep_optimizer=True),
            phases=(Phase(trees.everything, PLAN),),
        )
    with pytest.raises(
        ValueError, match=r"component_scales has shape \(3,\); give one factor for each of the 2"
    ):
        algorithms.fedem_client(MODEL, TASK, 2, SOLVER, component_scales=jnp.ones(3))
    with pytest.raises(ValueError, match="drop keep_optimizer, or take fidelity='released'"):
        algorithms.pfedme(MODEL, TASK, num_clients=6, solver=SOLVER.keeping(True))
    with pytest.raises(ValueError, match="seed -1 is negative"):
        simulate(ALGORITHMS["fedavg"], small_federation(), num_rounds=1, seeds=(-1,))
    with pytest.raises(ValueError, match="seeds is empty"):
        simulate(ALGORITHMS["fedavg"], small_federation(), num_rounds=1, seeds=())
    with pytest.raises(ValueError, match=r"seeds \(1, 1\) repeat"):
        simulate(ALGORITHMS["fedavg"], small_federation(), num_rounds=1, seeds=(1, 1))
    with pytest.raises(ValueError, match="different lengths"):
        simulate(
            lambda a, b: ALGORITHMS["fedavg"],
            small_federation(),
            num_rounds=1,
            hyperparameters={"a": jnp.ones(2), "b": jnp.ones(3)},
        )
    with pytest.raises(ValueError, match="eval_every is 0"):
        simulate(ALGORITHMS["fedavg"], small_federation(), num_rounds=1, eval_every=0)
