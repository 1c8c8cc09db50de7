"""Partial sharing: a part of the model travels, the rest stays with each client.

All are FedAvg with a path predicate; what is shared is never a class. For clients with different tasks use the same local trainers in
:func:`fedjax_mtl.rounds.population.heterogeneous`.
"""

from typing import Any

from fedjax_mtl.algorithms._fedavg import fedavg
from fedjax_mtl.clients.updates import Phase
from fedjax_mtl.core import trees
from fedjax_mtl.core.batching import BatchPlan
from fedjax_mtl.models import Model
from fedjax_mtl.rounds.federated import Algorithm
from fedjax_mtl.tasks import Task


def fedper(model: Model, task: Task, *, head: trees.PathPredicate, **settings: Any) -> Algorithm:
    """FedPer (Arivazhagan et al., arXiv 1912.00818): the head stays, body and head are trained jointly. Other settings as for ``fedavg``."""
    return fedavg(model, task, personal=head, **settings)


def fedrep(
    model: Model,
    task: Task,
    *,
    head: trees.PathPredicate,
    head_plan: BatchPlan,
    plan: BatchPlan,
    **settings: Any,
) -> Algorithm:
    """FedRep (Collins et al., arXiv 2102.07078, algorithm 1): every round first the personal head, then with it frozen the shared body.

    Args:
        head: path predicate of the head. head_plan: local training of it. plan: of the body.
        settings: as for ``fedavg``.
    """
    phases = [Phase(head, head_plan), Phase(trees.negate(head), plan)]
    return fedavg(model, task, personal=head, phases=phases, plan=plan, **settings)


def lg_fedavg(
    model: Model, task: Task, *, representation: trees.PathPredicate, **settings: Any
) -> Algorithm:
    """LG-FedAvg (Liang et al., arXiv 2001.01523): the representation stays local, what follows it is shared."""
    return fedavg(model, task, personal=representation, **settings)


def normalisation(path: trees.Path) -> bool:
    """Selects the leaves of normalisation layers, by the names flax gives them (``GroupNorm_0``, ``LayerNorm_1``, ...)."""
    return any("norm" in name.lower() for name in path)


def fedbn(model: Model, task: Task, **settings: Any) -> Algorithm:
    """FedBN (Li et al., arXiv 2102.07623): normalisation layers stay local.

    The paper's are batch normalisations; models here use group or layer norms, of which scale and shift stay.
    """
    return fedavg(model, task, personal=normalisation, **settings)
