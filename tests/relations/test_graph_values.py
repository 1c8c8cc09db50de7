"""Graphs between clients and communication graphs by value.

Edges, defaults, and what learned graphs remember.
"""

import inspect
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import networkx as nx
import numpy as np
import pytest

from fedjax_mtl.relations import gossip, graphs

RNG = np.random.default_rng(0)
FEATURES = RNG.normal(size=(4, 3))


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def without_diagonal(matrix):
    return matrix * (1 - np.eye(len(matrix)))


# --- Graphs that are given.


def test_random_graphs_follow_their_seed():
    """Weights are half the sum of uniform entries and their transpose.

    What is below 0.25 has no edge.
    """
    entries = np.random.default_rng(5).random((6, 6))
    expected = (entries + entries.T) / 2
    expected = without_diagonal(np.where(expected < 0.25, 0, expected))
    assert 0 < (expected == 0).sum() - 6 < 20
    np.testing.assert_array_equal(graphs.random(6, seed=5), expected)
    np.testing.assert_array_equal(graphs.random(6), graphs.random(6, seed=0))


def test_cosines_of_descriptions():
    """Cosines are cut at 0, and a description without length resembles nobody."""
    units = FEATURES / np.linalg.norm(FEATURES, axis=1, keepdims=True)
    expected = without_diagonal(np.maximum(units @ units.T, 0))
    assert (expected == 0).sum() > 4
    np.testing.assert_allclose(graphs.by_similarity(FEATURES), expected, atol=1e-12)
    nothing = np.vstack([FEATURES, np.zeros(3)])
    assert not graphs.by_similarity(nothing)[4].any()


def test_gaussian_similarities():
    """The width is the median distance, or the bandwidth that is asked for."""
    distances = np.linalg.norm(FEATURES[:, None] - FEATURES, axis=-1)
    median = np.median(distances[~np.eye(4, dtype=bool)])
    for bandwidth, width in ((None, median), (0.7, 0.7)):
        ours = graphs.by_similarity(FEATURES, kernel="gaussian", bandwidth=bandwidth)
        expected = without_diagonal(np.exp(-np.square(distances) / (2 * width**2)))
        np.testing.assert_allclose(ours, expected, rtol=1e-9)


def test_groups_and_complete_graphs():
    np.testing.assert_array_equal(graphs.complete_weights(3), 1 - np.eye(3))
    np.testing.assert_array_equal(graphs.complete_weights(3, 0.2), 0.2 * (1 - np.eye(3)))
    halves = graphs.within_groups([0, 1, 0, 0], normalised=True)
    np.testing.assert_allclose(
        halves, [[0, 0, 0.5, 0.5], [0, 0, 0, 0], [0.5, 0, 0, 0.5], [0.5, 0, 0.5, 0]]
    )


def test_label_frequencies():
    """Frequencies are those of each client's own examples, without its padding."""
    federation = SimpleNamespace(
        examples={"labels": np.array([0, 2, 2, 1, 2])},
        indices=np.array([[0, 1, 2], [3, 0, 0]]),
        sizes=np.array([3, 1]),
    )
    ours = graphs.label_frequencies(federation, 4)
    np.testing.assert_allclose(ours, [[1 / 3, 0, 2 / 3, 0], [0, 1, 0, 0]])


def test_laplacian_and_its_regulariser():
    """The diagonal does not count.

    The regulariser counts every pair twice, and has a half before the sum.
    """
    adjacency = graphs.random(4, 1) + 3 * np.eye(4)
    own = without_diagonal(adjacency)
    laplacian = np.diag(own.sum(axis=1)) - own
    np.testing.assert_allclose(graphs.laplacian(adjacency), laplacian)
    np.testing.assert_allclose(
        graphs.regulariser(adjacency, jnp.asarray(FEATURES)),
        np.trace(FEATURES.T @ laplacian @ FEATURES),
        rtol=1e-6,
    )
    largest = np.linalg.eigvalsh(laplacian)[-1]
    np.testing.assert_allclose(graphs.largest_stable_step(adjacency), 2 / largest)
    assert graphs.largest_stable_step(np.eye(3)) == float("inf")


