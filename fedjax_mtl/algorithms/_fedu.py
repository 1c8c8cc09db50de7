"""FedU: a Laplacian pull between the models of related clients."""

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_mtl.algorithms._related import mixed_clients
from fedjax_mtl.clients.training import Solver
from fedjax_mtl.core import trees
from fedjax_mtl.core.algorithm import Algorithm
from fedjax_mtl.core.batching import BatchPlan
from fedjax_mtl.execution import Execution
from fedjax_mtl.relations.graphs import TaskGraph
from fedjax_mtl.rounds.groups import Counts, Models, Server, Tasks, population_size
from fedjax_mtl.server.mixing import laplacian_mixing


def among(graph: TaskGraph, clients: np.ndarray, num_clients: int) -> TaskGraph:
    """The part of a population's graph between some of its clients.

    Args:
        graph: of the whole population.
        clients: int ``[part]``, their numbers in it.
        num_clients: of the whole population.
    """

    def init(count):
        del count
        return graph.init(num_clients)

    def update(state, updates, results, client_ids, present):
        own = jnp.asarray(clients)
        state, adjacency = graph.update(state, updates, results, own[client_ids], present)
        return state, adjacency[own][:, own]

    return TaskGraph(init, update)


def fedu(
    model: Models,
    task: Tasks,
    *,
    num_clients: Counts,
    solver: Solver,
    graph: TaskGraph,
    strength: float | jax.Array,
    neighbours: str = "sampled",
    personal: trees.PathPredicate = trees.nothing,
    frozen: trees.PathPredicate = trees.nothing,
    adaptation: BatchPlan | None = None,
    execution: Execution | None = None,
) -> Algorithm:
    """FedU (Dinh et al., arXiv 2102.07148, algorithm 1): a Laplacian pull between clients' models.

    The losses may be convex or not. Leaves that only some groups of clients have, e.g. their
    decoders, are pulled together along the graph's edges between the clients that have them.

    Args:
        model: as for :func:`fedavg`.
        task: as for :func:`fedavg`.
        num_clients: as for :func:`fedavg`.
        solver: local training of the client's own model.
        graph: between the clients, those of one group after those of another by name; see
            :mod:`fedjax_mtl.relations.graphs`.
        strength: of the pull, see :func:`fedjax_mtl.server.laplacian_mixing`. The paper's is
            ``learning rate x local steps x eta``; its released code's
            ``learning rate x L_k x epochs / 2``. Clients move at once, from one snapshot (the
            paper); the released code moves them one after the other.
        neighbours: ``sampled`` or ``all``, see :func:`fedjax_mtl.server.laplacian_mixing`.
        personal: as for :func:`fedavg`.
        frozen: as for :func:`fedavg`.
        adaptation: training of a newcomer, from the mean of all; None leaves that.
        execution: as for :func:`fedavg`.
    """

    def mixing(own: TaskGraph) -> Server:
        return laplacian_mixing(own, strength, neighbours=neighbours)

    return mixed_clients(
        model,
        task,
        num_clients=num_clients,
        solver=solver,
        mixing=[mixing(graph)],
        owners_mixing=lambda owners: mixing(among(graph, owners, population_size(num_clients))),
        personal=personal,
        frozen=frozen,
        adaptation=adaptation,
        execution=execution,
    )
