"""Clustered federated learning.

Sattler, Mueller, Samek, arXiv 1910.01991, algorithm 2: FedAvg in every cluster, and clusters that
split where their members disagree; the rule stands in :mod:`fedjax_mtl.server.clusters`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fedjax_mtl.clients.training import Losses, Solver, local_losses
from fedjax_mtl.clients.updates import local_trainer
from fedjax_mtl.core import trees
from fedjax_mtl.core.algorithm import Algorithm
from fedjax_mtl.core.checks import check_fidelity
from fedjax_mtl.core.federation import Federation
from fedjax_mtl.core.task import example_losses
from fedjax_mtl.execution import Execution, default_execution, map_clients
from fedjax_mtl.rounds.composition import FederatedState
from fedjax_mtl.rounds.engine import client_view, newcomer_inputs
from fedjax_mtl.rounds.federated import federated
from fedjax_mtl.rounds.groups import Counts, Models, Tasks, client_offsets, each_group
from fedjax_mtl.server.clusters import average_in_clusters

PyTree = Any


def clustered(
    model: Models,
    task: Tasks,
    *,
    num_clients: Counts,
    solver: Solver,
    mean_below: float | jax.Array = 0.4,
    largest_above: float | jax.Array = 1.6,
    max_clusters: int | None = None,
    fidelity: str = "paper",
    execution: Execution | None = None,
) -> Algorithm:
    """Clustered FL. Full participation.

    A client that is absent, or whose update diverged, follows its cluster's model all the same. A
    newcomer joins the cluster whose model has the lowest loss on its data.

    Args:
        model: as for :func:`fedavg`.
        task: as for :func:`fedavg`.
        num_clients: as for :func:`fedavg`. Clients of several groups may share a cluster; leaves
            that some of them have are averaged among those.
        solver: local training. Its optimiser's state is kept from round to round where it says so
            itself, or else with ``fidelity="released"``.
        mean_below: eps_1, a cluster splits only while the norm of its members' unweighted mean
            update is below this. The default is FedEM's released value, as that of
            ``largest_above``.
        largest_above: eps_2, and while the norm of some member's update is above this.
        max_clusters: rows kept for clusters; default half the clients.
        fidelity: ``released`` reproduces two defects of FedEM's code, see
            :func:`fedjax_mtl.server.clusters.average_in_clusters`.
        execution: as for :func:`fedavg`.

    Raises:
        ValueError: (when traced) a cohort that is not the whole population.
    """
    check_fidelity(fidelity)

    def make_client(model, task):
        return local_trainer(model, task, solver.keeping(fidelity == "released"))

    clusters = average_in_clusters(
        mean_below, largest_above, max_clusters=max_clusters, fidelity=fidelity
    )
    algorithm = federated(
        each_group(model, task, num_clients, make_client),
        optax.chain(clusters, optax.sgd(1.0)),
        models="own",
        meeting=trees.everything,
        weighting="samples",
        execution=execution,
        full_participation=True,
    )
    return algorithm._replace(adapt=functools.partial(_join_clusters, algorithm, model, task))


def _join_clusters(
    algorithm: Algorithm,
    model: Models,
    task: Tasks,
    state: FederatedState,
    newcomers: PyTree,
    key: jax.Array,
) -> FederatedState:
    """The state whose clients are the newcomers, each with the model of the best cluster for it."""
    composition, members = algorithm.parts, state.server[0].members
    counts = {name: group.num_clients for name, group in composition.groups.items()}
    offsets = client_offsets(counts)
    params, clients = (dict(composition.by_group(x)) for x in (state.params, state.clients))
    for name, own in (newcomers if composition.grouped else {"": newcomers}).items():
        there = members[:, offsets[name] : offsets[name] + counts[name]]
        losses = example_losses(_of(model, name), _of(task, name))
        params[name] = _best_models(
            losses, params[name], there, own, state.round, key, composition.execution
        )
        clients[name] = jax.vmap(composition.groups[name].client.init)(params[name])
    return state._replace(params=composition.outside(params), clients=composition.outside(clients))


def _of(value: Any, name: str) -> Any:
    """A group's model or task."""
    return value[name] if isinstance(value, dict) else value


def _best_models(
    losses: Losses,
    params: PyTree,
    members: jax.Array,
    newcomers: Federation,
    round_index: jax.Array,
    key: jax.Array,
    execution: Execution | None,
) -> PyTree:
    """For each newcomer the cluster model of lowest loss on its data, ``[newcomers, ...]``.

    Args:
        losses: of examples.
        params: the models of a group's clients, ``[clients, ...]``.
        members: which of them are in which cluster, bool ``[K, clients]``.
        newcomers: of the same group.
        round_index: int32 ``[]``.
        key: of the newcomers' views.
        execution: how newcomers are mapped; None picks by platform and model size.
    """
    models = trees.take_clients(params, jnp.argmax(members, axis=1))
    in_use = jnp.any(members, axis=1)
    if execution is None:
        one = jax.eval_shape(lambda tree: jax.tree.map(lambda leaf: leaf[0], tree), models)
        execution = default_execution(one)

    def choose(shared, own):
        models, examples = shared
        me = client_view(examples, own, round_index, key)
        of_models = jax.vmap(losses, in_axes=(0, None, None), out_axes=1)
        totals = jnp.sum(local_losses(of_models, models, me, 256), axis=0)
        return jnp.argmin(jnp.where(in_use, totals, jnp.inf))

    best = map_clients(choose, execution, newcomers.sizes)(
        (models, newcomers.examples), newcomer_inputs(newcomers)
    )
    return trees.take_clients(models, best)
