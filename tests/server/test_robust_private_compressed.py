"""Robust means, private averages and lossy uploads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import apply_server
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedjax_mtl import server

SETTINGS = settings(deadline=None, max_examples=30)
UPDATES = hnp.arrays(np.float32, (7, 3), elements=st.floats(-100, 100, width=32))
PRESENCE = hnp.arrays(bool, 7)
KEY = jax.random.key(0)


@SETTINGS
@given(UPDATES, PRESENCE)
def test_robust_means_equal_numpy(updates, present):
    there = updates[present]
    garbage = np.where(present[:, None], updates, np.nan)
    median = apply_server(
        server.coordinate_median(), jnp.asarray(garbage), present=jnp.asarray(present)
    )
    trimmed = apply_server(
        server.trimmed_mean(0.2), jnp.asarray(garbage), present=jnp.asarray(present)
    )
    if not len(there):
        assert not median.any() and not trimmed.any()
        return
    np.testing.assert_allclose(median, np.median(there, axis=0), rtol=1e-5, atol=1e-4)
    cut = int(0.2 * len(there) + 1e-6)
    expected = np.sort(there, axis=0)[cut : len(there) - cut].mean(0)
    np.testing.assert_allclose(trimmed, expected, rtol=1e-4, atol=1e-3)


def test_one_bad_client_moves_no_median():
    updates = jnp.ones((5, 3)).at[2].set(1e9)
    np.testing.assert_allclose(apply_server(server.coordinate_median(), updates), 1)
    np.testing.assert_allclose(apply_server(server.trimmed_mean(0.2), updates), 1)


def test_private_average():
    updates = {"a": jnp.array([[3.0], [0.3], [9.0]]), "b": jnp.array([[4.0], [0.4], [9.0]])}
    present = jnp.array([True, True, False])
    clean = apply_server(server.private_average(1.0, 0.0), updates, key=KEY, present=present)
    np.testing.assert_allclose(clean["a"], (0.6 + 0.3) / 3, rtol=1e-6)
    half = server.private_average(1.0, 0.0, expected_clients=2)
    np.testing.assert_allclose(
        apply_server(half, updates, key=KEY, present=present)["b"], (0.8 + 0.4) / 2, rtol=1e-6
    )
    # The noise of the sum has standard deviation noise_multiplier * max_norm.
    noisy = apply_server(server.private_average(0.5, 2.0), jnp.zeros((4, 20000)), key=KEY)
    np.testing.assert_allclose(np.std(4 * noisy), 1.0, rtol=0.03)
    with pytest.raises(ValueError, match="needs the extra argument key"):
        apply_server(server.private_average(1.0, 1.0), updates)


@pytest.mark.parametrize("compressor", [server.top_entries(0.3), server.stochastic_levels(2)])
def test_error_feedback_owes_nothing_in_the_long_run(compressor):
    """What was sent plus what is owed is what was to be sent, for every client.

    This also holds for a client that stayed away for some rounds.
    """
    transformation = server.compress_clients(compressor, 3)
    updates = {"w": jax.random.normal(KEY, (3, 10))}
    state = transformation.init(jax.tree.map(lambda x: x[0], updates))
    sent, meant = jnp.zeros((3, 10)), jnp.zeros((3, 10))
    for index in range(4):
        present = jnp.array([True, True, index % 2 == 0])
        out, state = transformation.update(
            updates,
            state,
            client_ids=jnp.arange(3),
            key=jax.random.fold_in(KEY, index),
            present=present,
        )
        sent += out["w"]
        meant += jnp.where(present[:, None], updates["w"], 0)
        np.testing.assert_allclose(sent + state.unsent["w"], meant, rtol=1e-4, atol=1e-5)
    assert np.abs(state.unsent["w"]).max() > 0


def test_compressors():
    vector = jnp.array([3.0, -4.0, 0.0, 0.1])
    np.testing.assert_allclose(server.top_entries(0.25)(vector, KEY), [0, -4, 0, 0])
    np.testing.assert_allclose(server.top_entries(1.0)(vector, KEY), vector)
    keys = jax.random.split(KEY, 4000)
    drawn = jax.vmap(lambda k: server.stochastic_levels(2)(vector, k))(keys)
    np.testing.assert_allclose(drawn.mean(0), vector, atol=0.15)  # unbiased
    steps = np.abs(drawn) / np.linalg.norm(vector) * 2
    np.testing.assert_allclose(steps, np.round(steps), atol=1e-5)
    np.testing.assert_array_equal(server.stochastic_levels(4)(jnp.zeros(3), KEY), 0)
    plain = server.compress_clients(server.top_entries(0.25), 2, error_feedback=False)
    ours = apply_server(plain, jnp.stack([vector, -vector]), client_ids=jnp.arange(2), key=KEY)
    np.testing.assert_allclose(ours[:, 1], [-4, 4])


def test_bad_arguments():
    with pytest.raises(ValueError, match="trim is 0.5"):
        server.trimmed_mean(0.5)
    with pytest.raises(ValueError, match="fraction is 0"):
        server.top_entries(0)
    with pytest.raises(ValueError, match="levels is 0"):
        server.stochastic_levels(0)
