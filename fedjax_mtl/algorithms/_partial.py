"""Partial sharing: a part of the model travels, the rest stays with each client.

All are FedAvg with a path predicate; what is shared is never a class.
"""

from fedjax_mtl.algorithms._fedavg import fedavg
from fedjax_mtl.clients.training import Solver
from fedjax_mtl.clients.updates import Phase
from fedjax_mtl.core import trees
from fedjax_mtl.core.algorithm import Algorithm
from fedjax_mtl.core.batching import BatchPlan
from fedjax_mtl.execution import Execution
from fedjax_mtl.rounds.engine import Weighting
from fedjax_mtl.rounds.groups import Counts, Models, Server, Tasks

DECODERS = trees.under("decoder", "decoders")
"""The heads of this library's models, by the names of their top-level entries."""

BODY = trees.negate(DECODERS)
"""All that is no head."""


def fedper(
    model: Models,
    task: Tasks,
    *,
    num_clients: Counts,
    solver: Solver,
    head: trees.PathPredicate = DECODERS,
    server: Server | None = None,
    weighting: Weighting = "samples",
    adaptation: BatchPlan | None = None,
    execution: Execution | None = None,
) -> Algorithm:
    """FedPer (Arivazhagan et al., arXiv 1912.00818): the head stays, all is trained jointly.

    Args:
        model: as for :func:`fedavg`.
        task: as for :func:`fedavg`.
        num_clients: as for :func:`fedavg`.
        solver: as for :func:`fedavg`.
        head: path predicate of the head.
        server: as for :func:`fedavg`.
        weighting: as for :func:`fedavg`.
        adaptation: as for :func:`fedavg`.
        execution: as for :func:`fedavg`.
    """
    return fedavg(
        model,
        task,
        num_clients=num_clients,
        solver=solver,
        server=server,
        weighting=weighting,
        personal=head,
        adaptation=adaptation,
        execution=execution,
    )


def fedrep(
    model: Models,
    task: Tasks,
    *,
    num_clients: Counts,
    solver: Solver,
    head: trees.PathPredicate = DECODERS,
    head_plan: BatchPlan | None = None,
    server: Server | None = None,
    weighting: Weighting = "samples",
    adaptation: BatchPlan | None = None,
    execution: Execution | None = None,
) -> Algorithm:
    """FedRep (Collins et al., arXiv 2102.07078, algorithm 1).

    Every round first the personal head is trained, then with it frozen the shared body.

    Args:
        model: as for :func:`fedavg`.
        task: as for :func:`fedavg`.
        num_clients: as for :func:`fedavg`.
        solver: its plan is that of the body; its optimiser is of both, and starts afresh in each
            phase.
        head: path predicate of the head.
        head_plan: local training of the head; default the solver's plan.
        server: as for :func:`fedavg`.
        weighting: as for :func:`fedavg`.
        adaptation: as for :func:`fedavg`.
        execution: as for :func:`fedavg`.
    """
    body = trees.negate(head)
    return fedavg(
        model,
        task,
        num_clients=num_clients,
        solver=solver,
        server=server,
        weighting=weighting,
        personal=head,
        phases=[Phase(head, head_plan or solver.plan), Phase(body, solver.plan)],
        adaptation=adaptation,
        execution=execution,
    )


def lg_fedavg(
    model: Models,
    task: Tasks,
    *,
    num_clients: Counts,
    solver: Solver,
    representation: trees.PathPredicate = BODY,
    server: Server | None = None,
    weighting: Weighting = "samples",
    adaptation: BatchPlan | None = None,
    execution: Execution | None = None,
) -> Algorithm:
    """LG-FedAvg (Liang et al., arXiv 2001.01523).

    The representation stays local, what follows it is shared.

    Args:
        model: as for :func:`fedavg`.
        task: as for :func:`fedavg`.
        num_clients: as for :func:`fedavg`.
        solver: as for :func:`fedavg`.
        representation: path predicate of what stays; default all but the decoders.
        server: as for :func:`fedavg`.
        weighting: as for :func:`fedavg`.
        adaptation: as for :func:`fedavg`.
        execution: as for :func:`fedavg`.
    """
    return fedavg(
        model,
        task,
        num_clients=num_clients,
        solver=solver,
        server=server,
        weighting=weighting,
        personal=representation,
        adaptation=adaptation,
        execution=execution,
    )


def normalisation(path: trees.Path) -> bool:
    """Selects the leaves of normalisation layers.

    It knows them by the names flax gives them (``GroupNorm_0``, ``LayerNorm_1``, ...).
    """
    return any("norm" in name.lower() for name in path)


def fedbn(
    model: Models,
    task: Tasks,
    *,
    num_clients: Counts,
    solver: Solver,
    server: Server | None = None,
    weighting: Weighting = "samples",
    adaptation: BatchPlan | None = None,
    execution: Execution | None = None,
) -> Algorithm:
    """FedBN (Li et al., arXiv 2102.07623): normalisation layers stay local.

    The paper's are batch normalisations; models here use group or layer norms, of which scale and
    shift stay.

    Args:
        model: as for :func:`fedavg`.
        task: as for :func:`fedavg`.
        num_clients: as for :func:`fedavg`.
        solver: as for :func:`fedavg`.
        server: as for :func:`fedavg`.
        weighting: as for :func:`fedavg`.
        adaptation: as for :func:`fedavg`.
        execution: as for :func:`fedavg`.
    """
    return fedavg(
        model,
        task,
        num_clients=num_clients,
        solver=solver,
        server=server,
        weighting=weighting,
        personal=normalisation,
        adaptation=adaptation,
        execution=execution,
    )
