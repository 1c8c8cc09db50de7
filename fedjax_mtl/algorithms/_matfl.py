"""MaT-FL: encoders are averaged in clusters that are found anew in every round."""

from fedjax_mtl.algorithms._related import mixed_clients
from fedjax_mtl.clients.training import Solver
from fedjax_mtl.core import trees
from fedjax_mtl.core.algorithm import Algorithm
from fedjax_mtl.core.batching import BatchPlan
from fedjax_mtl.execution import Execution
from fedjax_mtl.rounds.groups import Counts, Models, Tasks
from fedjax_mtl.server.mixing import cluster_mixing

ENCODER = trees.under("encoder")


def matfl(
    model: Models,
    task: Tasks,
    *,
    num_clients: Counts,
    solver: Solver,
    encoder: trees.PathPredicate = ENCODER,
    num_clusters: int = 2,
    soft: bool = False,
    threshold: float = 0.0,
    adaptation: BatchPlan | None = None,
    execution: Execution | None = None,
) -> Algorithm:
    """MaT-FL (Cai et al., CVPR workshops 2023): encoders are averaged in clusters, found anew.

    The clusters are those of the round, and all else is personal; see
    :func:`fedjax_mtl.server.cluster_mixing`. One cluster is FedPer, as many as clients is training
    alone.

    Args:
        model: as for :func:`fedavg`.
        task: as for :func:`fedavg`.
        num_clients: as for :func:`fedavg`.
        solver: local training of the client's own model.
        encoder: path predicate of what is averaged.
        num_clusters: of hard clustering.
        soft: weights by similarity instead of clusters (in the authors' code only).
        threshold: of soft weights, see :func:`fedjax_mtl.server.cluster_mixing`.
        adaptation: training of a newcomer, from the mean encoder; None leaves that.
        execution: as for :func:`fedavg`.
    """
    return mixed_clients(
        model,
        task,
        num_clients=num_clients,
        solver=solver,
        mixing=[cluster_mixing(num_clusters, soft=soft, threshold=threshold)],
        personal=trees.negate(encoder),
        adaptation=adaptation,
        execution=execution,
    )
