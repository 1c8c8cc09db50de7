"""Averaging and clipping, alone and in chains."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import MODEL, NUM_CLIENTS, PLAN, TASK, VMAP, assert_trees_close, small_federation
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedjax_mtl import algorithms, server, simulate
from fedjax_mtl.core import sampling
from fedjax_mtl.rounds.federated import cohort_weights
from fedjax_mtl.server.averaging import only_averages

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


def fedavg(chain):
    return algorithms.fedavg(
        MODEL,
        TASK,
        num_clients=NUM_CLIENTS,
        plan=PLAN,
        optimizer=optax.sgd(0.1),
        server=chain,
        execution=VMAP,
    )


def test_the_fused_average_equals_the_stacked_one():
    """A chain that begins with the average is fused; an identity in front of it prevents that and changes no number."""
    fused = optax.chain(server.average_clients(), optax.adam(0.1))
    stacked = optax.chain(optax.identity(), server.average_clients(), optax.adam(0.1))
    assert only_averages(fused.init({"w": jnp.ones(2)}))
    assert only_averages(server.average_clients().init({}))
    assert only_averages(optax.chain(fused, optax.identity()).init({"w": jnp.ones(2)}))
    assert not only_averages(stacked.init({"w": jnp.ones(2)}))
    one = simulate(fedavg(fused), small_federation(), num_rounds=3)
    two = simulate(fedavg(stacked), small_federation(), num_rounds=3)
    assert_trees_close(one.state.params, two.state.params, rtol=1e-4, atol=1e-5)


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