# --- Graphs that are learned.


def observed(graph, rounds):
    """The adjacency after some rounds of ``(updates, models, ids, present)`` among five clients."""
    state = graph.init(5)
    update = jax.jit(graph.update)
    for updates, models, ids, present in rounds:
        state, adjacency = update(state, *map(jnp.asarray, (updates, models, ids, present)))
    return np.asarray(adjacency)


def cosine(a, b):
    return max(a @ b / np.linalg.norm(a) / np.linalg.norm(b), 0)


def test_similar_updates_make_edges():
    """Edges are running means of the cosines where a pair has met before.

    There is no edge below the threshold, or between clients that never met.
    """
    first, second = np.abs(RNG.normal(size=(2, 3, 2)))
    ids, here = np.array([3, 0, 2]), np.ones(3, bool)
    rounds = [(first, first, ids, here), (second, second, ids, np.array([True, True, False]))]
    met_once = cosine(first[0], first[2])
    for decay, threshold in ((0.0, 0.0), (0.6, 0.0), (0.6, 0.9)):
        ours = observed(graphs.by_updates(decay=decay, threshold=threshold), rounds)
        twice = decay * cosine(first[0], first[1]) + (1 - decay) * cosine(second[0], second[1])
        cut = [0 if value < threshold else value for value in (twice, met_once)]
        np.testing.assert_allclose([ours[3, 0], ours[3, 2]], cut, rtol=1e-6)
        assert not ours[:, [1, 4]].any() and not np.diag(ours).any()
        np.testing.assert_allclose(ours, ours.T, rtol=1e-9)


def test_clients_that_conflict_have_no_edge():
    opposite = np.array([[1.0, 0], [-1, 0.1], [0.5, 0.5]])
    ours = observed(graphs.by_updates(), [(opposite, opposite, np.arange(3), np.ones(3, bool))])
    assert ours[0, 1] == 0 and ours[0, 2] == pytest.approx(np.sqrt(0.5))


def rows_by_hand(distances, smoothness):
    """Minimises ``sum_l a_kl d_kl + smoothness / 2 ||a_k||^2`` over the simplex.

    The diagonal is left out. The shift is found by bisection.
    """
    rows = np.zeros_like(distances)
    for k in range(len(distances)):
        others = np.arange(len(distances)) != k
        values = -distances[k, others] / smoothness
        low, high = values.min() - 1, values.max()
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (
                (middle, high) if np.maximum(values - middle, 0).sum() > 1 else (low, middle)
            )
        rows[k, others] = np.maximum(values - low, 0)
    return rows


@pytest.mark.parametrize("smoothness", [None, 0.3])
def test_learned_graphs(smoothness):
    """Smoothness is counted in mean squared distances and is 1 by default.

    Rows are made symmetric.
    """
    models = RNG.normal(size=(5, 3))
    settings = {} if smoothness is None else {"smoothness": smoothness}
    ours = observed(graphs.learned(**settings), [(models, models, np.arange(5), np.ones(5, bool))])
    distances = np.square(models[:, None] - models).sum(axis=-1)
    scale = distances.sum() / 20
    rows = rows_by_hand(distances, (smoothness or 1.0) * scale)
    np.testing.assert_allclose(ours, (rows + rows.T) / 2, atol=1e-6)


