"""Ditto: FedAvg, and beside it personal models that the global one pulls at."""

from typing import Any, NamedTuple

import jax
import optax

from fedjax_mtl.clients.training import Solver, quadratic_pull
from fedjax_mtl.clients.updates import ClientResult, ClientUpdate, anchored_trainer, local_trainer
from fedjax_mtl.core import trees
from fedjax_mtl.core.algorithm import Algorithm
from fedjax_mtl.core.batching import BatchPlan
from fedjax_mtl.execution import Execution
from fedjax_mtl.rounds.engine import Weighting
from fedjax_mtl.rounds.federated import federated
from fedjax_mtl.rounds.groups import Counts, Models, Server, Tasks, each_group
from fedjax_mtl.server import step_from

PyTree = Any


class DittoState(NamedTuple):
    """What a Ditto client keeps: the states of its two trainers.

    Attributes:
        shared: of the trainer of the global model.
        own: of the trainer of its own model.
    """

    shared: PyTree
    own: PyTree


def ditto(
    model: Models,
    task: Tasks,
    *,
    num_clients: Counts,
    solver: Solver,
    penalty: float | jax.Array = 0.1,
    personal_plan: BatchPlan | None = None,
    server: Server | None = None,
    weighting: Weighting = "samples",
    personal: trees.PathPredicate = trees.nothing,
    adaptation: BatchPlan | None = None,
    execution: Execution | None = None,
) -> Algorithm:
    """Ditto (Li et al., arXiv 2012.04221, algorithm 1): FedAvg, and beside it personal models.

    Each round the client trains the received w as in FedAvg, and its own v on
    ``f(v) + penalty / 2 ||v - w||^2``, with w as received. It predicts with v. Penalty 0 is
    training alone.

    Args:
        model: as for :func:`fedavg`.
        task: as for :func:`fedavg`.
        num_clients: as for :func:`fedavg`.
        solver: local training of both models, each with an optimiser of its own.
        penalty: the paper's lambda.
        personal_plan: local training of v; default the solver's plan.
        server: as for :func:`fedavg`.
        weighting: as for :func:`fedavg`.
        personal: path predicate of the leaves of which every client has its own, of w as of v: they
            neither travel nor are pulled at.
        adaptation: of a newcomer's v, from the global model; default ``personal_plan``.
        execution: as for :func:`fedavg`.
    """
    personal_plan = personal_plan or solver.plan

    def make_client(model, task):
        globally = local_trainer(model, task, solver, personal=personal)
        personally = anchored_trainer(
            model,
            task,
            solver._replace(plan=personal_plan),
            quadratic_pull(penalty),
            personal=personal,
            adaptation=adaptation or personal_plan,
        )
        return _side_by_side(globally, personally)

    return federated(
        each_group(model, task, num_clients, make_client),
        step_from(optax.sgd(1.0)) if server is None else server,
        weighting=weighting,
        execution=execution,
    )


def _side_by_side(globally: ClientUpdate, personally: ClientUpdate) -> ClientUpdate:
    """Trains what was received and, beside it, a model of its own that it predicts with."""

    def init(params):
        return DittoState(globally.init(params), personally.init(params))

    def update(params, state, client, key):
        # The same batches for both, as when one loop trains them side by side.
        shared = globally.update(params, state.shared, client, key)
        own = personally.update(params, state.own, client, key)
        # The loss is that of what travels: servers may weigh clients by it.
        metrics = {**shared.metrics, "personal_loss": own.metrics["loss"]}
        return ClientResult(shared.pseudo_gradient, DittoState(shared.state, own.state), metrics)

    def predict(params, state, inputs):
        return personally.predict(params, state.own, inputs)

    def adapt(params, client, key):
        return DittoState(globally.init(params), personally.adapt(params, client, key))

    return ClientUpdate(init, update, predict, adapt, shared=globally.shared)
