"""Fair federated learning: agnostic FL and q-FFL, the general composition around fair servers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedjax_mtl.clients.training import Schedule, Solver, loss_gradient
from fedjax_mtl.clients.updates import ClientResult, ClientUpdate, local_trainer
from fedjax_mtl.core import batching, trees
from fedjax_mtl.core.algorithm import Algorithm
from fedjax_mtl.core.batching import BatchPlan
from fedjax_mtl.core.checks import InputError, check_fidelity
from fedjax_mtl.core.model import Model
from fedjax_mtl.core.task import Task, example_losses
from fedjax_mtl.execution import Execution
from fedjax_mtl.rounds.federated import federated
from fedjax_mtl.rounds.groups import Counts, Models, Tasks, each_group
from fedjax_mtl.server import agnostic_average, q_fair_average

PyTree = Any


def gradient_client(model: Model, task: Task, batch_size: int | None) -> ClientUpdate:
    """A client that sends the gradient of one minibatch at the received model (FedSGD).

    It reports that batch's loss.
    """
    gradient = loss_gradient(example_losses(model, task))
    plan = batching.steps(1, batch_size)

    def update(params, state, client, key):
        def step(carry, batch, step_key):
            del carry
            return gradient(params, batch, step_key)

        start = (jnp.full((), jnp.nan), optax.tree.zeros_like(params))
        (loss, grads), done = batching.for_each_batch(step, start, client, plan, key)
        return ClientResult(grads, state, {"loss": loss, "num_steps": done})

    def predict(params, state, inputs):
        del state
        return model.apply(params, inputs, None)

    return ClientUpdate(lambda params: (), update, predict, lambda params, client, key: ())


def agnostic(
    model: Models,
    task: Tasks,
    *,
    num_clients: Counts,
    mixture: jax.Array,
    optimizer: optax.GradientTransformation,
    mixture_learning_rate: float | jax.Array = 0.001,
    batch_size: int | None = None,
    execution: Execution | None = None,
) -> Algorithm:
    """Agnostic FL (Mohri, Sivek, Suresh, arXiv 1902.00146).

    It minimises the loss of the worst mixture of clients. Every round each client sends the
    gradient and the loss of ONE minibatch at the global model; the server steps along the mixture's
    gradient and lets the mixture ascend. The released FedEM code does the same, with the momentum
    of ``optimizer`` at the server.

    Args:
        model: as for :func:`fedavg`.
        task: as for :func:`fedavg`.
        num_clients: as for :func:`fedavg`. If clients come in groups, the model is that of all
            leaves together, and a client's gradient is 0 in those that it does not have.
        mixture: ``[clients]``, where the mixture starts: each client's share of the examples in the
            paper; clients of groups in the order of their names.
        optimizer: the server's, e.g. ``optax.sgd(0.1)``.
        mixture_learning_rate: of the ascent; 0 keeps the mixture.
        batch_size: None takes all local data.
        execution: as for :func:`fedavg`.

    Raises:
        InputError: not one share a client, or shares that do not sum to 1.
    """
    total = sum(num_clients.values()) if isinstance(num_clients, dict) else num_clients
    if not isinstance(mixture, jax.core.Tracer):
        shares = np.asarray(mixture)
        if shares.shape != (total,) or abs(shares.sum() - 1) > 1e-3:
            raise InputError(
                f"mixture has shape {shares.shape} and sum {shares.sum():.4f}; "
                f"give {total} shares that sum to 1"
            )
    return federated(
        each_group(model, task, num_clients, lambda m, t: gradient_client(m, t, batch_size)),
        optax.chain(agnostic_average(mixture, mixture_learning_rate), optimizer),
        meeting=trees.everything,
        execution=execution,
    )


def q_ffl(
    model: Models,
    task: Tasks,
    *,
    num_clients: Counts,
    plan: BatchPlan,
    learning_rate: float | jax.Array,
    q: float | jax.Array = 1.0,
    schedule: Schedule | None = None,
    fidelity: str = "paper",
    execution: Execution | None = None,
) -> Algorithm:
    """q-FFL by q-FedAvg (Li, Sanjabi, Beirami, Smith, arXiv 1905.10497, algorithm 2).

    Clients train by plain SGD at ``learning_rate``, whose inverse is the paper's estimate L of the
    Lipschitz constant, and report the loss F_t of the received model on all their data; the server
    divides by the step size that fairness asks for.

    Args:
        model: as for :func:`fedavg`.
        task: as for :func:`fedavg`.
        num_clients: as for :func:`fedavg`. If clients come in groups, the model is that of all
            leaves together, and a client's update is 0 in those that it does not have.
        plan: the local steps.
        learning_rate: of the local steps.
        q: 0 is FedAvg over equally weighted clients; larger is fairer.
        schedule: factor on the local learning rate by round (L stays that of ``learning_rate``).
        fidelity: ``released``: in FedEM's code the reference weights are an alias of the trained
            ones, all differences are 0 and nothing is ever learned; so it is here.
        execution: as for :func:`fedavg`.
    """
    check_fidelity(fidelity)
    solver = Solver(optax.sgd(learning_rate), plan, schedule)

    def make_client(model, task):
        return local_trainer(model, task, solver, reported_loss="full")

    step = optax.set_to_zero() if fidelity == "released" else optax.sgd(1.0)
    return federated(
        each_group(model, task, num_clients, make_client),
        optax.chain(q_fair_average(q, learning_rate), step),
        meeting=trees.everything,
        execution=execution,
    )