def test_learned_graphs_remember_distances():
    """With a decay the distances are running means.

    Models that agree give the complete graph.
    """
    first, second = RNG.normal(size=(2, 5, 3))
    whole = np.arange(5), np.ones(5, bool)
    rounds = [(first, first, *whole), (second, second, *whole)]
    ours = observed(graphs.learned(decay=0.7), rounds)
    both = [np.square(m[:, None] - m).sum(axis=-1) for m in (first, second)]
    distances = 0.7 * both[0] + 0.3 * both[1]
    rows = rows_by_hand(distances, distances.sum() / 20)
    np.testing.assert_allclose(ours, (rows + rows.T) / 2, atol=1e-6)
    np.testing.assert_allclose(
        observed(graphs.learned(), rounds), observed(graphs.learned(), rounds[1:])
    )
    same = np.ones((5, 3))
    np.testing.assert_allclose(
        observed(graphs.learned(), [(same, same, *whole)]), (1 - np.eye(5)) / 4, rtol=1e-6
    )


def test_distances_are_over_all_leaves():
    models = {"a": jnp.asarray(FEATURES), "b": jnp.asarray(FEATURES[:, :2].reshape(4, 1, 2))}
    flat = np.concatenate([FEATURES, FEATURES[:, :2]], axis=1)
    expected = np.square(flat[:, None] - flat).sum(axis=-1)
    np.testing.assert_allclose(graphs.squared_distances(models), expected, rtol=1e-6)


# --- Communication graphs.


def test_communication_graphs():
    """A ring of two is a pair, and a ring of one is alone.

    Random graphs are connected and differ by their seed.
    """
    assert sorted(dict(gossip.ring(5).degree).values()) == [2] * 5
    assert gossip.ring(3).number_of_edges() == 3
    assert gossip.ring(2).number_of_edges() == 1
    assert gossip.complete_graph(4).number_of_edges() == 6
    drawn = [gossip.erdos_renyi(12, seed=seed) for seed in range(30)]
    assert all(map(nx.is_connected, drawn))
    assert len({frozenset(graph.edges) for graph in drawn}) == 30
    # A graph that falls apart is drawn again, from a seed of its own: this one twice.
    again = nx.gnp_random_graph(6, 0.3, seed=5 + 2 * 7919)
    assert set(gossip.erdos_renyi(6, 0.3, seed=5).edges) == set(again.edges)
    # About half of all pairs are connected.
    np.testing.assert_allclose(np.mean([g.number_of_edges() for g in drawn]), 33, atol=2)


def test_weights_of_communication_graphs():
    """A path of three has a third on each edge and the rest on the diagonal."""
    path = gossip.metropolis_weights(nx.path_graph(3))
    np.testing.assert_allclose(path, [[2 / 3, 1 / 3, 0], [1 / 3, 1 / 3, 1 / 3], [0, 1 / 3, 2 / 3]])
    np.testing.assert_allclose(gossip.mixing_rate(path), 2 / 3)
    np.testing.assert_allclose(gossip.mixing_rate(np.eye(3)), 1)
    # On a star no weights mix faster than these.
    star = gossip.fastest_mixing_weights(nx.star_graph(4))
    assert np.diag(star).min() >= -1e-9
    np.testing.assert_allclose(gossip.mixing_rate(star), 0.75, atol=0.02)
    ring = gossip.without_self_loops(gossip.metropolis_weights(gossip.ring(4)))
    np.testing.assert_allclose(ring[0], [0, 0.5, 0, 0.5])


def test_defaults():
    """Graphs depend on these default values."""
    for function, expected in (
        (graphs.complete_weights, {"weight": 1.0}),
        (graphs.within_groups, {"normalised": False}),
        (graphs.random, {"seed": 0, "threshold": 0.25}),
        (graphs.by_similarity, {"kernel": "cosine", "bandwidth": None}),
        (graphs.by_updates, {"decay": 0.0, "threshold": 0.0}),
        (graphs.learned, {"smoothness": 1.0, "decay": 0.0}),
        (gossip.erdos_renyi, {"probability": 0.5, "seed": 0}),
        (gossip.fastest_mixing_weights, {"iterations": 300}),
    ):
        parameters = inspect.signature(function).parameters
        assert {own: parameters[own].default for own in expected} == expected
