"""FedAvg and its nearest relatives: FedProx, FedAvg + local tuning, and training alone.

FedAvg: McMahan et al., arXiv 1602.05629, algorithm 1. FedProx: Li et al., arXiv 1812.06127, algorithm 2. Each is the general composition around
one client update, :func:`fedjax_mtl.clients.local_trainer`.
"""

from typing import Any

import optax

from fedjax_mtl.clients.training import Schedule
from fedjax_mtl.clients.updates import local_trainer
from fedjax_mtl.core import trees
from fedjax_mtl.core.batching import BatchPlan
from fedjax_mtl.execution import Execution
from fedjax_mtl.models import Model
from fedjax_mtl.rounds.federated import Algorithm, Weighting, federated
from fedjax_mtl.server import step_from
from fedjax_mtl.tasks import Task


def fedavg(
    model: Model,
    task: Task,
    *,
    num_clients: int,
    plan: BatchPlan,
    optimizer: optax.GradientTransformation,
    server: optax.GradientTransformation | None = None,
    weighting: Weighting = "samples",
    schedule: Schedule | None = None,
    keep_optimizer: bool = False,
    execution: Execution | None = None,
    **client: Any,
) -> Algorithm:
    """FedAvg.

    Args:
        model, task, plan, optimizer: local training, see :func:`local_trainer`, which also takes the ``client`` arguments (``personal``,
            ``phases``, ``proximal_strength``, ``adaptation``, ...).
        num_clients: clients in the population.
        server: a chain over pseudo-gradients; default plain averaging.
        weighting: see :func:`fedjax_mtl.rounds.federated.cohort_weights`.
        schedule: factor on the local learning rate, by round.
        keep_optimizer: FedEM's released code keeps each client's momentum from round to round; the paper's algorithm has none to keep.
        execution: how clients are mapped.
    """
    update = local_trainer(
        model, task, optimizer, plan, schedule=schedule, keep_optimizer=keep_optimizer, **client
    )
    return federated(
        model.init,
        update,
        step_from(optax.sgd(1.0)) if server is None else server,
        num_clients=num_clients,
        weighting=weighting,
        execution=execution,
    )


def fedprox(
    model: Model, task: Task, *, proximal_strength: float = 0.1, **settings: Any
) -> Algorithm:
    """FedProx: FedAvg whose local objective adds ``proximal_strength / 2 * ||theta - theta_round||^2``.

    Stragglers return partial work through budgets (:func:`fedjax_mtl.core.sampling.straggling`), as the paper's gamma-inexact
    solutions. Other settings as for :func:`fedavg`.
    """
    return fedavg(model, task, proximal_strength=proximal_strength, **settings)


def fedavg_tuned(
    model: Model,
    task: Task,
    *,
    plan: BatchPlan,
    adaptation: BatchPlan | None = None,
    **settings: Any,
) -> Algorithm:
    """FedAvg + local tuning ("FedAvg+"): each client is judged after fine-tuning the global model on its own data.

    Args:
        plan: local training. adaptation: the fine-tuning; default ``plan`` (FedEM's paper: one epoch).
        settings: as for :func:`fedavg`, except ``personal``: tuning starts from the global model, whose personal leaves nobody trains.

    Tuning is plain local training of all leaves at the optimiser's own learning rate, without the rounds' schedule (as in the released code, whose copies count
    their own epochs). FedEM's released code keeps the optimiser of the fine-tuned copy from one evaluation to the next; here it starts afresh, because an
    evaluation that changes later evaluations is no evaluation.
    """
    if "personal" in settings:
        raise ValueError(
            "fedavg_tuned shares the whole model; drop personal, or use fedavg with personal leaves"
        )
    algorithm = fedavg(model, task, plan=plan, adaptation=adaptation or plan, **settings)
    return algorithm._replace(tuned=True)


def local(model: Model, task: Task, **settings: Any) -> Algorithm:
    """Every client alone with its own model; nothing is shared. Newcomers get the untrained model unless ``adaptation`` trains it."""
    return fedavg(model, task, personal=trees.everything, **settings)
