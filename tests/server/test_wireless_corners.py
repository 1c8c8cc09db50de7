"""Aggregation over the air, against plain numpy.

What a cluster may transmit, what the channel adds, and the weights inside a cluster.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_trees_close

from fedjax_mtl import server
from fedjax_mtl.core import trees
from fedjax_mtl.server import wireless

KEY = jax.random.key(3)
RNG = np.random.default_rng(0)
UPDATES = {"a": RNG.normal(size=(6, 3, 2)), "b": RNG.normal(size=(6, 4))}
GAINS = {"a": RNG.rayleigh(size=(3, 3, 2)), "b": RNG.rayleigh(size=(3, 4))}
LOSSES = np.array([[1.0, 2, 3, 4, 5, 6], [0.5, 2, 1, 8, 5, 3]])


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def known_gains(monkeypatch):
    """Makes the channel the one that is given above."""
    monkeypatch.setattr(wireless, "rayleigh_gains", lambda key, like, spread: GAINS)
    jax.clear_caches()
    yield
    jax.clear_caches()


@functools.partial(jax.jit, static_argnames="measured")
def run(updates, losses, facts, settings, measured):
    """The last of some rounds over three clusters of two clients.

    Numbers are traced, so that few programs are compiled.
    """
    rule = server.over_the_air_gradnorm(3, 2, measured=measured, **settings)
    start = rule.init(jax.tree.map(lambda x: x[0], updates))

    def one_round(state, losses):
        return rule.update(updates, state, losses=losses, key=KEY, **facts)[::-1]

    state, sent = jax.lax.scan(one_round, start, losses)
    return jax.tree.map(lambda x: x[-1], sent), state


def received(updates=UPDATES, losses=LOSSES, order=None, measured=trees.everything, **settings):
    """What arrives in the last round, and the server's state."""
    present = settings.pop("present", np.ones(6, bool))
    facts = {"client_ids": np.arange(6) if order is None else order, "present": present}
    return jax.device_get(run(updates, losses, facts, settings, measured))


SILENT = {"learning_rate": 0.0, "threshold": 0.5}


def received_noise(**settings):
    """What the receiver's noise of deviation 2 adds to an entry on which all three transmit."""
    clean, _ = received(noise=0.0, **SILENT, **settings)
    noisy, _ = received(noise=2.0, **SILENT, **settings)
    everybody = np.all(np.square(GAINS["b"]) >= 0.5, axis=0)
    assert everybody.any()
    return (noisy["b"] - clean["b"])[everybody]


def test_nobody_transmits_more_than_the_power(known_gains):
    """The noise is divided by the scale at which the loudest cluster has just that power.

    The power is summed over the cluster's entries.
    """
    one = received_noise(transmit_scale=1.0)
    np.testing.assert_allclose(received_noise(transmit_scale=10.0), one / 10, rtol=1e-6)
    scale = one / received_noise(power=7.0)
    np.testing.assert_allclose(scale, scale[0], rtol=1e-6)
    energies = np.zeros(3)
    for name, update in UPDATES.items():
        gradient = update.reshape(3, 2, *update.shape[1:]).mean(axis=1)
        clear = np.square(GAINS[name]) >= 0.5
        sent = np.where(clear, scale[0] * gradient / GAINS[name], 0)
        energies += np.square(sent).reshape(3, -1).sum(axis=1)
    np.testing.assert_allclose(energies.max(), 7.0, rtol=1e-6)
    assert energies.min() < 6


def gradnorm(weights, norms, rates, learning_rate, exponent):
    """One GradNorm step of the weights of some clients, which keep their sum."""
    weighted = weights * norms
    target = weighted.mean() * (rates / rates.mean()) ** exponent
    moved = np.maximum(weights - learning_rate * np.sign(weighted - target) * norms, 1e-3)
    return moved * weights.sum() / moved.sum()


def test_weights_inside_clusters(known_gains):
    """Each cluster weighs its clients by what its channel lets through of their gradients.

    How far a client has come is its loss divided by its first loss.
    """
    settings = {"learning_rate": 0.05, "exponent": 0.8, "noise": 0.0, "threshold": 0.3}
    measured = trees.under("b")
    ours, state = received(losses=LOSSES, measured=measured, **settings)
    weights = np.ones((3, 2))
    losses = LOSSES.reshape(2, 3, 2)
    for cluster in range(3):
        clear = np.square(GAINS["b"][cluster]) >= 0.3
        norms = np.linalg.norm(UPDATES["b"][2 * cluster : 2 * cluster + 2] * clear, axis=1)
        for now in losses[:, cluster]:
            rates = now / losses[0, cluster]
            weights[cluster] = gradnorm(weights[cluster], norms, rates, 0.05, 0.8)
    np.testing.assert_allclose(state.weights, weights, rtol=1e-5)
    for name, update in UPDATES.items():
        clear = np.square(GAINS[name]) >= 0.3
        pairs = update.reshape(3, 2, *update.shape[1:])
        sums = np.einsum("lc,lc...->l...", weights / 2, pairs)
        count = clear.sum(axis=0)
        expected = np.where(count > 0, (clear * sums).sum(axis=0) / np.maximum(count, 1), 0)
        np.testing.assert_allclose(ours[name], expected, rtol=1e-5, atol=1e-9)
    # Slots in another order are the same clients.
    order = np.array([3, 0, 5, 1, 4, 2])
    shuffled = jax.tree.map(lambda x: x[order], UPDATES)
    again, _ = received(shuffled, LOSSES[:, order], order=order, measured=measured, **settings)
    assert_trees_close(again, ours, rtol=1e-9)


def test_absent_clients_of_a_cluster():
    """The mean is over the clients that came, and the weights of the others wait."""
    present = np.array([True, False, True, True, False, False])
    settings = {"learning_rate": 0.05, "threshold": 0.0, "noise": 0.0}
    ours, state = received(losses=LOSSES, present=present, **settings)
    np.testing.assert_allclose(state.weights[[0, 2, 2], [1, 0, 1]], 1)
    np.testing.assert_allclose(state.weights[0, 0], 1, rtol=1e-6)
    pair = state.weights[1] @ UPDATES["b"][2:4] / 2
    np.testing.assert_allclose(ours["b"], (UPDATES["b"][0] + pair) / 2, rtol=1e-5)


def test_a_cohort_must_be_whole():
    rule = server.over_the_air_gradnorm(3, 2, learning_rate=0.1)
    with pytest.raises(ValueError, match="3 clusters of 2 are 6 clients, the cohort has 4"):
        rule.update({}, None, losses=jnp.ones(4), client_ids=jnp.arange(4), present=None, key=KEY)
    with pytest.raises(ValueError, match="measured selects no leaf"):
        server.over_the_air_gradnorm(3, 2, learning_rate=0.1, measured=trees.nothing).init(UPDATES)
