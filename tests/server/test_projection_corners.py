"""What GPAggregation remembers and reports, and the choices of projections, against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transforming import transformed

from fedjax_mtl import server
from fedjax_mtl.server import projection

RNG = np.random.default_rng(0)
UPDATES = RNG.normal(size=(4, 6))
HISTORY = RNG.normal(size=6)
WEIGHTS = np.array([0.1, 0.2, 0.3, 0.4])


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def projected(updates):
    """PCGrad in index order on the vectors themselves."""
    rows = []
    for i, row in enumerate(updates):
        for j, other in enumerate(updates):
            if j != i and row @ other < 0:
                row = row - row @ other / (other @ other) * other
        rows.append(row)
    return np.array(rows)


def attention_of(scores):
    powers = np.exp(scores)
    return len(scores) * powers / powers.sum()


def cosines_of(updates):
    units = updates / np.linalg.norm(updates, axis=1, keepdims=True)
    return units @ units.T


def aggregated(history=HISTORY, updates=UPDATES, weights=WEIGHTS, present=None, **settings):
    """One aggregation with a history, ``(result, state)``."""
    transformation = server.gp_aggregation(**settings)

    @jax.jit
    def run(updates, history, facts):
        state = transformation.init(jax.tree.map(lambda x: x[0], updates))
        if history is not None:
            state = state._replace(history=history, started=jnp.array(True))
        return transformation.update(updates, state, **facts)

    return jax.device_get(run(updates, history, {"weights": weights, "present": present}))


@pytest.mark.parametrize(("temperature", "kind"), [(0.5, "cosine"), (2.0, "dot")])
def test_temperature_of_the_attention(temperature, kind):
    """The scores are cosines or scaled inner products, divided by the temperature.

    They are ``cos / temperature``, or ``<g, history> / sqrt(parameters) / temperature``.
    """
    ours, _ = aggregated(attention=f"softmax_{kind}", temperature=temperature)
    products = UPDATES @ HISTORY
    if kind == "cosine":
        products = products / np.linalg.norm(UPDATES, axis=1) / np.linalg.norm(HISTORY)
    else:
        products = products / np.sqrt(6)
    attention = attention_of(products / temperature)
    np.testing.assert_allclose(ours, WEIGHTS @ (attention[:, None] * projected(UPDATES)), rtol=1e-6)


def test_history_is_the_last_aggregate_or_a_running_mean():
    """The first aggregate is taken whole."""
    for decay, history in ((0.75, None), (0.75, HISTORY), (0.0, HISTORY)):
        ours, state = aggregated(history, history_decay=decay, attention="none")
        kept = 0 if history is None else decay * history
        share = 1 if history is None else 1 - decay
        np.testing.assert_allclose(state.history, kept + share * ours, rtol=1e-6)
        assert bool(state.started)


def test_nobody_leaves_the_history_alone():
    nobody = np.zeros(4, bool)
    for history in (None, HISTORY):
        ours, state = aggregated(history, weights=None, present=nobody)
        assert not np.any(ours)
        assert bool(state.started) == (history is not None)
        np.testing.assert_array_equal(state.history, np.zeros(6) if history is None else history)
        assert all(np.isfinite(value) for value in state.report.values.values())


def statistics_by_hand(updates, history, result):
    """The statistics of an aggregation of clients that weigh alike.

    They are the share of conflicting pairs, the mean cosine, the spread of the attention, and the
    length of the result over that of the mean.
    """
    cosines = cosines_of(updates)[~np.eye(len(updates), dtype=bool)]
    units = updates / np.linalg.norm(updates, axis=1, keepdims=True)
    attention = attention_of(units @ history / np.linalg.norm(history))
    return {
        "conflict_fraction": np.mean(cosines < 0),
        "mean_cosine": np.mean(cosines),
        "attention_spread": attention.max() - attention.min(),
        "norm_ratio": np.linalg.norm(result) / np.linalg.norm(updates.mean(axis=0)),
    }


def test_statistics():
    """Statistics are over the clients that came."""
    present = np.array([True, True, False, True])
    ours, state = aggregated(weights=None, present=present)
    expected = statistics_by_hand(UPDATES[present], HISTORY, ours)
    assert 0 < expected["conflict_fraction"] < 1
    assert set(state.report.values) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(state.report.values[name], value, rtol=1e-5, err_msg=name)


def test_statistics_leaf_by_leaf_are_their_mean():
    parts = {"a": UPDATES[:, :2], "b": UPDATES[:, 2:]}
    histories = {"a": HISTORY[:2], "b": HISTORY[2:]}
    ours, state = aggregated(histories, parts, weights=None, granularity="per_leaf")
    own = [statistics_by_hand(parts[name], histories[name], ours[name]) for name in parts]
    for name, value in state.report.values.items():
        np.testing.assert_allclose(value, np.mean([one[name] for one in own]), rtol=1e-5)


def test_without_weights_those_present_count_alike():
    present = np.array([True, True, False, True])
    ours, _ = aggregated(None, weights=None, present=present)
    np.testing.assert_allclose(ours, projected(UPDATES[[0, 1, 3]]).mean(axis=0), rtol=1e-6)


def test_aggregation_without_projection_keeps_the_attention():
    ours, _ = aggregated(project=False)
    attention = attention_of(
        UPDATES @ HISTORY / np.linalg.norm(UPDATES, axis=1) / np.linalg.norm(HISTORY)
    )
    np.testing.assert_allclose(ours, (WEIGHTS * attention) @ UPDATES, rtol=1e-6)


# --- Conflict-averse directions.


def test_conflict_averse_lengths():
    """The direction lies on a ball around the mean, whose radius is relative to the mean.

    It is taken as it is, divided by 1 + alpha^2, or by 1 + alpha.
    """
    plain, squared, linear = (
        transformed(server.conflict_averse(alpha=0.4, rescale=rescale), UPDATES)
        for rescale in (0, 1, 2)
    )
    np.testing.assert_allclose(squared, plain / 1.16, rtol=1e-9)
    np.testing.assert_allclose(linear, plain / 1.4, rtol=1e-9)
    mean = UPDATES.mean(axis=0)
    np.testing.assert_allclose(np.linalg.norm(plain - mean), 0.4 * np.linalg.norm(mean), rtol=1e-5)


def test_conflict_averse_stays_around_the_weighted_mean():
    rule = server.conflict_averse(alpha=0.3, rescale=0)
    ours = transformed(rule, UPDATES, weights=WEIGHTS)
    mean = WEIGHTS @ UPDATES
    np.testing.assert_allclose(np.linalg.norm(ours - mean), 0.3 * np.linalg.norm(mean), rtol=1e-5)


def test_conflict_averse_leaf_by_leaf():
    """Each leaf is treated as if it were alone."""
    part = UPDATES[:, :2]
    rule = server.conflict_averse(granularity="per_leaf")
    ours = transformed(rule, {"a": part, "b": UPDATES[:, 2:]})
    np.testing.assert_allclose(ours["a"], transformed(server.conflict_averse(), part), rtol=1e-9)


# --- Orders and lengths of PCGrad.


def test_partners_in_index_order_are_sorted_by_client_number():
    orders = projection.partner_orders("index", 4, jnp.array([7, 2, 9, 4]), None)
    np.testing.assert_array_equal(orders, np.tile([1, 3, 0, 2], (4, 1)))


def test_random_partners_are_permutations_each_as_likely():
    """Every client draws one of all six orders of its three partners on its own."""
    keys = jax.random.split(jax.random.key(0), 600)
    draw = jax.jit(jax.vmap(lambda key: projection.partner_orders("random", 3, None, key)))
    orders = np.asarray(draw(keys))
    np.testing.assert_array_equal(
        np.sort(orders, axis=-1), np.broadcast_to([0, 1, 2], orders.shape)
    )
    numbers = orders @ [9, 3, 1]
    for client in range(3):
        counts = np.unique(numbers[:, client], return_counts=True)[1]
        assert len(counts) == 6 and counts.min() > 60
    assert 0.1 < np.mean(numbers[:, 0] == numbers[:, 1]) < 0.25


def test_projection_is_random_global_and_unscaled_by_default():
    key = jax.random.key(3)
    ours = transformed(server.project_conflicts(), UPDATES, key=key)
    named = server.project_conflicts(order="random", granularity="global", normalise="none")
    np.testing.assert_array_equal(ours, transformed(named, UPDATES, key=key))
    # Clients that conflict with nobody keep their length.
    alike = np.abs(UPDATES)
    np.testing.assert_allclose(
        transformed(server.project_conflicts(), alike, key=key), alike, rtol=1e-6
    )


def test_restored_lengths_are_the_mean_of_those_present():
    alike = np.abs(UPDATES)
    present = np.array([True, False, True, True])
    rule = server.project_conflicts(order="index", normalise="restore")
    ours = transformed(rule, alike, present=present)
    lengths = np.linalg.norm(np.abs(UPDATES)[[0, 2, 3]], axis=1)
    np.testing.assert_allclose(
        np.linalg.norm(ours, axis=1), [lengths.mean(), 0, lengths.mean(), lengths.mean()], rtol=1e-6
    )
