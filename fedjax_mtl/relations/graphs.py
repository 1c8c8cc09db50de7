"""Graphs between clients, as adjacencies ``[clients, clients]`` of weights ``a_kl >= 0``.

They are given, random, made from groups or from similarity, or learned as training goes. A
:class:`TaskGraph` is what Laplacian mixing takes. The diagonal never counts.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_mtl.core import trees
from fedjax_mtl.core.checks import InputError

PyTree = Any


def check_adjacency(adjacency: Any, num_clients: int | None = None) -> None:
    """Checks an adjacency between clients.

    Args:
        adjacency: ``[clients, clients]``.
        num_clients: the number of rows it must have; None takes any.

    Raises:
        InputError: the adjacency is not square, of ``num_clients`` rows, finite and not negative.
    """
    matrix = np.asarray(adjacency)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise InputError(f"the adjacency has shape {matrix.shape}; it must be [clients, clients]")
    if num_clients is not None and len(matrix) != num_clients:
        raise InputError(
            f"the adjacency is of {len(matrix)} clients but there are {num_clients}; "
            "give one row and column a client"
        )
    if not np.isfinite(matrix).all():
        raise InputError("the adjacency has entries that are not finite")
    if matrix.min(initial=0) < 0:
        row, column = np.unravel_index(int(matrix.argmin()), matrix.shape)
        raise InputError(
            f"the adjacency has a negative weight, {matrix[row, column]:.3g} between clients "
            f"{row} and {column}; weights push models together, give 0 for no relation"
        )


class TaskGraph(NamedTuple):
    """A graph between clients that may change with what is learned.

    Attributes:
        init: ``num_clients -> state``.
        update: ``(state, updates, results, client_ids, present) -> (state, adjacency [clients,
            clients])``, from the cohort's pseudo-gradients and models, leaves ``[cohort, ...]``.
    """

    init: Callable[[int], PyTree]
    update: Callable[..., tuple[PyTree, jax.Array]]


def _without_diagonal(adjacency: jax.Array) -> jax.Array:
    return adjacency * (1 - jnp.eye(adjacency.shape[0], dtype=adjacency.dtype))


def fixed(adjacency: Any) -> TaskGraph:
    """Returns the same adjacency in every round.

    Args:
        adjacency: ``[clients, clients]``.

    Raises:
        InputError: the adjacency is not square, has negative or infinite weights, or (at init) its
            size is not the population's.
    """
    check_adjacency(adjacency)
    matrix = _without_diagonal(jnp.asarray(adjacency, jnp.float32))

    def init(num_clients: int) -> PyTree:
        check_adjacency(adjacency, num_clients)
        return ()

    return TaskGraph(init, lambda state, *observed: (state, matrix))


def complete_weights(num_clients: int, weight: float = 1.0) -> np.ndarray:
    """Returns the same weight between all pairs, ``[clients, clients]``: mean regularisation."""
    return weight * (1 - np.eye(num_clients))


def within_groups(groups: Any, *, normalised: bool = False) -> np.ndarray:
    """Returns 1 between clients of the same group and 0 between groups, ``[clients, clients]``.

    Args:
        groups: the group of each client, ``[clients]``.
        normalised: divide each row by the size of the group less one.
    """
    groups = np.asarray(groups)
    same = (groups[:, None] == groups).astype(float) - np.eye(len(groups))
    return same / np.maximum(same.sum(axis=1, keepdims=True), 1) if normalised else same


def random(num_clients: int, seed: int = 0, threshold: float = 0.25) -> np.ndarray:
    """Returns the random task graph of the released codes of FedU and MIRA, ``[clients, clients]``.

    The entries are uniform and averaged with the transpose.

    Args:
        num_clients: how many clients.
        seed: of the draw.
        threshold: entries below it become 0.
    """
    entries = np.random.default_rng(seed).random((num_clients, num_clients))
    symmetric = (entries + entries.T) / 2
    symmetric[symmetric < threshold] = 0
    np.fill_diagonal(symmetric, 0)
    return symmetric


def by_similarity(
    features: Any, *, kernel: str = "cosine", bandwidth: float | None = None
) -> np.ndarray:
    """Returns the similarity of clients that are described by vectors, ``[clients, clients]``.

    Args:
        features: ``[clients, values]``: class frequencies, mean inputs, or a first gradient.
        kernel: ``cosine``, cut at 0; or ``gaussian``,
            ``exp(-||f_k - f_l||^2 / (2 bandwidth^2))``.
        bandwidth: of the Gaussian kernel; the default is the median distance.

    Raises:
        InputError: unknown kernel.
    """
    features = np.asarray(features, float)
    if kernel == "cosine":
        norms = np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-30)
        matrix = np.maximum((features / norms) @ (features / norms).T, 0)
    elif kernel == "gaussian":
        distances = np.linalg.norm(features[:, None] - features, axis=-1)
        width = bandwidth or np.median(distances[~np.eye(len(features), dtype=bool)])
        matrix = np.exp(-np.square(distances) / (2 * max(width, 1e-30) ** 2))
    else:
        raise InputError(f"unknown kernel {kernel!r}; expected 'cosine' or 'gaussian'")
    np.fill_diagonal(matrix, 0)
    return matrix


def label_frequencies(federation: Any, num_classes: int) -> np.ndarray:
    """Returns how often each client has each class, ``[clients, classes]``; rows sum to 1.

    It is a description of the clients for :func:`by_similarity`.
    """
    labels, rows = np.asarray(federation.examples["labels"]), np.asarray(federation.indices)
    counts = [
        np.bincount(labels[own[:size]], minlength=num_classes)
        for own, size in zip(rows, np.asarray(federation.sizes), strict=True)
    ]
    return np.stack(counts) / np.asarray(federation.sizes)[:, None]


def by_labels(federation: Any, num_classes: int, *, kernel: str = "cosine") -> np.ndarray:
    """Returns the similarity of the clients' label frequencies, ``[clients, clients]``.

    Args:
        federation: the clients' data, with class labels.
        num_classes: how many classes there are.
        kernel: as for :func:`by_similarity`.
    """
    return by_similarity(label_frequencies(federation, num_classes), kernel=kernel)


def _remember(
    old: jax.Array, new: jax.Array, ids: jax.Array, present: jax.Array, decay: float
) -> jax.Array:
    """Writes a cohort's block ``[cohort, cohort]`` into the population's matrix.

    Where there was something before (>= 0), the new entry is a running mean.
    """
    block = old[ids][:, ids]
    mean = jnp.where(block >= 0, decay * block + (1 - decay) * new, new)
    both = present[:, None] & present
    rows = jnp.where(both, ids[:, None], old.shape[0])
    return old.at[rows, ids[None]].set(mean.astype(old.dtype), mode="drop")


def by_updates(*, decay: float = 0.0, threshold: float = 0.0) -> TaskGraph:
    """Learns edges from the cosines of the clients' pseudo-gradients, as they come.

    The weights are ``a_kl = max(cos, 0)``. Pairs that never met have no edge.

    Args:
        decay: of the running mean of the cosines; 0 takes the last one seen.
        threshold: weights below it become 0.
    """

    def init(num_clients: int) -> jax.Array:
        return jnp.full((num_clients, num_clients), -1.0)

    def update(
        state: jax.Array,
        updates: PyTree,
        results: PyTree,
        client_ids: jax.Array,
        present: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        del results
        gram = trees.inner_products(updates, updates)
        norms = jnp.sqrt(jnp.maximum(jnp.diagonal(gram), 1e-30))
        cosines = jnp.maximum(gram / norms[:, None] / norms, 0)
        state = _remember(state, cosines, client_ids, present, decay)
        return state, _without_diagonal(jnp.where(state >= threshold, jnp.maximum(state, 0), 0))

    return TaskGraph(init, update)


def squared_distances(models: PyTree) -> jax.Array:
    """Returns ``||w_k - w_l||^2`` over all leaves, ``[cohort, ...] -> [cohort, cohort]``.

    It goes through differences, one client after the other: in the Gram matrix nearby models would
    cancel to nothing.
    """

    def to_all(own: PyTree) -> jax.Array:
        parts = jax.tree.map(
            lambda x, o: jnp.sum(
                jnp.square(x - o).astype(jnp.float32).reshape(x.shape[0], -1), axis=1
            ),
            models,
            own,
        )
        return sum(jax.tree.leaves(parts), jnp.zeros(()))

    return jax.lax.map(to_all, models)


def simplex_rows(
    distances: jax.Array, smoothness: jax.Array | float, valid: jax.Array
) -> jax.Array:
    """Returns ``argmin_a sum_l a_kl d_kl + smoothness / 2 ||a_k||^2`` on the simplex, row by row.

    This is the projection of ``-d / smoothness`` onto the simplex, by sorting. A row without a
    valid entry is 0.

    Args:
        distances: d, ``[clients, clients]``.
        smoothness: the larger, the more neighbours a client has.
        valid: bool ``[clients, clients]``; the entries that may be positive.

    Returns:
        The weights a, ``[clients, clients]``.
    """

    def row(d: jax.Array, there: jax.Array) -> jax.Array:
        values = jnp.where(there, -d / smoothness, -jnp.inf)
        ordered = -jnp.sort(-values)
        finite = jnp.isfinite(ordered)
        cumulated = jnp.cumsum(jnp.where(finite, ordered, 0))
        count = jnp.arange(1, len(d) + 1)
        support = finite & (ordered - (cumulated - 1) / count > 0)
        size = jnp.sum(support)
        shift = (cumulated[jnp.maximum(size - 1, 0)] - 1) / jnp.maximum(size, 1)
        return jnp.where(there & (size > 0), jnp.maximum(values - shift, 0), 0)

    return jax.vmap(row)(distances, valid)


def learned(*, smoothness: float = 1.0, decay: float = 0.0) -> TaskGraph:
    """Learns the graph on which the clients' models are smoothest.

    Neighbours are the clients whose models are close:
    ``min_A sum_kl a_kl ||w_k - w_l||^2 + smoothness s / 2 ||A||^2`` over rows that sum to 1, then
    symmetrised (Kalofolias, AISTATS 2016, with rows instead of degrees). Here s is the mean squared
    distance, so that ``smoothness`` has no unit. Models that all agree give the complete graph.
    Pairs that never met have no edge.

    Args:
        smoothness: few neighbours where it is small, all alike where it is large.
        decay: of the running mean of the distances; 0 takes the last one seen.

    Raises:
        InputError: a smoothness that is not positive.
    """
    if smoothness <= 0:
        raise InputError(f"smoothness is {smoothness}; give a positive number")

    def init(num_clients: int) -> jax.Array:
        return jnp.full((num_clients, num_clients), -1.0)

    def update(
        state: jax.Array,
        updates: PyTree,
        results: PyTree,
        client_ids: jax.Array,
        present: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        del updates
        state = _remember(state, squared_distances(results), client_ids, present, decay)
        valid = (state >= 0) & ~jnp.eye(state.shape[0], dtype=bool)
        scale = jnp.sum(jnp.where(valid, state, 0)) / jnp.maximum(jnp.sum(valid), 1)
        rows = simplex_rows(state, jnp.maximum(smoothness * scale, 1e-30), valid)
        return state, (rows + rows.T) / 2

    return TaskGraph(init, update)


def laplacian(adjacency: Any) -> np.ndarray:
    """Returns ``D - A`` of a symmetric adjacency, ``[clients, clients]``."""
    adjacency = np.asarray(adjacency, float) * (1 - np.eye(len(np.asarray(adjacency))))
    return np.diag(adjacency.sum(axis=1)) - adjacency


def largest_stable_step(adjacency: Any) -> float:
    """Returns the step at which Laplacian mixing stops contracting, ``2 / lambda_max(D - A)``.

    It is infinite for a graph without edges.
    """
    largest = float(np.linalg.eigvalsh(laplacian(adjacency))[-1])
    return 2 / largest if largest > 0 else float("inf")


def regulariser(adjacency: Any, models: PyTree) -> jax.Array:
    """Returns what Laplacian mixing descends, ``1/2 sum_kl a_kl ||w_k - w_l||^2``, ``[]``.

    It equals ``tr(W^T (D - A) W)`` (MIRA, arXiv 2410.15524, section II).
    """
    return jnp.sum(_without_diagonal(jnp.asarray(adjacency)) * squared_distances(models)) / 2
