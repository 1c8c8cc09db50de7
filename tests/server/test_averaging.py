"""Averaging and clipping, alone and in chains."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
    GROUP_COUNTS,
    GROUP_MODELS,
    GROUP_TASKS,
    MODEL,
    NUM_CLIENTS,
    PLAN,
    TASK,
    VMAP,
    assert_trees_close,
    small_federation,
    small_population,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedjax_mtl import Solver, algorithms, server, simulate
from fedjax_mtl.core import sampling, trees
from fedjax_mtl.rounds.engine import cohort_weights

SETTINGS = settings(deadline=None, max_examples=30)
UPDATES = hnp.arrays(np.float32, (4, 3), elements=st.floats(-100, 100, width=32))


def apply(transformation, updates, **extra):
    state = transformation.init(jax.tree.map(lambda x: x[0], updates))
    return transformation.update(updates, state, **extra)[0]


@SETTINGS
@given(UPDATES, st.permutations(range(4)))
def test_average_is_the_weighted_mean_in_any_order(updates, order):
    weights = jnp.array([0.1, 0.2, 0.3, 0.4])
    order = np.array(order)
    mean = apply(server.average_clients(), {"w": jnp.asarray(updates)}, weights=weights)["w"]
    np.testing.assert_allclose(mean, np.asarray(weights) @ updates, rtol=1e-4, atol=1e-4)
    permuted = apply(
        server.average_clients(), {"w": jnp.asarray(updates[order])}, weights=weights[order]
    )
    np.testing.assert_allclose(permuted["w"], mean, rtol=1e-4, atol=1e-4)
    plain = apply(server.average_clients(), {"w": jnp.asarray(updates)})["w"]
    np.testing.assert_allclose(plain, updates.mean(0), rtol=1e-4, atol=1e-4)


@SETTINGS
@given(UPDATES, st.floats(0.01, 50))
def test_clipping_bounds_norms_and_keeps_directions(updates, bound):
    clipped = np.asarray(apply(server.clip_clients(bound), {"w": jnp.asarray(updates)})["w"])
    norms, before = np.linalg.norm(clipped, axis=1), np.linalg.norm(updates, axis=1)
    assert (norms <= bound * (1 + 1e-4)).all()
    np.testing.assert_allclose(norms, np.minimum(before, bound), rtol=1e-3, atol=1e-4)
    cosine = np.sum(clipped * updates, axis=1)
    np.testing.assert_allclose(cosine, norms * before, rtol=1e-3, atol=1e-2)


def fedavg(chain, model=MODEL, task=TASK, num_clients=NUM_CLIENTS):
    return algorithms.fedavg(
        model,
        task,
        num_clients=num_clients,
        solver=Solver(optax.sgd(0.1), PLAN),
        server=chain,
        execution=VMAP,
    )


# --- Fused averaging: a chain that averages first never sees the updates one by one.


def mask(selected):
    return lambda tree: trees.map_with_path(lambda path, _: selected(path), tree)


ENCODER = trees.under("encoder")
AVERAGE = server.average_clients
AVERAGING_FIRST = {
    "alone": AVERAGE(),
    "chain": optax.chain(AVERAGE(), optax.adam(0.1)),
    "chain of chains": optax.chain(server.step_from(optax.adam(0.1)), optax.identity()),
    "named chain": optax.named_chain(("mean", AVERAGE()), ("a step", optax.adam(0.1))),
    "injected": optax.inject_hyperparams(
        lambda learning_rate: server.step_from(optax.adam(learning_rate))
    )(learning_rate=0.1),
    "masked by everything": optax.chain(
        optax.masked(AVERAGE(), mask(trees.everything)), optax.adam(0.1)
    ),
    "all of it": optax.named_chain(
        (
            "z first",
            optax.masked(
                optax.inject_hyperparams(lambda rate: server.step_from(optax.sgd(rate)))(rate=0.5),
                mask(trees.everything),
            ),
        ),
        ("a second", optax.trace(0.9)),
    ),
}
NOT_AVERAGING_FIRST = {
    "nothing": optax.identity(),
    "another step first": optax.chain(optax.identity(), AVERAGE(), optax.adam(0.1)),
    "a step of that name first": optax.named_chain(("b", optax.identity()), ("a", AVERAGE())),
    "clipping first": optax.chain(server.clip_clients(1.0), AVERAGE(), optax.sgd(1.0)),
    "a part, by only": server.only(ENCODER, AVERAGE()),
    "a part, by masked": optax.masked(AVERAGE(), mask(ENCODER)),
    "nothing, by masked": optax.masked(AVERAGE(), mask(trees.nothing)),
    "another average": optax.chain(server.coordinate_median(), optax.sgd(1.0)),
}


@pytest.mark.parametrize("name", AVERAGING_FIRST)
def test_an_average_is_seen_through_what_wraps_it(name):
    params = jax.eval_shape(MODEL.init, jax.random.key(0))
    assert server.averages_first(AVERAGING_FIRST[name], params)
    # What stands behind the average is no obstacle, what stands before it is.
    behind = optax.chain(AVERAGING_FIRST[name], server.project_conflicts())
    assert server.averages_first(behind, params)
    assert not server.averages_first(optax.chain(optax.identity(), behind), params)


@pytest.mark.parametrize("name", NOT_AVERAGING_FIRST)
def test_no_average_is_seen_where_there_is_none_of_everything(name):
    params = jax.eval_shape(MODEL.init, jax.random.key(0))
    assert not server.averages_first(NOT_AVERAGING_FIRST[name], params)


@pytest.mark.parametrize("name", sorted(set(AVERAGING_FIRST) - {"alone"}))
def test_the_fused_average_equals_the_stacked_one(name):
    """An identity in front of the average prevents the fusion and changes no number."""
    fused = fedavg(AVERAGING_FIRST[name])
    stacked = fedavg(optax.chain(optax.identity(), AVERAGING_FIRST[name]))
    assert fused.parts.summed and not stacked.parts.summed
    one = simulate(fused, small_federation(), num_rounds=3)
    two = simulate(stacked, small_federation(), num_rounds=3)
    assert_trees_close(one.state.params, two.state.params, rtol=1e-4, atol=1e-5)


def test_the_fused_average_of_groups_equals_the_stacked_one():
    groups = {"model": GROUP_MODELS, "task": GROUP_TASKS, "num_clients": GROUP_COUNTS}
    chain = AVERAGING_FIRST["named chain"]
    fused = fedavg(chain, **groups)
    stacked = fedavg(optax.chain(optax.identity(), chain), **groups)
    assert fused.parts.summed and not stacked.parts.summed
    one = simulate(fused, small_population(), num_rounds=3)
    two = simulate(stacked, small_population(), num_rounds=3)
    assert_trees_close(one.state.params, two.state.params, rtol=1e-4, atol=1e-5)


def test_an_average_of_a_part_leaves_the_other_part_to_others():
    """The encoder's mean and the decoder's median are each those of a server with it alone."""
    both = fedavg(
        optax.chain(
            optax.masked(AVERAGE(), mask(ENCODER)),
            optax.masked(server.coordinate_median(), mask(trees.negate(ENCODER))),
            optax.sgd(1.0),
        )
    )
    assert not both.parts.summed
    ours = simulate(both, small_federation(), num_rounds=1).state.params
    mean = fedavg(server.step_from(optax.sgd(1.0)))
    median = fedavg(optax.chain(server.coordinate_median(), optax.sgd(1.0)))
    of_mean = simulate(mean, small_federation(), num_rounds=1).state.params
    of_median = simulate(median, small_federation(), num_rounds=1).state.params
    assert_trees_close(ours["encoder"], of_mean["encoder"], rtol=1e-4, atol=1e-6)
    assert_trees_close(ours["decoder"], of_median["decoder"], rtol=1e-4, atol=1e-6)


def test_a_server_that_keeps_the_client_axis_is_refused():
    with pytest.raises(ValueError, match=r"step of shape \(6, .*put average_clients\(\)"):
        simulate(fedavg(optax.sgd(1.0)), small_federation(), num_rounds=1)


def test_weightings():
    cohort = sampling.make_cohort(
        small_federation(), jnp.array([0, 1, 2]), jnp.array([True, True, False])
    )
    np.testing.assert_allclose(cohort_weights("samples", cohort), [5 / 14, 9 / 14, 0], rtol=1e-6)
    np.testing.assert_allclose(cohort_weights("uniform", cohort), [0.5, 0.5, 0])
    np.testing.assert_allclose(cohort_weights("population", cohort), [5 / 36, 9 / 36, 0], rtol=1e-6)
    custom = cohort_weights(lambda c: c.client_ids + 1.0, cohort)
    np.testing.assert_allclose(custom, [1, 2, 0])
    with pytest.raises(ValueError, match="unknown weighting 'size'"):
        cohort_weights("size", cohort)
