"""Clustered federated learning.

Sattler, Mueller, Samek, arXiv 1910.01991, algorithm 2: FedAvg in every cluster; a cluster whose mean update is small while some member's is not has
reached a stationary point that its members disagree about, and is split in two by the cosine similarity of the updates.

Shapes: K clusters at most, C clients, P parameters. Everything is compiled, the clustering too; memberships are bool ``[K, C]``.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedjax_mtl import costs
from fedjax_mtl.clients.training import Schedule, local_losses
from fedjax_mtl.clients.updates import local_trainer
from fedjax_mtl.core import trees
from fedjax_mtl.core.batching import BatchPlan
from fedjax_mtl.execution import Execution, default_execution, map_clients
from fedjax_mtl.models import Model
from fedjax_mtl.rounds.federated import (
    Algorithm,
    check_full_participation,
    client_key,
    cohort_inputs,
    cohort_weights,
    mean_metrics,
    newcomer_inputs,
    view,
)
from fedjax_mtl.tasks import Task, example_losses

PyTree = Any


class ClusteredState(NamedTuple):
    """The state of clustered FL.

    Attributes:
        round: int32 ``[]``.
        params: the model each client holds, leaves ``[C, ...]``; the same for all members of a cluster.
        members: bool ``[K, C]``; num_clusters: int32 ``[]``, rows of ``members`` in use.
        clients: what each client keeps, leaves ``[C, ...]``.
    """

    round: jax.Array
    params: PyTree
    members: jax.Array
    num_clusters: jax.Array
    clients: PyTree


def cosine_distances(updates: jax.Array) -> jax.Array:
    """``1 - cos(u_s, u_t)``, ``[C, P] -> [C, C]``, with a zero diagonal."""
    norms = jnp.linalg.norm(updates, axis=1)
    scaled = updates / jnp.maximum(norms, jnp.finfo(updates.dtype).tiny)[:, None]
    distance = 1 - scaled @ scaled.T
    return distance * (1 - jnp.eye(len(updates), dtype=updates.dtype))


def bipartition(distance: jax.Array, members: jax.Array) -> jax.Array:
    """Complete-linkage agglomeration of a cluster down to two groups, ``[C, C], bool [C] -> bool [C]``.

    True marks the members of the second group: the one without the first member. Ties merge the pair of lowest index.
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
    """What the criterion looks at, each ``[]``: the norm of the members' mean update, the largest norm and the largest coordinate of any."""

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
    mean_below: float,
    largest_above: float,
    fidelity: str,
) -> tuple[jax.Array, jax.Array]:
    """Splits every cluster that satisfies the criterion; ``[C, P], [K, C], []`` to new ``members, num_clusters``.

    Only the clusters there at the start of the round are looked at, and only those whose members are all ``present`` (bool ``[C]``):
    without its update nobody can be put on a side.
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


def cluster_mixing(members: jax.Array, sizes: jax.Array) -> jax.Array:
    """``[K, C], [C] -> [C, C]``: row c averages the models of c's cluster, weighted by examples.

    A client of two clusters follows the later one, a client of none itself; with ``paper`` each is in one. A cluster of which nobody is
    present (all sizes 0) keeps its models.
    """
    count = members.shape[1]
    last = members.shape[0] - 1 - jnp.argmax(members[::-1], axis=0)
    weights = members[last] * sizes
    total = jnp.sum(weights, axis=1, keepdims=True)
    in_cluster = jnp.any(members, axis=0)[:, None] & (total > 0)
    return jnp.where(in_cluster, weights / jnp.maximum(total, 1), jnp.eye(count))


def clustered(
    model: Model,
    task: Task,
    *,
    num_clients: int,
    plan: BatchPlan,
    optimizer: optax.GradientTransformation,
    mean_below: float = 0.4,
    largest_above: float = 1.6,
    max_clusters: int | None = None,
    schedule: Schedule | None = None,
    keep_optimizer: bool | None = None,
    fidelity: str = "paper",
    execution: Execution | None = None,
) -> Algorithm:
    """Clustered FL. Full participation.

    Args:
        mean_below: eps_1, a cluster splits only while the norm of its members' unweighted mean update is below this;
        largest_above: eps_2, and the norm of some member's update is above this. The defaults are FedEM's released values.
        max_clusters: rows kept for clusters; default half the clients.
        keep_optimizer: keep momenta from round to round; default only with ``fidelity="released"``.
        fidelity: ``released`` reproduces two defects of FedEM's code: the second test looks at the largest absolute *coordinate* of any update, so
            clusters split later or never; and the members of a new cluster are positions inside its parent taken for client numbers, so from
            the second split on a client may sit in two clusters (the later one's model counts) or in none (it keeps its last model).

    Raises:
        ValueError: (when traced) a cohort that is not the whole population.
    """
    if fidelity not in ("paper", "released"):
        raise ValueError(f"fidelity must be 'paper' or 'released', got {fidelity!r}")
    keep = fidelity == "released" if keep_optimizer is None else keep_optimizer
    max_clusters = max(num_clients // 2, 1) if max_clusters is None else max_clusters
    client = local_trainer(model, task, optimizer, plan, schedule=schedule, keep_optimizer=keep)
    losses = example_losses(model, task)

    def init(key):
        params = model.init(key)
        return ClusteredState(
            round=jnp.zeros((), jnp.int32),
            params=trees.broadcast_clients(params, num_clients),
            members=jnp.zeros((max_clusters, num_clients), bool).at[0].set(True),
            num_clusters=jnp.ones((), jnp.int32),
            clients=trees.broadcast_clients(client.init(params), num_clients),
        )

    def how_to_map(params):
        one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), params)
        return default_execution(one) if execution is None else execution

    def one_round(state, cohort, key):
        check_full_participation(cohort, num_clients)

        def one_client(shared, own, params, own_state):
            examples, round_index, round_key = shared
            me = view(examples, own, round_index, round_key)
            return client.update(params, own_state, me, client_key(round_key, me.client_id))

        ids = cohort.client_ids
        results = map_clients(one_client, how_to_map(state.params), cohort.federation.sizes)(
            (cohort.federation.examples, state.round, key),
            cohort_inputs(cohort),
            trees.take_clients(state.params, ids),
            trees.take_clients(state.clients, ids),
        )
        place = jnp.argsort(ids)
        deltas = trees.take_clients(results.pseudo_gradient, place)
        members, num_clusters = split_clusters(
            -trees.flat_clients(deltas),
            state.members,
            state.num_clusters,
            cohort.present[place],
            mean_below,
            largest_above,
            fidelity,
        )
        trained = optax.tree.sub(state.params, deltas)
        mixing = cluster_mixing(members, cohort.federation.sizes[place])
        params = jax.tree.map(lambda x: jnp.tensordot(mixing.astype(x.dtype), x, 1), trained)
        clients = trees.put_clients(state.clients, ids, results.state, cohort.present)
        metrics = mean_metrics(results.metrics, cohort_weights("samples", cohort))
        metrics["num_clusters"] = num_clusters.astype(jnp.float32)
        state = ClusteredState(state.round + 1, params, members, num_clusters, clients)
        return state, metrics

    def predict(state, client_ids, inputs):
        params = trees.take_clients(state.params, client_ids)
        states = trees.take_clients(state.clients, client_ids)
        return jax.vmap(client.predict)(params, states, inputs)

    def adapt(state, newcomers, key):
        # A newcomer joins the cluster whose model has the lowest loss on its data.
        del key
        models = trees.take_clients(state.params, jnp.argmax(state.members, axis=1))
        in_use = jnp.any(state.members, axis=1)

        def choose(shared, own):
            models, examples = shared
            me = view(examples, own, state.round, jax.random.key(0))
            of_models = jax.vmap(losses, in_axes=(0, None, None), out_axes=1)
            totals = jnp.sum(local_losses(of_models, models, me, 256), axis=0)
            return jnp.argmin(jnp.where(in_use, totals, jnp.inf))

        best = map_clients(choose, how_to_map(state.params), newcomers.sizes)(
            (models, newcomers.examples), newcomer_inputs(newcomers)
        )
        params = trees.take_clients(models, best)
        return state._replace(params=params, clients=jax.vmap(client.init)(params))

    def traffic(state):
        size = costs.tree_bytes(state.params) // num_clients
        return size, size

    return Algorithm(init, one_round, predict, adapt, traffic, num_clients)
