"""Nothing that is not a number spreads: diverged clients, weights of zero, gradients of zero."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
    MODEL,
    NUM_CLIENTS,
    PLAN,
    TASK,
    VMAP,
    assert_trees_close,
    poisoned,
    small_federation,
)

from fedjax_mtl import Solver, Task, algorithms, models, server
from fedjax_mtl.core import sampling

KEY = jax.random.key(0)
SERVERS = {
    "fused average": server.step_from(optax.sgd(1.0)),
    "unfused average": optax.chain(optax.identity(), server.step_from(optax.sgd(1.0))),
    "chain": optax.chain(
        server.normalize_gradients(NUM_CLIENTS, learning_rate=0.02),
        server.decouple_updates(0.5),
        server.project_conflicts(),
        server.step_from(optax.adam(0.1)),
    ),
    "gp": optax.chain(server.gp_aggregation(), optax.sgd(1.0)),
    "cagrad": optax.chain(server.conflict_averse(iterations=20), optax.sgd(1.0)),
}


def make(chain, task=TASK, **settings):
    return algorithms.fedavg(
        MODEL,
        task,
        num_clients=NUM_CLIENTS,
        solver=Solver(optax.sgd(0.1), PLAN),
        server=chain,
        execution=VMAP,
        **settings,
    )


@pytest.mark.parametrize("name", sorted(SERVERS))
def test_a_diverged_client_counts_as_absent(name):
    federation = small_federation()
    algorithm = make(SERVERS[name])
    state, one_round = algorithm.init(KEY), jax.jit(algorithm.round)
    everybody = sampling.make_cohort(poisoned(federation, 2), jnp.arange(NUM_CLIENTS))
    present = jnp.arange(NUM_CLIENTS) != 2
    others = sampling.make_cohort(federation, jnp.arange(NUM_CLIENTS), present)
    ours, metrics = one_round(state, everybody, KEY)
    theirs, _ = one_round(state, others, KEY)
    assert metrics["diverged"] == 1 and np.isfinite(metrics["loss"])
    assert_trees_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_an_update_that_overflows_after_its_last_loss_voids_a_fused_round():
    """The loss is finite, but its gradient is not."""

    def loss(outputs, labels):
        value = TASK.loss(outputs, labels)
        return jnp.where(labels == 0, value + jnp.sqrt(jnp.maximum(value - value, 0)), value)

    algorithm = make(SERVERS["fused average"], Task("broken", loss, {}, None))
    state = algorithm.init(KEY)
    one_step = sampling.make_cohort(small_federation(), jnp.arange(NUM_CLIENTS))
    one_step = one_step._replace(budgets=jnp.ones(NUM_CLIENTS, jnp.int32))
    new, metrics = algorithm.round(state, one_step, KEY)
    assert metrics["diverged"] > 0
    assert_trees_close(new.params, state.params)


@pytest.mark.parametrize("name", sorted(SERVERS))
def test_weights_that_sum_to_zero_make_no_step(name):
    algorithm = make(SERVERS[name], weighting=lambda cohort: jnp.zeros(cohort.present.shape))
    state = algorithm.init(KEY)
    cohort = sampling.make_cohort(small_federation(), jnp.arange(NUM_CLIENTS))
    new, metrics = algorithm.round(state, cohort, KEY)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((new, metrics)))
    assert_trees_close(new.params, state.params, rtol=0, atol=0)
    assert_trees_close(new.server, state.server, rtol=0, atol=0)


@pytest.mark.parametrize("name", sorted(SERVERS))
def test_gradients_of_zero(name):
    flat = models.Model(
        MODEL.init, lambda params, inputs, key=None: jnp.zeros((inputs.shape[0], 3))
    )
    algorithm = algorithms.fedavg(
        flat,
        TASK,
        num_clients=NUM_CLIENTS,
        solver=Solver(optax.sgd(0.1), PLAN),
        server=SERVERS[name],
        execution=VMAP,
    )
    state = algorithm.init(KEY)
    cohort = sampling.make_cohort(small_federation(), jnp.arange(NUM_CLIENTS))
    for index in range(2):
        new, metrics = algorithm.round(state, cohort, jax.random.fold_in(KEY, index))
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((new, metrics)))
        assert_trees_close(new.params, state.params, atol=1e-6)
        state = new
