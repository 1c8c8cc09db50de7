"""L2SGD: loopless local gradient descent on a mixture of global and local models.

Hanzely, Richtarik, arXiv 2002.05516, algorithm 1: minimise ``1/T sum_t f_t(theta_t) + lambda / (2
T) sum_t ||theta_t - mean||^2``.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedjax_mtl.clients.training import Losses, Schedule, Solver, loss_gradient, train
from fedjax_mtl.clients.updates import ClientResult, ClientUpdate, full_loss
from fedjax_mtl.core import batching
from fedjax_mtl.core.algorithm import Algorithm
from fedjax_mtl.core.checks import InputError, check_fidelity
from fedjax_mtl.core.federation import ClientView
from fedjax_mtl.core.model import Model
from fedjax_mtl.core.task import example_losses
from fedjax_mtl.execution import Execution
from fedjax_mtl.rounds.federated import federated
from fedjax_mtl.rounds.groups import Counts, Models, Tasks, each_group
from fedjax_mtl.server import step_from

PyTree = Any


class L2SGDClientState(NamedTuple):
    """What an L2SGD client keeps.

    Attributes:
        own: its model as of before the last pull to the mean.
    """

    own: PyTree


def geometric(key: jax.Array, probability: float | jax.Array) -> jax.Array:
    """The number of tails before the first head of a coin, int32 ``[]``.

    The coin shows heads with this probability.
    """
    u = jax.random.uniform(key, minval=jnp.finfo(jnp.float32).tiny)
    return jnp.floor(jnp.log(u) / jnp.log1p(-probability)).astype(jnp.int32)


def coin_key(round_key: jax.Array) -> jax.Array:
    """The key of the round's common coin, which is no client's."""
    return jax.random.fold_in(round_key, jnp.uint32(0xFFFFFFFF))


class PulledTraining(NamedTuple):
    """What an L2SGD client was asked for.

    Attributes:
        model: what is trained.
        losses: of examples.
        learning_rate: of the local steps.
        batch_size: of a local step.
        probability: of communicating.
        pull: share of the way to the mean that a communication goes.
        schedule: factor on the local step by round.
    """

    model: Model
    losses: Losses
    learning_rate: float | jax.Array
    batch_size: int | None
    probability: float | jax.Array
    pull: float | jax.Array
    schedule: Schedule | None


def l2sgd(
    model: Models,
    task: Tasks,
    *,
    num_clients: Counts,
    learning_rate: float | jax.Array,
    penalty: float | jax.Array,
    batch_size: int | None = None,
    probability: float | jax.Array = 0.1,
    schedule: Schedule | None = None,
    fidelity: str = "paper",
    execution: Execution | None = None,
) -> Algorithm:
    """L2SGD.

    The paper flips one coin a step: tails (probability 1 - p), every client takes a stochastic
    gradient step; heads, every client moves towards the mean, ``theta_t <- (1 - a) theta_t + a
    mean``. One *round* here is one communication: all the tails before a head (their number is
    geometric, drawn once for all clients), then the head. So R rounds make about R (1 - p) / p
    local steps. Full participation.

    Args:
        model: as for :func:`fedavg`.
        task: as for :func:`fedavg`.
        num_clients: as for :func:`fedavg`.
        learning_rate: the effective local step, ``alpha / (T (1 - p))`` in the paper's symbols, of
            plain SGD.
        penalty: lambda; the pull is ``a = alpha lambda / (T p) = learning_rate * (1 - p) / p *
            penalty``.
        batch_size: examples of a local step; None takes all.
        probability: p, of communicating.
        schedule: factor on the local step by round.
        fidelity: ``released`` is what FedEM's code does: the pull is assigned to a temporary and
            has no effect, so clients train alone, and ``penalty`` does nothing.
        execution: as for :func:`fedavg`.

    Raises:
        InputError: p outside (0, 1), or a pull above 1, which would overshoot the mean.
    """
    check_fidelity(fidelity)
    if not isinstance(probability, jax.core.Tracer) and not 0 < probability < 1:
        raise InputError(f"probability is {probability}; the coin needs 0 < p < 1")
    pull = learning_rate * (1 - probability) / probability * penalty
    if isinstance(pull, float) and pull > 1:
        raise InputError(
            f"the pull to the mean is {pull:.3g} > 1, which overshoots it; lower learning_rate or "
            "penalty, or raise probability"
        )

    def make_client(model, task):
        training = PulledTraining(
            model=model,
            losses=example_losses(model, task),
            learning_rate=learning_rate,
            batch_size=batch_size,
            probability=probability,
            pull=0.0 if fidelity == "released" else pull,
            schedule=schedule,
        )
        return ClientUpdate(
            init=L2SGDClientState,
            update=functools.partial(_update_client, training),
            predict=functools.partial(_predict_pulled, training),
            adapt=_adapt_client,
        )

    return federated(
        each_group(model, task, num_clients, make_client),
        step_from(optax.sgd(1.0)),
        weighting="uniform",
        execution=execution,
        full_participation=True,
    )


def _pulled(training: PulledTraining, own: PyTree, mean: PyTree) -> PyTree:
    """The head of the last round, carried out where it is read: ``mean`` is that of all models."""
    pull = training.pull
    return jax.tree.map(lambda v, w: ((1 - pull) * v + pull * w).astype(v.dtype), own, mean)


def _update_client(
    training: PulledTraining,
    params: PyTree,
    state: L2SGDClientState,
    client: ClientView,
    key: jax.Array,
) -> ClientResult:
    start = _pulled(training, state.own, params)
    tails = geometric(coin_key(client.round_key), training.probability)
    plan = batching.steps(tails, training.batch_size)
    solver = Solver(optax.sgd(training.learning_rate), plan, training.schedule)
    trained = train(
        loss_gradient(training.losses),
        solver.optimizer,
        plan,
        start,
        solver.optimizer.init(start),
        client,
        key,
        step_scale=solver.step_scale(client.round),
    )
    # The coin can show heads at once; what is reported then is the loss there is.
    loss = jax.lax.cond(
        tails > 0,
        lambda: trained.loss,
        lambda: full_loss(training.losses, start, client),
    )
    metrics = {"loss": loss, "num_steps": trained.num_steps}
    kept = L2SGDClientState(trained.params)
    return ClientResult(optax.tree.sub(params, trained.params), kept, metrics)


def _predict_pulled(
    training: PulledTraining, params: PyTree, state: L2SGDClientState, inputs: jax.Array
) -> jax.Array:
    return training.model.apply(_pulled(training, state.own, params), inputs, None)


def _adapt_client(params: PyTree, client: ClientView, key: jax.Array) -> L2SGDClientState:
    del client, key
    return L2SGDClientState(params)
