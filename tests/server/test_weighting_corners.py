"""Servers that weigh clients, against plain numpy.

GradNorm, agnostic FL, q-FedAvg, averages and clipping.
"""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_mtl import server
from fedjax_mtl.core import trees
from fedjax_mtl.server.weighting import gradnorm_weights

RNG = np.random.default_rng(0)
UPDATES = {"a": RNG.normal(size=(4, 3)), "b": RNG.normal(size=(4, 2, 2))}
IDS = np.array([5, 0, 3, 2])
FLAT = np.concatenate([UPDATES["a"], UPDATES["b"].reshape(4, 4)], axis=1)
LOSSES = np.array([[1.0, 2, 3, 4], [0.5, 2.5, 1, 3], [0.2, 1, 2, 2]])


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def over_rounds(rule, losses=LOSSES, present=None, updates=UPDATES, **facts):
    """The last update and state over some rounds of the same updates, as one program."""
    facts |= {"client_ids": IDS, "present": present}

    @jax.jit
    def run(updates, losses, facts):
        start = rule.init(jax.tree.map(lambda x: x[0], updates))

        def one_round(state, losses):
            return rule.update(updates, state, losses=losses, **facts)[::-1]

        state, sent = jax.lax.scan(one_round, start, losses)
        return jax.tree.map(lambda x: x[-1], sent), state

    return jax.device_get(run(updates, losses, facts))


def gradnorm(norms, losses, rate, exponent, minimum=1e-3, keep_sum=True):
    """The weights of clients over the rounds, which start at 1."""
    weights = np.ones(len(norms))
    for now in losses:
        rates = now / losses[0]
        target = np.mean(weights * norms) * (rates / rates.mean()) ** exponent
        moved = weights - rate * np.sign(weights * norms - target) * norms
        moved = np.maximum(moved, minimum)
        weights = moved * weights.sum() / moved.sum() if keep_sum else moved
    return weights


NORMS = np.linalg.norm(FLAT, axis=1)
FIRST = np.linalg.norm(UPDATES["a"], axis=1)


@pytest.mark.parametrize(
    ("settings", "norms", "expected"),
    [
        ({}, NORMS, {}),
        ({"exponent": 1.5, "measured": trees.under("a")}, FIRST, {"exponent": 1.5}),
        ({"renormalise": False, "minimum": 0.9}, NORMS, {"keep_sum": False, "minimum": 0.9}),
    ],
)
def test_gradnorm_over_rounds(settings, norms, expected):
    """Each client's update comes times its weight.

    By default the exponent is 0.6, the norm is over all leaves, and the weights keep their sum.
    """
    rule = server.normalize_gradients(6, learning_rate=0.06, **settings)
    sent, state = over_rounds(rule)
    weights = gradnorm(norms, LOSSES, 0.06, **{"exponent": 0.6, **expected})
    assert np.ptp(weights) > 0.05
    np.testing.assert_allclose(state.weights[IDS], weights, rtol=1e-6)
    np.testing.assert_array_equal(state.weights[[1, 4]], 1)
    np.testing.assert_allclose(sent["a"], weights[:, None] * UPDATES["a"], rtol=1e-6)


def test_smallest_weights_of_gradnorm():
    """A step as large as this one would make the weight of the largest norm negative.

    The weight stays at a thousandth of what the others share.
    """
    rule = server.normalize_gradients(6, learning_rate=100.0, exponent=0.0)
    _, state = over_rounds(rule, LOSSES[:1])
    weights = gradnorm(NORMS, LOSSES[:1], 100.0, 0.0)
    np.testing.assert_allclose(state.weights[IDS], weights, rtol=1e-6)
    assert 0 < weights.min() < 1e-4
    assert inspect.signature(gradnorm_weights).parameters["minimum"].default == 1e-3


def test_gradnorm_by_reported_norms_of_those_who_came():
    rule = server.normalize_gradients(6, learning_rate=0.06, norms="step_norm")
    present = np.array([True, False, True, True])
    reports = {"step_norm": jnp.array([1.0, 9.0, 2.0, 0.5])}
    sent, state = over_rounds(rule, present=present, reports=reports)
    weights = gradnorm(np.array([1.0, 2.0, 0.5]), LOSSES[:, present], 0.06, 0.6)
    np.testing.assert_allclose(state.weights[IDS[present]], weights, rtol=1e-6)
    assert state.weights[0] == 1 and not sent["a"][1].any()


