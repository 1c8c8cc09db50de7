"""Clustered FL's server by hand: shares as weights, absent clients, leaves that some have."""

import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_mtl import server

NEVER = {"mean_below": 0.0, "largest_above": np.inf}
START = {"a": jnp.zeros((4, 2)), "b": jnp.ones((4, 1))}
UPDATES = {
    "a": -jnp.array([[1.0, 0.0], [2.0, 1.0], [4.0, 8.0], [6.0, 2.0]]),
    "b": -jnp.array([[1.0], [3.0], [5.0], [7.0]]),
}
TWO = jnp.array([[True, True, False, False], [False, False, True, True]])
WEIGHTS = jnp.array([0.1, 0.3, 0.2, 0.4])
HERE = jnp.ones(4, bool)


def moved(weights=WEIGHTS, present=HERE, members=TWO, ids=None, **facts):
    """The models after one step, in the order of ``ids``."""
    ids = jnp.arange(4) if ids is None else ids
    transformation = server.average_in_clusters(**NEVER)
    state = transformation.init(START)._replace(
        members=members, num_clusters=jnp.int32(len(members))
    )
    took = {name: x[ids] * present[:, None] for name, x in UPDATES.items()}
    steps, state = transformation.update(
        took,
        state,
        {name: x[ids] for name, x in START.items()},
        weights=weights,
        client_ids=ids,
        present=present,
        **facts,
    )
    assert server.reported(state) == {"num_clusters": len(members)}
    return {name: np.asarray(START[name][ids] - steps[name]) for name in steps}


def test_members_take_the_weighted_mean_of_their_cluster():
    """The weights are shares of the examples, so that a cluster's sum is below 1."""
    models = moved()
    first, second = (1 * 1 + 3 * 2) / 4, (2 * 4 + 4 * 6) / 6
    np.testing.assert_allclose(models["a"][:, 0], [first, first, second, second], rtol=1e-6)
    np.testing.assert_allclose(models["b"][:2, 0], 1 + (1 * 1 + 3 * 3) / 4, rtol=1e-6)


def test_the_order_of_the_cohort_does_not_matter():
    ids = jnp.array([2, 0, 3, 1])
    shuffled, straight = moved(WEIGHTS[ids], ids=ids), moved()
    for name, models in straight.items():
        np.testing.assert_allclose(shuffled[name], models[np.asarray(ids)], rtol=1e-6)


def test_absent_clients_follow_and_a_cluster_of_absent_ones_stays():
    present = jnp.array([True, False, False, False])
    models = moved(jnp.where(present, WEIGHTS, 0), present)
    np.testing.assert_allclose(models["a"], [[1, 0], [1, 0], [0, 0], [0, 0]], atol=1e-7)


def test_a_leaf_is_averaged_among_those_who_have_it():
    owned = {"a": HERE, "b": jnp.array([True, False, True, True])}
    models = moved(owned=owned)
    np.testing.assert_allclose(models["b"][0, 0], 1 + 1, rtol=1e-6)
    np.testing.assert_allclose(models["a"], moved()["a"], rtol=1e-6)


def test_a_client_of_two_clusters_follows_the_later_one_and_of_none_itself():
    members = jnp.array([[True, True, False, False], [False, True, True, False]])
    models = moved(members=members)["a"][:, 0]
    later = (3 * 2 + 2 * 4) / 5
    np.testing.assert_allclose(models, [(1 * 1 + 3 * 2) / 4, later, later, 6], rtol=1e-6)


def test_a_cluster_splits_where_members_disagree():
    transformation = server.average_in_clusters(0.5, 0.9)
    updates = {"a": jnp.array([[1.0, 0.0], [-1.0, 0.1], [1.0, 0.1], [-1.0, 0.0]])}
    facts = {"weights": jnp.full(4, 0.25), "client_ids": jnp.arange(4), "present": HERE}
    start = {"a": jnp.zeros((4, 2))}
    _, state = transformation.update(updates, transformation.init(start), start, **facts)
    np.testing.assert_array_equal(state.members, [[1, 0, 1, 0], [0, 1, 0, 1]])
    assert state.num_clusters == 2
    facts["present"] = HERE.at[1].set(False)
    _, state = transformation.update(updates, transformation.init(start), start, **facts)
    assert state.num_clusters == 1


def test_an_unknown_fidelity_is_refused():
    with pytest.raises(ValueError, match="fidelity must be 'paper' or 'released'"):
        server.average_in_clusters(fidelity="exact")
