"""FedDEA: FedAvg whose server decouples the updates first (a reconstruction).

Wei et al., arXiv 2505.24185, of which only the abstract and the opening could be read; see
:mod:`fedjax_mtl.server.decoupling`.
"""

import jax
import optax

from fedjax_mtl.algorithms._fedavg import fedavg
from fedjax_mtl.clients.training import Solver
from fedjax_mtl.core import trees
from fedjax_mtl.core.algorithm import Algorithm
from fedjax_mtl.execution import Execution
from fedjax_mtl.rounds.engine import Weighting
from fedjax_mtl.rounds.groups import Counts, Models, Tasks
from fedjax_mtl.server import decouple_updates, step_from


def feddea(
    model: Models,
    task: Tasks,
    *,
    num_clients: Counts,
    solver: Solver,
    keep: float = 0.2,
    select: str = "top",
    threshold: float = 0.1,
    scope: str = "global",
    rescale: str | float = "l1",
    rescale_scope: str = "global",
    rescale_cap: float | None = None,
    denominator: str = "all",
    proximal_strength: float = 0.0,
    server_step: float | jax.Array = 1.0,
    server_optimizer: optax.GradientTransformation | None = None,
    weighting: Weighting = "samples",
    personal: trees.PathPredicate = trees.nothing,
    execution: Execution | None = None,
) -> Algorithm:
    """FedDEA inside FedAvg, FedProx or FedAdam.

    Args:
        model: as for :func:`fedavg`.
        task: as for :func:`fedavg`.
        num_clients: as for :func:`fedavg`.
        solver: as for :func:`fedavg`.
        keep: as for :func:`fedjax_mtl.server.decouple_updates`.
        select: as for :func:`fedjax_mtl.server.decouple_updates`.
        threshold: as for :func:`fedjax_mtl.server.decouple_updates`.
        scope: as for :func:`fedjax_mtl.server.decouple_updates`.
        rescale: as for :func:`fedjax_mtl.server.decouple_updates`.
        rescale_scope: as for :func:`fedjax_mtl.server.decouple_updates`.
        rescale_cap: as for :func:`fedjax_mtl.server.decouple_updates`.
        denominator: as for :func:`fedjax_mtl.server.decouple_updates`.
        proximal_strength: FedProx's mu, see :func:`fedprox`.
        server_step: step size of the server's SGD.
        server_optimizer: what takes the server's step instead of that SGD, as in FedAdam.
        weighting: as for :func:`fedavg`.
        personal: as for :func:`fedavg`.
        execution: as for :func:`fedavg`.
    """
    decouple = decouple_updates(
        keep,
        select=select,
        threshold=threshold,
        scope=scope,
        rescale=rescale,
        rescale_scope=rescale_scope,
        rescale_cap=rescale_cap,
        denominator=denominator,
    )
    step = optax.sgd(server_step) if server_optimizer is None else server_optimizer
    return fedavg(
        model,
        task,
        num_clients=num_clients,
        solver=solver,
        server=optax.chain(decouple, step_from(step)),
        weighting=weighting,
        personal=personal,
        proximal_strength=proximal_strength,
        execution=execution,
    )
