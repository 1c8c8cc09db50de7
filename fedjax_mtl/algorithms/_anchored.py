"""Clients with models of their own that a mixture of everybody's models pulls at."""

import optax

from fedjax_mtl.clients.training import Pull, Solver
from fedjax_mtl.clients.updates import anchored_trainer
from fedjax_mtl.core import trees
from fedjax_mtl.core.algorithm import Algorithm
from fedjax_mtl.core.batching import BatchPlan
from fedjax_mtl.execution import Execution
from fedjax_mtl.rounds.federated import federated
from fedjax_mtl.rounds.groups import Counts, Models, Server, Tasks, each_group


def mixed_anchors(
    model: Models,
    task: Tasks,
    num_clients: Counts,
    solver: Solver,
    *,
    pull: Pull,
    mixing: Server,
    personal: trees.PathPredicate,
    adaptation: BatchPlan | None,
    execution: Execution | None,
    full_participation: bool = False,
) -> Algorithm:
    """Anchored trainers, and a server that sends each a mixture of everybody's models."""

    def make_client(model, task):
        return anchored_trainer(
            model, task, solver, pull, personal=personal, adaptation=adaptation or solver.plan
        )

    return federated(
        each_group(model, task, num_clients, make_client),
        optax.chain(mixing, optax.sgd(1.0)),
        models="own",
        execution=execution,
        full_participation=full_participation,
    )
