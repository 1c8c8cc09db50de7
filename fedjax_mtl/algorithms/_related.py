"""Clients that train models of their own, which the server mixes: what many systems stand on."""

from collections.abc import Sequence

import optax

from fedjax_mtl.clients.training import Solver
from fedjax_mtl.clients.updates import local_trainer
from fedjax_mtl.core import trees
from fedjax_mtl.core.algorithm import Algorithm
from fedjax_mtl.core.batching import BatchPlan
from fedjax_mtl.execution import Execution
from fedjax_mtl.rounds.federated import federated
from fedjax_mtl.rounds.groups import Counts, Models, OwnersServer, Server, Tasks, each_group


def mixed_clients(
    model: Models,
    task: Tasks,
    *,
    num_clients: Counts,
    solver: Solver,
    mixing: Sequence[Server] = (),
    owners_mixing: OwnersServer | None = None,
    meeting: trees.PathPredicate = trees.nothing,
    personal: trees.PathPredicate = trees.nothing,
    frozen: trees.PathPredicate = trees.nothing,
    adaptation: BatchPlan | None = None,
    execution: Execution | None = None,
) -> Algorithm:
    """Local training from the client's own model, then the server mixes the models.

    Args:
        model: as for :func:`fedavg`.
        task: as for :func:`fedavg`.
        num_clients: as for :func:`fedavg`.
        solver: local training of the client's own model.
        mixing: transformations that keep the client axis, one after the other.
        owners_mixing: the mixing of what only some groups of clients have, from the owners' numbers
            in the population; default ``mixing``.
        meeting: path predicate of leaves that some groups own and that ``mixing`` gets all the
            same, see :func:`fedjax_mtl.federated`.
        personal: path predicate of the leaves that stay with each client.
        frozen: path predicate of the leaves that nobody trains.
        adaptation: training of a newcomer, from the mean of all; None leaves that.
        execution: as for :func:`fedavg`.
    """

    def make_client(model, task):
        return local_trainer(
            model, task, solver, personal=personal, frozen=frozen, adaptation=adaptation
        )

    return federated(
        each_group(model, task, num_clients, make_client),
        optax.chain(*mixing, optax.sgd(1.0)),
        models="own",
        owners_server=None if owners_mixing is None else _with_step(owners_mixing),
        meeting=meeting,
        execution=execution,
    )


def _with_step(owners_mixing: OwnersServer) -> OwnersServer:
    """The same mixing, and the step that carries it out."""
    return lambda owners: optax.chain(owners_mixing(owners), optax.sgd(1.0))
