"""Graphs and mixing matrices."""

import jax.numpy as jnp
import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_mtl.relations import gossip
from fedjax_mtl.server.gossip import check_mixing_matrix

SETTINGS = settings(deadline=None, max_examples=15)


@SETTINGS
@given(st.integers(3, 12), st.integers(0, 50))
def test_weights_are_symmetric_stochastic_and_on_the_graph(count, seed):
    graph = gossip.erdos_renyi(count, 0.6, seed)
    adjacency = nx.to_numpy_array(graph) + np.eye(count)
    metropolis = gossip.metropolis_weights(graph)
    fastest = gossip.fastest_mixing_weights(graph, iterations=60)
    for weights in (metropolis, fastest):
        np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-9)
        np.testing.assert_allclose(weights, weights.T, atol=1e-12)
        assert weights.min() >= -1e-9
        assert (weights[adjacency == 0] == 0).all()
        check_mixing_matrix(jnp.asarray(weights))
    assert gossip.mixing_rate(fastest) <= gossip.mixing_rate(metropolis) + 1e-12


def test_fastest_mixing_on_graphs_with_known_optima():
    """The complete graph mixes at once, the path of n nodes at rate cos(pi / n) with weights 1/2.

    Reference: Boyd, Diaconis, Xiao.
    """
    assert gossip.mixing_rate(gossip.fastest_mixing_weights(gossip.complete_graph(6))) < 1e-6
    path = gossip.fastest_mixing_weights(nx.path_graph(5), iterations=3000)
    np.testing.assert_allclose(gossip.mixing_rate(path), np.cos(np.pi / 5), atol=5e-3)


def test_zero_diagonals():
    weights = gossip.without_self_loops(gossip.metropolis_weights(gossip.complete_graph(5)))
    np.testing.assert_allclose(weights, (np.ones((5, 5)) - np.eye(5)) / 4, atol=1e-9)
    with pytest.raises(ValueError, match="no doubly stochastic matrix with a zero diagonal"):
        gossip.without_self_loops(gossip.metropolis_weights(nx.star_graph(3)))


def test_bad_graphs_and_matrices():
    apart = nx.Graph([(0, 1), (2, 3), (3, 4)])
    with pytest.raises(ValueError, match=r"falls into 2 parts of sizes \[2, 3\]"):
        gossip.metropolis_weights(apart)
    with pytest.raises(ValueError, match="no connected Erdos-Renyi graph of 20 clients"):
        gossip.erdos_renyi(20, 0.001)
    with pytest.raises(ValueError, match=r"shape \(2, 3\)"):
        check_mixing_matrix(jnp.ones((2, 3)))
    with pytest.raises(ValueError, match="row 1 of the mixing matrix sums to 0.5000"):
        check_mixing_matrix(jnp.array([[1.0, 0], [0.25, 0.25]]))
    with pytest.raises(ValueError, match="negative entry"):
        check_mixing_matrix(jnp.array([[1.5, -0.5], [-0.5, 1.5]]))


def test_two_clients_and_one():
    np.testing.assert_allclose(
        gossip.fastest_mixing_weights(gossip.complete_graph(2)), np.full((2, 2), 0.5)
    )
    np.testing.assert_allclose(gossip.metropolis_weights(gossip.ring(1)), [[1.0]])
