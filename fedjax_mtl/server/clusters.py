"""Clusters of clients that are split where their members disagree, and averages inside them.

Sattler, Mueller, Samek, arXiv 1910.01991, algorithm 2: FedAvg in every cluster; a cluster whose
mean update is small while some member's is not has reached a stationary point that its members
disagree about, and is split in two by the cosine similarity of the updates.

Shapes: K clusters at most, C clients, P parameters. Everything is compiled, the clustering too;
memberships are bool ``[K, C]``.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedjax_mtl.core import trees
from fedjax_mtl.core.checks import check_fidelity
from fedjax_mtl.server.reports import Report

PyTree = Any


class ClustersState(NamedTuple):
    """Who is in which cluster.

    Attributes:
        members: bool ``[K, C]``.
        num_clusters: int32 ``[]``; rows of ``members`` in use.
        report: their number, as ``num_clusters``.
    """

    members: jax.Array
    num_clusters: jax.Array
    report: Report


def cosine_distances(updates: jax.Array) -> jax.Array:
    """``1 - cos(u_s, u_t)``, ``[C, P] -> [C, C]``, with a zero diagonal."""
    norms = jnp.linalg.norm(updates, axis=1)
    scaled = updates / jnp.maximum(norms, jnp.finfo(updates.dtype).tiny)[:, None]
    cosines = jnp.matmul(scaled, scaled.T, precision=jax.lax.Precision.HIGHEST)
    return (1 - cosines) * (1 - jnp.eye(len(updates), dtype=updates.dtype))


def bipartition(distance: jax.Array, members: jax.Array) -> jax.Array:
    """Complete-linkage agglomeration of a cluster down to two groups.

    The shapes are ``[C, C], bool [C] -> bool [C]``. True marks the members of the second group: the
    one without the first member. Ties merge the pair of lowest index.
    """
    count = distance.shape[0]
    pair = members[:, None] & members[None, :] & ~jnp.eye(count, dtype=bool)
    linkage = jnp.where(pair, distance, jnp.inf)

    def merge(carry):
        groups, linkage, left = carry
        i, j = jnp.unravel_index(jnp.argmin(linkage), linkage.shape)
        i, j = jnp.minimum(i, j), jnp.maximum(i, j)
        # Group j joins i; the farthest pair decides how far the new group is from the others.
        farthest = jnp.maximum(linkage[i], linkage[j]).at[i].set(jnp.inf)
        linkage = linkage.at[i, :].set(farthest).at[:, i].set(farthest)
        linkage = linkage.at[j, :].set(jnp.inf).at[:, j].set(jnp.inf)
        return jnp.where(groups == j, i, groups), linkage, left - 1

    start = (jnp.arange(count), linkage, jnp.sum(members))
    groups, _, _ = jax.lax.while_loop(lambda carry: carry[2] > 2, merge, start)
    return members & (groups != groups[jnp.argmax(members)])


class SplitNorms(NamedTuple):
    """What the criterion looks at, each ``[]``.

    Attributes:
        mean_update: the norm of the members' mean update.
        largest_update: the largest norm of any member's update.
        largest_coordinate: the largest absolute coordinate of any member's update.
    """

    mean_update: jax.Array
    largest_update: jax.Array
    largest_coordinate: jax.Array


def split_norms(updates: jax.Array, members: jax.Array) -> SplitNorms:
    """The norms of a cluster's updates, ``[C, P], bool [C]``; the mean is unweighted."""
    own = jnp.where(members[:, None], updates, 0)
    mean = jnp.sum(own, axis=0) / jnp.maximum(jnp.sum(members), 1)
    return SplitNorms(
        jnp.linalg.norm(mean), jnp.max(jnp.linalg.norm(own, axis=1)), jnp.max(jnp.abs(own))
    )


def _positions_as_ids(group: jax.Array, members: jax.Array) -> jax.Array:
    """The released code's slip: positions inside the parent cluster taken for client numbers."""
    position = jnp.cumsum(members) - 1
    slots = jnp.where(group, position, members.shape[0])
    return jnp.zeros_like(members).at[slots].set(True, mode="drop")


