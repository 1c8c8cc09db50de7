"""Sheaf-FMTL: clients that are neighbours agree on learned projections of their models."""

import jax
import numpy as np

from fedjax_mtl.algorithms._related import mixed_clients
from fedjax_mtl.clients.training import Solver
from fedjax_mtl.core import trees
from fedjax_mtl.core.algorithm import Algorithm
from fedjax_mtl.core.batching import BatchPlan
from fedjax_mtl.execution import Execution
from fedjax_mtl.rounds.composition import Composition
from fedjax_mtl.rounds.groups import Counts, Models, Server, Tasks, population_ids
from fedjax_mtl.server.sheaf import sheaf_mixing, sheaf_traffic


def sheaf_fmtl(
    model: Models,
    task: Tasks,
    *,
    num_clients: Counts,
    solver: Solver,
    adjacency: np.ndarray,
    strength: float,
    map_step: float,
    compression: float = 0.1,
    deviation: float = 0.01,
    map_seed: int = 0,
    personal: trees.PathPredicate = trees.nothing,
    frozen: trees.PathPredicate = trees.nothing,
    adaptation: BatchPlan | None = None,
    execution: Execution | None = None,
) -> Algorithm:
    """Sheaf-FMTL (Ben Issaid et al., arXiv 2502.01145): neighbours agree on learned projections.

    The projections of the models are low-dimensional, and each edge of the graph has its own
    (:func:`fedjax_mtl.server.sheaf_mixing`). Leaves that only some groups of clients have, have
    maps of their own, on the edges between the clients that have them. ``traffic`` is that of the
    busiest client.

    Args:
        model: as for :func:`fedavg`.
        task: as for :func:`fedavg`.
        num_clients: as for :func:`fedavg`.
        solver: local training of the client's own model.
        adjacency: ``[clients, clients]``; an entry above 0 is an edge, its weight does not count.
        strength: of the step in the models; the released code's alpha x lambda.
        map_step: of the step in the maps; the released code's eta x lambda.
        compression: share of a model's parameters that an edge carries.
        deviation: standard deviation of the first maps.
        map_seed: of the first maps.
        personal: as for :func:`fedavg`.
        frozen: as for :func:`fedavg`.
        adaptation: training of a newcomer, from the mean of all; None leaves that.
        execution: as for :func:`fedavg`.
    """

    def mixing(edges: np.ndarray) -> Server:
        return sheaf_mixing(
            edges,
            key=jax.random.key(map_seed),
            strength=strength,
            map_step=map_step,
            compression=compression,
            deviation=deviation,
        )

    algorithm = mixed_clients(
        model,
        task,
        num_clients=num_clients,
        solver=solver,
        mixing=[mixing(adjacency)],
        owners_mixing=lambda owners: mixing(np.asarray(adjacency)[np.ix_(owners, owners)]),
        personal=personal,
        frozen=frozen,
        adaptation=adaptation,
        execution=execution,
    )
    size = _busiest_traffic(algorithm.parts, np.asarray(adjacency), compression)
    return algorithm._replace(traffic=lambda state: (size, size))


def _busiest_traffic(composition: Composition, adjacency: np.ndarray, compression: float) -> int:
    """The bytes that the client with most sends in a round, over all that it shares with others."""
    counts = {name: group.num_clients for name, group in composition.groups.items()}
    sent = np.zeros(sum(counts.values()), int)
    for section in composition.sections:
        first = section.members[0]
        shared = composition.groups[first].client.shared
        leaves = jax.tree.leaves(
            section.pick(trees.partition(composition.templates[first], shared)[0])
        )
        size = sum(leaf.size for leaf in leaves)
        owners = population_ids(section.members, counts)
        for owner, edges in zip(owners, adjacency[np.ix_(owners, owners)], strict=True):
            sent[owner] += sheaf_traffic(edges[None], size, compression)
    return int(sent.max())