def test_weights_that_clients_applied_are_divided_out_of_their_norms():
    """The norm of the unweighted update counts, and only the change of a weight is applied."""
    rule = server.normalize_gradients(6, learning_rate=0.06, already_weighted=True)
    start = np.array([0.5, 1.5, 1.0, 1.0])

    @jax.jit
    def run(updates):
        state = rule.init(jax.tree.map(lambda x: x[0], updates))
        state = state._replace(weights=state.weights.at[IDS].set(start))
        return rule.update(updates, state, losses=LOSSES[0], client_ids=jnp.asarray(IDS))

    sent, state = run(UPDATES)
    norms = NORMS / start
    moved = start - 0.06 * np.sign(start * norms - np.mean(start * norms)) * norms
    moved *= start.sum() / moved.sum()
    np.testing.assert_allclose(state.weights[IDS], moved, rtol=1e-6)
    np.testing.assert_allclose(sent["a"], (moved / start)[:, None] * UPDATES["a"], rtol=1e-6)


# --- Fair averages.


def onto_simplex(values):
    ordered = np.sort(values)[::-1]
    excess = (np.cumsum(ordered) - 1) / np.arange(1, len(values) + 1)
    return np.maximum(values - excess[np.flatnonzero(ordered > excess)[-1]], 0)


def test_agnostic_average_over_rounds():
    """The server descends with the mixture before the mixture makes its ascent.

    A client that is absent keeps its share until the projection.
    """
    start = np.array([0.3, 0.1, 0.2, 0.1, 0.1, 0.2])
    present = np.array([True, False, True, True])
    sent, state = over_rounds(
        server.agnostic_average(jnp.asarray(start), 0.07), LOSSES[:2], present
    )
    mixture = start
    for losses in LOSSES[:2]:
        weights = np.where(present, mixture[IDS], 0)
        ascent = np.zeros(6)
        ascent[IDS] = np.where(present, 0.07 * losses, 0)
        mixture = onto_simplex(mixture + ascent)
    np.testing.assert_allclose(state.mixture, mixture, rtol=1e-6)
    np.testing.assert_allclose(sent["a"], weights @ UPDATES["a"], rtol=1e-6)


@pytest.mark.parametrize("q", [0.0, 1.0, 2.5])
def test_q_fair_average(q):
    present = np.array([True, True, False, True])
    losses = np.array([1.0, 0.0, 3.0, 4.0])
    sent, _ = over_rounds(server.q_fair_average(q, 0.2), losses[None], present)
    gradients, f = FLAT[present] / 0.2, np.maximum(losses[present], 1e-10)
    norms = np.square(gradients).sum(axis=1)
    total = np.sum(q * f ** (q - 1) * norms + f**q / 0.2)
    expected = (f**q) @ gradients / total
    ours = np.concatenate([sent["a"], sent["b"].reshape(4)])
    np.testing.assert_allclose(ours, expected, rtol=1e-6)


def test_q_fair_average_of_nobody_is_nothing():
    nobody = np.zeros(4, bool)
    sent, _ = over_rounds(server.q_fair_average(1.0, 0.2), LOSSES[:1], nobody)
    assert not sent["a"].any() and not sent["b"].any()


# --- Averages and clips.


def test_averages_without_weights_are_of_those_who_came():
    present = np.array([True, False, True, False])
    sent, _ = over_rounds(server.average_clients(), LOSSES[:1], present)
    np.testing.assert_allclose(sent["a"], UPDATES["a"][[0, 2]].mean(axis=0), rtol=1e-6)
    sent, _ = over_rounds(server.average_clients(), LOSSES[:1], np.zeros(4, bool))
    assert not sent["a"].any()
    given, _ = over_rounds(server.average_clients(), LOSSES[:1], weights=np.arange(4.0))
    np.testing.assert_allclose(given["a"], np.arange(4.0) @ UPDATES["a"], rtol=1e-6)


def test_clips_are_of_the_whole_update():
    """An update is clipped by its norm over all leaves together.

    Shorter updates and zeros pass.
    """
    bound = np.sort(NORMS)[1:3].mean()
    updates = jax.tree.map(lambda x: np.concatenate([x, 0 * x[:1]]), UPDATES)
    rule = server.clip_clients(bound)
    sent, _ = jax.jit(rule.update)(updates, rule.init(updates))
    scale = np.append(np.minimum(1, bound / NORMS), 1)
    np.testing.assert_allclose(sent["a"], scale[:, None] * updates["a"], rtol=1e-6)
    np.testing.assert_allclose(sent["b"], scale[:, None, None] * updates["b"], rtol=1e-6)
