"""Communication graphs of decentralised training, and the mixing matrices on them.

All is plain numpy and networkx (imported where it is used): a mixing matrix is made once, before
anything is compiled.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fedjax_mtl.core.checks import InputError, check_choice

if TYPE_CHECKING:
    import networkx as nx


def complete_graph(num_clients: int) -> nx.Graph:
    """Returns the graph in which everybody talks to everybody."""
    import networkx as nx

    return nx.complete_graph(num_clients)


def ring(num_clients: int) -> nx.Graph:
    """Returns the graph in which each client talks to two neighbours.

    Of two clients or one, each talks to whoever there is.
    """
    import networkx as nx

    return nx.cycle_graph(num_clients) if num_clients > 2 else nx.path_graph(num_clients)


def erdos_renyi(num_clients: int, probability: float = 0.5, seed: int = 0) -> nx.Graph:
    """Returns a random graph that is connected: it is redrawn until it is.

    Args:
        num_clients: how many nodes.
        probability: with which each pair is connected; 0.5 in FedEM's decentralised experiments.
        seed: of the first draw.

    Raises:
        InputError: no connected graph in 1000 draws.
    """
    import networkx as nx

    for attempt in range(1000):
        graph = nx.gnp_random_graph(num_clients, probability, seed=seed + 7919 * attempt)
        if nx.is_connected(graph):
            return graph
    raise InputError(
        f"no connected Erdos-Renyi graph of {num_clients} clients in 1000 draws at probability "
        f"{probability}; raise it well above log(clients) / clients = "
        f"{np.log(num_clients) / num_clients:.3f}"
    )


def adjacency_of(graph: nx.Graph) -> np.ndarray:
    """Returns 1 where two clients are connected and 0 elsewhere, ``[clients, clients]``."""
    import networkx as nx

    return nx.to_numpy_array(graph)


def _check_connected(graph: nx.Graph) -> None:
    import networkx as nx

    if not nx.is_connected(graph):
        parts = [len(part) for part in nx.connected_components(graph)]
        raise InputError(
            f"the communication graph falls into {len(parts)} parts of sizes {sorted(parts)}; "
            "models of different parts would never mix, connect them"
        )


def metropolis_weights(graph: nx.Graph) -> np.ndarray:
    """Returns the Metropolis-Hastings weights of a connected graph, ``[clients, clients]``.

    They are ``W_ij = 1 / (1 + max(d_i, d_j))`` on edges, from degrees alone; the rest of each row
    stands on the diagonal. The matrix is symmetric and doubly stochastic.
    """
    _check_connected(graph)
    count = graph.number_of_nodes()
    weights = np.zeros((count, count))
    for i, j in graph.edges:
        weights[i, j] = weights[j, i] = 1.0 / (1 + max(graph.degree[i], graph.degree[j]))
    np.fill_diagonal(weights, 1.0 - weights.sum(axis=1))
    return weights


def mixing_rate(weights: np.ndarray) -> float:
    """Returns the second largest eigenvalue modulus of a symmetric mixing matrix.

    The disagreement of the clients shrinks by this factor in each gossip step.
    """
    count = len(weights)
    return float(np.abs(np.linalg.eigvalsh(weights - np.ones((count, count)) / count)).max())


def _project_vertex(values: np.ndarray, limit: float) -> np.ndarray:
    """Returns the closest point with entries >= 0 that sum to at most ``limit``."""
    clipped = np.maximum(values, 0)
    if clipped.sum() <= limit:
        return clipped
    ordered = np.sort(values)[::-1]
    excess = (np.cumsum(ordered) - limit) / np.arange(1, len(values) + 1)
    rho = np.nonzero(ordered > excess)[0][-1]
    return np.maximum(values - excess[rho], 0)


def fastest_mixing_weights(graph: nx.Graph, iterations: int = 300) -> np.ndarray:
    """Approximates the fastest mixing Markov chain on a graph.

    It minimises :func:`mixing_rate` over the weights of the edges, with ``W_ii >= 0`` (Boyd,
    Diaconis, Xiao, SIAM Review 46, 2004). The problem is convex. This is the paper's projected
    subgradient method (section 5) with step 1/k, from Metropolis-Hastings weights, and it keeps the
    best iterate.

    FedEM's decentralised experiments use this chain. Their released code also forces ``W_ii = 0``,
    so that each client throws its own model away: see :func:`without_self_loops`.

    Args:
        graph: connected.
        iterations: how many subgradient steps.

    Returns:
        The mixing matrix, symmetric, ``[clients, clients]``.
    """
    best = metropolis_weights(graph)
    best_rate = mixing_rate(best)
    edges = np.array(graph.edges)
    values = best[edges[:, 0], edges[:, 1]]
    count = graph.number_of_nodes()
    incident = [np.nonzero((edges == node).any(axis=1))[0] for node in range(count)]
    for k in range(1, iterations + 1):
        weights = _from_edges(values, edges, count)
        eigenvalues, vectors = np.linalg.eigh(weights - np.ones((count, count)) / count)
        which = int(np.argmax(np.abs(eigenvalues)))
        u = vectors[:, which]
        # d lambda / d w_ij = -(u_i - u_j)^2, and the modulus has the eigenvalue's sign.
        subgradient = -np.sign(eigenvalues[which]) * (u[edges[:, 0]] - u[edges[:, 1]]) ** 2
        size = np.linalg.norm(subgradient)
        if size == 0:
            break  # mixes in one step already
        values = values - subgradient / (k * size)
        for own in incident:
            values[own] = _project_vertex(values[own], 1.0)
        weights = _from_edges(values, edges, count)
        rate = mixing_rate(weights)
        if rate < best_rate:
            best, best_rate = weights, rate
    return best


def _from_edges(values: np.ndarray, edges: np.ndarray, count: int) -> np.ndarray:
    weights = np.zeros((count, count))
    weights[edges[:, 0], edges[:, 1]] = weights[edges[:, 1], edges[:, 0]] = values
    np.fill_diagonal(weights, 1.0 - weights.sum(axis=1))
    return weights


def without_self_loops(weights: np.ndarray, iterations: int = 1000) -> np.ndarray:
    """Forces the diagonal of a mixing matrix to zero, by Sinkhorn's iteration.

    The result is symmetric and doubly stochastic again. This is the defect of FedEM's released
    code, for comparison with it.

    Args:
        weights: the mixing matrix, ``[clients, clients]``.
        iterations: of Sinkhorn's scaling.

    Raises:
        InputError: there is no such matrix on this graph, e.g. for a client with a single neighbour
            that others need too.
    """
    result = weights - np.diag(np.diag(weights))
    for _ in range(iterations):
        scale = 1.0 / np.sqrt(result.sum(axis=1))
        result = scale[:, None] * result * scale[None, :]
    if np.abs(result.sum(axis=1) - 1).max() > 1e-6:
        raise InputError("this graph admits no doubly stochastic matrix with a zero diagonal")
    return result


def mixing_matrix(
    graph: nx.Graph, *, weights: str = "fastest", self_loops: bool = True
) -> np.ndarray:
    """Returns the mixing matrix on a graph, float32 ``[clients, clients]``.

    Args:
        graph: who talks to whom.
        weights: ``fastest`` (:func:`fastest_mixing_weights`) or ``metropolis``
            (:func:`metropolis_weights`).
        self_loops: whether a client's own model counts; see :func:`without_self_loops`.
    """
    check_choice("weights", weights, ("fastest", "metropolis"))
    weigh = fastest_mixing_weights if weights == "fastest" else metropolis_weights
    matrix = weigh(graph) if self_loops else without_self_loops(weigh(graph))
    return matrix.astype(np.float32)
