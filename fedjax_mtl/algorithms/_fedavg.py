"""FedAvg and its nearest relatives: FedProx, FedAvg + local tuning, and training alone.

FedAvg: McMahan et al., arXiv 1602.05629, algorithm 1. FedProx: Li et al., arXiv 1812.06127,
algorithm 2. Each is the general composition around one client update,
:func:`fedjax_mtl.clients.updates.local_trainer`.
"""

from collections.abc import Sequence

import optax

from fedjax_mtl.clients.training import Solver
from fedjax_mtl.clients.updates import Phase, local_trainer
from fedjax_mtl.core import trees
from fedjax_mtl.core.algorithm import Algorithm
from fedjax_mtl.core.batching import BatchPlan
from fedjax_mtl.execution import Execution
from fedjax_mtl.rounds.engine import Weighting
from fedjax_mtl.rounds.federated import federated
from fedjax_mtl.rounds.groups import Counts, Models, Server, Tasks, each_group
from fedjax_mtl.server import step_from


def fedavg(
    model: Models,
    task: Tasks,
    *,
    num_clients: Counts,
    solver: Solver,
    server: Server | None = None,
    weighting: Weighting = "samples",
    personal: trees.PathPredicate = trees.nothing,
    frozen: trees.PathPredicate = trees.nothing,
    phases: Sequence[Phase] | None = None,
    proximal_strength: float = 0.0,
    adaptation: BatchPlan | None = None,
    execution: Execution | None = None,
) -> Algorithm:
    """FedAvg.

    Args:
        model: what is trained; of clients that come in groups, by group.
        task: what it is trained on; of clients that come in groups, by group.
        num_clients: clients in the population; by group if they come in groups.
        solver: local training. The paper's algorithm has no momentum to keep; FedEM's released code
            keeps each client's from round to round (``keep_optimizer``).
        server: a chain over pseudo-gradients; default plain averaging.
        weighting: see :func:`fedjax_mtl.rounds.engine.cohort_weights`.
        personal: path predicate of the leaves that stay with each client.
        frozen: path predicate of the leaves that nobody trains.
        phases: alternation inside a round, see :func:`local_trainer`.
        proximal_strength: FedProx's mu, see :func:`fedprox`.
        adaptation: fine-tuning of newcomers, see :func:`local_trainer`.
        execution: how clients are mapped.
    """

    def make_client(model, task):
        return local_trainer(
            model,
            task,
            solver,
            personal=personal,
            frozen=frozen,
            phases=phases,
            proximal_strength=proximal_strength,
            adaptation=adaptation,
        )

    return federated(
        each_group(model, task, num_clients, make_client),
        step_from(optax.sgd(1.0)) if server is None else server,
        weighting=weighting,
        execution=execution,
    )


def fedprox(
    model: Models,
    task: Tasks,
    *,
    num_clients: Counts,
    solver: Solver,
    proximal_strength: float = 0.1,
    server: Server | None = None,
    weighting: Weighting = "samples",
    personal: trees.PathPredicate = trees.nothing,
    execution: Execution | None = None,
) -> Algorithm:
    """FedProx: FedAvg whose local objective has a proximal term.

    The term is ``proximal_strength / 2 ||theta - theta_round||^2``. Stragglers return partial work
    (:func:`fedjax_mtl.core.sampling.straggling`), which are the paper's gamma-inexact solutions.

    Args:
        model: as for :func:`fedavg`.
        task: as for :func:`fedavg`.
        num_clients: as for :func:`fedavg`.
        solver: as for :func:`fedavg`.
        proximal_strength: the paper's mu.
        server: as for :func:`fedavg`.
        weighting: as for :func:`fedavg`.
        personal: as for :func:`fedavg`.
        execution: as for :func:`fedavg`.
    """
    return fedavg(
        model,
        task,
        num_clients=num_clients,
        solver=solver,
        server=server,
        weighting=weighting,
        personal=personal,
        proximal_strength=proximal_strength,
        execution=execution,
    )


def fedavg_tuned(
    model: Models,
    task: Tasks,
    *,
    num_clients: Counts,
    solver: Solver,
    adaptation: BatchPlan | None = None,
    server: Server | None = None,
    weighting: Weighting = "samples",
    execution: Execution | None = None,
) -> Algorithm:
    """FedAvg + local tuning ("FedAvg+"): clients are judged after fine-tuning on their own data.

    Tuning is plain local training of all leaves at the optimiser's own learning rate, without the
    rounds' schedule, as in FedEM's released code, whose copies count their own epochs. That code
    keeps the optimiser of the fine-tuned copy from one evaluation to the next. Here the optimiser
    starts afresh, because an evaluation that changes later evaluations is no evaluation.

    Args:
        model: as for :func:`fedavg`.
        task: as for :func:`fedavg`.
        num_clients: as for :func:`fedavg`.
        solver: as for :func:`fedavg`.
        adaptation: the fine-tuning; default the solver's plan (FedEM's paper: one epoch).
        server: as for :func:`fedavg`.
        weighting: as for :func:`fedavg`.
        execution: as for :func:`fedavg`.
    """
    algorithm = fedavg(
        model,
        task,
        num_clients=num_clients,
        solver=solver,
        server=server,
        weighting=weighting,
        adaptation=adaptation or solver.plan,
        execution=execution,
    )
    return algorithm._replace(tuned=True)


def local(
    model: Models,
    task: Tasks,
    *,
    num_clients: Counts,
    solver: Solver,
    adaptation: BatchPlan | None = None,
    execution: Execution | None = None,
) -> Algorithm:
    """Every client alone with its own model; nothing is shared.

    Args:
        model: as for :func:`fedavg`.
        task: as for :func:`fedavg`.
        num_clients: as for :func:`fedavg`.
        solver: as for :func:`fedavg`.
        adaptation: training of a newcomer, who gets the untrained model without it.
        execution: as for :func:`fedavg`.
    """
    return fedavg(
        model,
        task,
        num_clients=num_clients,
        solver=solver,
        personal=trees.everything,
        adaptation=adaptation,
        execution=execution,
    )
