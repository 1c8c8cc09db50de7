"""Gossip: what clients take from their neighbours, with everybody there and with absences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_mtl import server
from fedjax_mtl.relations import gossip
from fedjax_mtl.server.gossip import check_mixing_matrix, gossip_coefficients

COUNT = 5
SETTINGS = settings(deadline=None, max_examples=30)
RING = np.asarray(gossip.metropolis_weights(gossip.ring(COUNT)), np.float32)
SOME = st.lists(st.booleans(), min_size=COUNT, max_size=COUNT)


def stochastic(seed):
    """A matrix whose rows sum to 1 and whose columns do not."""
    rows = np.random.default_rng(seed).random((COUNT, COUNT)).astype(np.float32)
    return rows / rows.sum(axis=1, keepdims=True)


def test_with_everybody_there_the_matrix_is_as_it_was():
    for matrix in (RING, stochastic(0)):
        ours = gossip_coefficients(matrix, jnp.arange(COUNT), jnp.ones(COUNT, bool))
        np.testing.assert_array_equal(ours, matrix)


@SETTINGS
@given(st.integers(0, 1000), SOME)
def test_rows_sum_to_one_whoever_is_there(seed, present):
    there = np.array(present)
    ours = np.asarray(gossip_coefficients(stochastic(seed), jnp.arange(COUNT), jnp.array(present)))
    np.testing.assert_allclose(ours.sum(axis=1), 1, rtol=1e-6)
    assert (ours >= 0).all()
    # Nobody hears who is away, apart from the row of who is away, which is not used.
    assert not ours[there][:, ~there].any()


@SETTINGS
@given(SOME, st.permutations(range(COUNT)))
def test_a_symmetric_matrix_stays_doubly_stochastic_among_those_present(present, order):
    ids, there = jnp.array(order), np.array(present)[list(order)]
    ours = np.asarray(gossip_coefficients(RING, ids, jnp.asarray(there)))[there][:, there]
    np.testing.assert_allclose(ours.sum(axis=0), 1, rtol=1e-6)
    np.testing.assert_allclose(ours.sum(axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(ours, ours.T)


def test_a_cohort_hears_nobody_outside_it():
    """A cohort of some clients is one of all in which the others are absent."""
    ids = jnp.array([4, 1, 2])
    few = gossip_coefficients(RING, ids, jnp.ones(3, bool))
    present = jnp.zeros(COUNT, bool).at[ids].set(True)
    all_of_them = gossip_coefficients(RING, jnp.arange(COUNT), present)
    np.testing.assert_allclose(few, np.asarray(all_of_them)[np.ix_(ids, ids)], rtol=1e-6)


def mix(matrix, starts, results, present=None):
    transformation = server.gossip_mixing(jnp.asarray(matrix))
    moves, _ = transformation.update(
        starts - results, transformation.init(starts), starts, present=present
    )
    return starts - moves


def test_models_are_mixed_as_by_numpy():
    rng = np.random.default_rng(0)
    starts, results = (jnp.asarray(rng.normal(size=(COUNT, 3)), jnp.float32) for _ in range(2))
    matrix = stochastic(1)
    np.testing.assert_allclose(mix(matrix, starts, results), matrix @ results, rtol=1e-4, atol=1e-5)


def test_one_bad_client_poisons_nobody():
    """A client that is away must not be multiplied away, because 0 times NaN is NaN."""
    results = jnp.arange(10.0).reshape(COUNT, 2)
    present = jnp.array([True, True, False, True, True])
    starts = jnp.ones((COUNT, 2))
    clean = mix(RING, starts, results, present)
    poisoned = mix(RING, starts, results.at[2].set(jnp.nan), present)
    np.testing.assert_array_equal(poisoned, clean)
    np.testing.assert_array_equal(clean[2], starts[2])
    # Client 1 keeps the third that client 2 would have had.
    np.testing.assert_allclose(clean[1], results[0] / 3 + 2 * results[1] / 3, rtol=1e-6)
    np.testing.assert_allclose(clean[4], results[jnp.array([3, 4, 0])].mean(0), rtol=1e-6)


def test_the_mean_model_stays():
    rng = np.random.default_rng(2)
    results = jnp.asarray(rng.normal(size=(COUNT, 3)), jnp.float32)
    after = mix(RING, jnp.zeros_like(results), results)
    np.testing.assert_allclose(after.mean(0), results.mean(0), atol=1e-6)


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (np.ones((2, 3)), r"shape \(2, 3\); it must be \[clients, clients\]"),
        (np.ones(3), r"shape \(3,\)"),
        ([[0.5, 0.5], [0.2, 0.2]], "row 1 of the mixing matrix sums to 0.4000, not 1"),
        ([[1.5, -0.5], [0.5, 0.5]], r"negative entry \(-0.5\)"),
    ],
)
def test_bad_matrices(matrix, message):
    with pytest.raises(ValueError, match=message):
        check_mixing_matrix(np.asarray(matrix))


def test_a_traced_matrix_is_taken_at_its_shape():
    def checked(matrix):
        check_mixing_matrix(matrix)
        return matrix

    jax.jit(checked)(jnp.zeros((2, 2)))
    with pytest.raises(ValueError, match="it must be"):
        jax.jit(checked)(jnp.zeros((2, 3)))
