"""FedGradNorm's weights: golden values, the gradient they follow, limits, absent clients."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedjax_mtl import server
from fedjax_mtl.core import trees
from fedjax_mtl.server.weighting import gradnorm_weights, training_rates

GOLDEN = json.loads((pathlib.Path(__file__).parents[1] / "golden" / "fedgradnorm.json").read_text())
SETTINGS = settings(deadline=None, max_examples=30)
POSITIVE = hnp.arrays(np.float64, 5, elements=st.floats(0.01, 10))
EVERYBODY = jnp.ones(5, bool)


@pytest.mark.parametrize("layers", ["last", "all"])
def test_golden(layers):
    settings_ = GOLDEN["inputs"]["hparams"]
    with jax.enable_x64(True):
        state = None
        for one in GOLDEN["rounds"]:
            # The "all" reading starts from the weights of the "last" one in every round.
            measured = trees.under("W2") if layers == "last" else trees.everything
            transformation = server.normalize_gradients(
                3,
                learning_rate=settings_["lr_p"],
                exponent=settings_["gamma"],
                minimum=settings_["p_min"],
                measured=measured,
                initial_losses=jnp.asarray(one["F0"], jnp.float64),
            )
            gradients = {
                k: jnp.asarray([c[f"g_{k}"] for c in one["clients"]]) for k in ("W1", "W2")
            }
            state = transformation.init(jax.tree.map(lambda x: x[0], gradients))
            state = state._replace(weights=jnp.asarray(one["p_in"], jnp.float64))
            scaled, state = transformation.update(
                gradients, state, losses=jnp.asarray(one["F"]), client_ids=jnp.arange(3)
            )
            np.testing.assert_allclose(state.weights, one["server"][layers]["p_new"], rtol=1e-9)
            if layers == "last":
                np.testing.assert_allclose(
                    scaled["W1"].mean(0), one["agg_g_W1"], rtol=1e-6, atol=1e-12
                )
                np.testing.assert_allclose(
                    scaled["W2"].mean(0), one["agg_g_W2"], rtol=1e-6, atol=1e-12
                )


@SETTINGS
@given(POSITIVE, POSITIVE, POSITIVE, st.floats(0, 2))
def test_weights_follow_the_gradient_of_the_loss_and_keep_their_sum(
    weights, norms, rates, exponent
):
    with jax.enable_x64(True):
        weights, norms, rates = map(jnp.asarray, (weights, norms, rates))

        def loss(p):
            weighted = p * norms
            target = jax.lax.stop_gradient(
                jnp.mean(weighted) * (rates / jnp.mean(rates)) ** exponent
            )
            return jnp.sum(jnp.abs(weighted - target))

        raw = gradnorm_weights(
            weights,
            norms,
            rates,
            EVERYBODY,
            learning_rate=1e-3,
            exponent=exponent,
            minimum=0.0,
            renormalise=False,
        )
        expected = jnp.maximum(weights - 1e-3 * jax.grad(loss)(weights), 0)
        near = (
            jnp.abs(
                weights * norms - jnp.mean(weights * norms) * (rates / rates.mean()) ** exponent
            )
            > 1e-9
        )
        np.testing.assert_allclose(jnp.where(near, raw, 0), jnp.where(near, expected, 0), rtol=1e-9)
        new = gradnorm_weights(
            weights, norms, rates, EVERYBODY, learning_rate=0.1, exponent=exponent
        )
        np.testing.assert_allclose(jnp.sum(new), jnp.sum(weights), rtol=1e-9)
        assert (new > 0).all()


def test_limits():
    one = jnp.ones(5)
    norms = jnp.arange(1.0, 6)
    still = gradnorm_weights(one, one, one, EVERYBODY, learning_rate=0.1, exponent=0.6)
    np.testing.assert_allclose(still, one, rtol=1e-6)
    frozen = gradnorm_weights(one, norms, norms, EVERYBODY, learning_rate=0.0, exponent=0.6)
    np.testing.assert_allclose(frozen, one, rtol=1e-6)
    moved = gradnorm_weights(one, norms, one, EVERYBODY, learning_rate=0.01, exponent=0.6)
    assert moved[4] < 1 < moved[0]  # the largest norm loses, the smallest gains
    alone = gradnorm_weights(
        jnp.ones(1), jnp.ones(1), jnp.ones(1), jnp.ones(1, bool), learning_rate=1.0, exponent=1.0
    )
    np.testing.assert_allclose(alone, [1.0])


def run(updates, losses, present, rounds=2, **settings_):
    transformation = server.normalize_gradients(4, learning_rate=0.05, **settings_)
    state = transformation.init(updates[0])
    for _ in range(rounds):
        scaled, state = transformation.update(
            updates, state, losses=losses, client_ids=jnp.arange(4), present=present
        )
    return scaled, state


def test_absent_and_diverged_clients_are_frozen():
    updates = jnp.array([[1.0, 2.0], [3.0, 1.0], [0.5, 0.0], [2.0, 2.0]])
    losses = jnp.array([1.0, 2.0, 3.0, 4.0])
    present = jnp.array([True, True, False, True])
    scaled, state = run(updates.at[2].set(jnp.nan), losses, present)
    assert state.weights[2] == 1 and state.initial_losses[2] == 0 and not state.seen[2]
    np.testing.assert_allclose(jnp.sum(state.weights), 4, rtol=1e-6)
    diverged, same = run(updates, losses.at[2].set(jnp.nan), None)
    np.testing.assert_allclose(same.weights, state.weights, rtol=1e-6)
    np.testing.assert_allclose(diverged, scaled, rtol=1e-6)
    assert not diverged[2].any()


def test_zero_losses_and_gradients_stay_finite():
    scaled, state = run(jnp.zeros((4, 2)), jnp.zeros(4), None)
    assert not scaled.any()
    np.testing.assert_allclose(state.weights, 1)
    scaled, state = run(jnp.ones((4, 2)), jnp.array([0.0, 1, 1, 1]), None)
    assert np.isfinite(state.weights).all() and np.isfinite(scaled).all()


def test_rates():
    """With positive first losses rates are those of the papers.

    With negative first losses they go the other way round, and they are continuous.
    """
    positive = training_rates(jnp.array([1.0, 4.0, 0.0, -3.0]), jnp.full(4, 2.0))
    np.testing.assert_allclose(positive, [0.5, 2.0, 0.0, 0.0])
    negative = training_rates(jnp.array([-4.0, -2.0, -1.0, 0.0, 2.0]), jnp.full(5, -2.0))
    np.testing.assert_allclose(negative, [0.5, 1.0, 1.5, 2.0, 3.0])
    np.testing.assert_allclose(training_rates(jnp.array([0.0, 1.0, -1.0]), jnp.zeros(3)), 0)
    slope = jax.vmap(jax.grad(lambda x: training_rates(x, jnp.float32(-2.0))))
    np.testing.assert_allclose(slope(jnp.array([-2.001, -1.999])), 0.5, rtol=2e-3)


@SETTINGS
@given(
    hnp.arrays(np.float32, 5, elements=st.floats(-100, 100, width=32)),
    hnp.arrays(np.float32, 5, elements=st.floats(-100, 100, width=32)),
)
def test_rates_are_never_negative_and_grow_with_the_loss(losses, more):
    first = jnp.asarray(more)
    low, high = jnp.minimum(losses, -losses), jnp.maximum(losses, -losses)
    for values in (low, high):
        assert (training_rates(values, first) >= 0).all()
    assert (training_rates(low, first) <= training_rates(high, first) * (1 + 1e-5)).all()


def rounds_of(losses, **settings_):
    """The state after rounds of equal updates, where each row has the losses of a round."""
    transformation = server.normalize_gradients(
        2, learning_rate=0.05, exponent=1.0, renormalise=False, **settings_
    )
    updates = jnp.ones((2, 3))
    state = transformation.init(updates[0])
    for row in losses:
        _, state = transformation.update(
            updates, state, losses=jnp.asarray(row), client_ids=jnp.arange(2)
        )
    return state


def test_a_negative_first_loss_is_a_first_loss():
    """Losses of densities can be negative.

    A client that learns fast loses weight to one that lags, as with positive losses.
    """
    state = rounds_of([[-1.0, -1.0], [-4.0, -1.25], [-8.0, -1.5]])
    np.testing.assert_array_equal(state.initial_losses, [-1, -1])
    assert state.weights[0] < 1 < state.weights[1]
    mirrored = rounds_of([[8.0, 8.0], [2.0, 6.4], [1.0, 8 / 1.5]])
    np.testing.assert_allclose(state.weights, mirrored.weights, rtol=1e-5)
    # From a positive loss to a negative one: as far as one can come.
    crossed = rounds_of([[1.0, 1.0], [-1.0, 0.5], [-2.0, 0.5]])
    np.testing.assert_array_equal(crossed.initial_losses, [1, 1])
    assert crossed.weights[0] < 1 < crossed.weights[1]


def test_a_negative_first_loss_can_be_given():
    state = rounds_of([[-4.0, -4.0]], initial_losses=jnp.array([-1.0, -3.0]))
    np.testing.assert_array_equal(state.initial_losses, [-1, -3])
    assert state.weights[0] < 1 < state.weights[1]


def test_a_first_loss_of_zero_is_no_measure():
    state = rounds_of([[0.0, 1.0], [2.0, 1.0], [1.0, 1.0]])
    np.testing.assert_array_equal(state.initial_losses, [2, 1])
    np.testing.assert_array_equal(state.seen, [True, True])


def test_weights_applied_by_clients_are_not_applied_again():
    updates = jnp.array([[1.0, 2.0], [3.0, 1.0], [0.5, 0.0], [2.0, 2.0]])
    losses = jnp.array([1.0, 2.0, 3.0, 4.0])
    plain = server.normalize_gradients(4, learning_rate=0.05)
    by_clients = server.normalize_gradients(4, learning_rate=0.05, already_weighted=True)
    a, b = plain.init(updates[0]), by_clients.init(updates[0])
    extra = {"losses": losses, "client_ids": jnp.arange(4)}
    for _ in range(3):
        ours, a_next = plain.update(updates, a, **extra)
        theirs, b = by_clients.update(b.weights[:, None] * updates, b, **extra)
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)
        np.testing.assert_allclose(a_next.weights, b.weights, rtol=1e-6)
        a = a_next


def test_given_initial_losses():
    _, state = run(jnp.ones((4, 2)), jnp.ones(4), None, initial_losses=(2, 3, 2, 3))
    assert state.weights.dtype == jnp.float32
    np.testing.assert_allclose(state.initial_losses, [2, 3, 2, 3])
    with pytest.raises(ValueError, match=r"initial_losses has shape \(2,\) for 4 clients"):
        run(jnp.ones((4, 2)), jnp.ones(4), None, initial_losses=(2, 3))


def test_bad_arguments():
    with pytest.raises(ValueError, match="measured selects no leaf"):
        server.normalize_gradients(2, learning_rate=0.1, measured=trees.under("nowhere")).init(
            {"w": jnp.ones(2)}
        )
    transformation = server.normalize_gradients(2, learning_rate=0.1, norms="first_step_norm")
    with pytest.raises(
        ValueError, match="'first_step_norm' is no metric of the clients, who report loss"
    ):
        transformation.update(
            jnp.ones((2, 2)),
            transformation.init(jnp.ones(2)),
            losses=jnp.ones(2),
            client_ids=jnp.arange(2),
            reports={"loss": jnp.ones(2)},
        )