def split_clusters(
    updates: jax.Array,
    members: jax.Array,
    num_clusters: jax.Array,
    present: jax.Array,
    mean_below: float | jax.Array,
    largest_above: float | jax.Array,
    fidelity: str,
) -> tuple[jax.Array, jax.Array]:
    """Splits every cluster that satisfies the criterion, and returns members and their number.

    Only the clusters there at the start of the round are looked at, and only those whose members
    are all present: without its update nobody can be put on a side.

    Args:
        updates: ``[C, P]``; of absent clients 0.
        members: bool ``[K, C]``.
        num_clusters: int32 ``[]``; rows of ``members`` in use.
        present: bool ``[C]``.
        mean_below: see :func:`average_in_clusters`.
        largest_above: see :func:`average_in_clusters`.
        fidelity: see :func:`average_in_clusters`.
    """
    max_clusters = members.shape[0]
    distance = cosine_distances(updates)

    def consider(k, clusters):
        members, count = clusters
        own = members[k]
        norms = split_norms(updates, own)
        largest = norms.largest_coordinate if fidelity == "released" else norms.largest_update
        split = (norms.mean_update < mean_below) & (largest > largest_above)
        split &= (jnp.sum(own) > 2) & (count < max_clusters) & jnp.all(present | ~own)
        second = bipartition(distance, own & split)
        first = own & ~second
        if fidelity == "released":
            first, second = _positions_as_ids(first, own), _positions_as_ids(second, own)
        members = members.at[k].set(jnp.where(split, first, own))
        members = members.at[jnp.where(split, count, max_clusters)].set(second, mode="drop")
        return members, count + split

    return jax.lax.fori_loop(0, num_clusters, consider, (members, num_clusters))


def own_clusters(members: jax.Array) -> jax.Array:
    """Who is with whom, bool ``[K, C] -> [C, C]``: row c marks the members of c's cluster.

    A client of two clusters follows the later one, and the row of a client of none is empty.
    """
    last = members.shape[0] - 1 - jnp.argmax(members[::-1], axis=0)
    return members[last] & jnp.any(members, axis=0)[:, None]


def mean_of_members(together: jax.Array, weights: jax.Array) -> jax.Array:
    """``[C, C], [C] -> [C, C]``: row c averages the models of those who are together with c.

    Where their weights (shares of examples; 0 for absent clients) are all 0, the client's own model
    stays.
    """
    weighted = together * weights
    total = jnp.sum(weighted, axis=1, keepdims=True)
    means = weighted / jnp.where(total > 0, total, 1)
    return jnp.where(total > 0, means, jnp.eye(weights.shape[0], dtype=weights.dtype))


def average_in_clusters(
    mean_below: float | jax.Array = 0.4,
    largest_above: float | jax.Array = 1.6,
    *,
    max_clusters: int | None = None,
    fidelity: str = "paper",
) -> optax.GradientTransformationExtraArgs:
    """Clustered FL's server, ``[clients, ...] -> [clients, ...]``: splits clusters, averages in
    each.

    Everybody's new model is the mean of those that came back from its cluster, by ``weights``.
    Absent clients add nothing, and are led to their cluster's model as well; a cluster of which
    nobody is present keeps its models. It reports ``num_clusters``.

    It needs the whole population in every round, and own models
    (``federated(..., models="own", full_participation=True)``).

    Args:
        mean_below: eps_1; a cluster splits only while the norm of its members' unweighted mean
            update is below this.
        largest_above: eps_2; and while the norm of some member's update is above this.
        max_clusters: rows kept for clusters; default half the clients.
        fidelity: ``released`` reproduces two defects of FedEM's code: the second test looks at the
            largest absolute *coordinate* of any update, so clusters split later or never; and the
            members of a new cluster are positions inside its parent taken for client numbers, so
            from the second split on a client may sit in two clusters (the later one's model counts)
            or in none (it keeps its last model).

    Extra arguments used: ``weights``, ``client_ids`` and ``present`` ``[clients]``, and ``owned``,
    which says of every leaf which clients have it (default: all).
    """
    check_fidelity(fidelity)

    def init(params):
        count = jax.tree.leaves(params)[0].shape[0]
        rows = max(count // 2, 1) if max_clusters is None else max_clusters
        members = jnp.zeros((rows, count), bool).at[0].set(True)
        return _clusters(members, jnp.ones((), jnp.int32))

    def update(
        updates, state, params=None, *, weights, client_ids, present, owned=None, **extra_args
    ):
        del extra_args
        place = jnp.argsort(client_ids)  # clusters are told by the clients' numbers
        members, num_clusters = split_clusters(
            trees.flat_clients(updates)[place],
            state.members,
            state.num_clusters,
            present[place],
            mean_below,
            largest_above,
            fidelity,
        )
        together = own_clusters(members)[client_ids][:, client_ids]

        def towards_mean(update, param, has):
            mixed = trees.mix_clients(mean_of_members(together & has, weights), param - update)
            return param - mixed

        has = jax.tree.map(lambda x: jnp.ones(len(x), bool), updates) if owned is None else owned
        moves = jax.tree.map(towards_mean, updates, params, has)
        return moves, _clusters(members, num_clusters)

    return optax.GradientTransformationExtraArgs(init, update)


def _clusters(members: jax.Array, num_clusters: jax.Array) -> ClustersState:
    report = Report({"num_clusters": num_clusters.astype(jnp.float32)})
    return ClustersState(members, num_clusters, report)
