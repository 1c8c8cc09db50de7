"""FedAdam: FedAvg whose server lets Adam take the step (Reddi et al., arXiv 2003.00295)."""

import jax
import optax

from fedjax_mtl.algorithms._fedavg import fedavg
from fedjax_mtl.clients.training import Solver
from fedjax_mtl.core import trees
from fedjax_mtl.core.algorithm import Algorithm
from fedjax_mtl.execution import Execution
from fedjax_mtl.rounds.engine import Weighting
from fedjax_mtl.rounds.groups import Counts, Models, Tasks
from fedjax_mtl.server import step_from


def fedadam(
    model: Models,
    task: Tasks,
    *,
    num_clients: Counts,
    solver: Solver,
    server_learning_rate: float | jax.Array = 0.03,
    first_decay: float = 0.9,
    second_decay: float = 0.999,
    epsilon: float = 1e-8,
    weighting: Weighting = "samples",
    personal: trees.PathPredicate = trees.nothing,
    execution: Execution | None = None,
) -> Algorithm:
    """FedAdam, algorithm 2 of the paper, with bias correction.

    The paper has a second decay of 0.99, an epsilon of 1e-3 and no bias correction; the defaults
    here are Adam's own.

    Args:
        model: as for :func:`fedavg`.
        task: as for :func:`fedavg`.
        num_clients: as for :func:`fedavg`.
        solver: as for :func:`fedavg`.
        server_learning_rate: the paper's eta.
        first_decay: the paper's beta_1.
        second_decay: the paper's beta_2.
        epsilon: the paper's tau, added to the root of the second moment.
        weighting: as for :func:`fedavg`.
        personal: as for :func:`fedavg`.
        execution: as for :func:`fedavg`.
    """
    step = optax.adam(server_learning_rate, first_decay, second_decay, epsilon)
    return fedavg(
        model,
        task,
        num_clients=num_clients,
        solver=solver,
        server=step_from(step),
        weighting=weighting,
        personal=personal,
        execution=execution,
    )
