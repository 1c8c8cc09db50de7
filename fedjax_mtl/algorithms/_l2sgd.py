"""L2SGD: loopless local gradient descent on a mixture of global and local models.

Hanzely, Richtarik, arXiv 2002.05516, algorithm 1: minimise ``1/T sum_t f_t(theta_t) + lambda / (2 T) sum_t ||theta_t - mean||^2``.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedjax_mtl.clients.training import Schedule, local_losses, loss_gradient, train
from fedjax_mtl.clients.updates import ClientResult, ClientUpdate
from fedjax_mtl.core import batching
from fedjax_mtl.execution import Execution
from fedjax_mtl.models import Model
from fedjax_mtl.rounds.federated import Algorithm, federated
from fedjax_mtl.server import step_from
from fedjax_mtl.tasks import Task, example_losses

PyTree = Any


class L2SGDClientState(NamedTuple):
    """What an L2SGD client keeps: its model as of before the last pull to the mean."""

    own: PyTree


def geometric(key: jax.Array, probability: float | jax.Array) -> jax.Array:
    """The number of tails before the first head of a coin that shows heads with this probability, int32 ``[]``."""
    u = jax.random.uniform(key, minval=jnp.finfo(jnp.float32).tiny)
    return jnp.floor(jnp.log(u) / jnp.log1p(-probability)).astype(jnp.int32)


def coin_key(round_key: jax.Array) -> jax.Array:
    """The key of the round's common coin, which is no client's."""
    return jax.random.fold_in(round_key, jnp.uint32(0xFFFFFFFF))


def l2sgd(
    model: Model,
    task: Task,
    *,
    num_clients: int,
    learning_rate: float,
    penalty: float,
    batch_size: int | None = None,
    probability: float = 0.1,
    schedule: Schedule | None = None,
    fidelity: str = "paper",
    execution: Execution | None = None,
) -> Algorithm:
    """L2SGD.

    The paper flips one coin a step: tails (probability 1 - p), every client takes a stochastic gradient step; heads, every client moves towards the
    mean, ``theta_t <- (1 - a) theta_t + a mean``. One *round* here is one communication: all the tails before a head (their number is
    geometric, drawn once for all clients), then the head. So R rounds make about R (1 - p) / p local steps. Full participation.

    Args:
        learning_rate: the effective local step, ``alpha / (T (1 - p))`` in the paper's symbols.
        penalty: lambda; the pull is ``a = alpha lambda / (T p) = learning_rate * (1 - p) / p * penalty``.
        batch_size: examples of a local step; None takes all.
        probability: p, of communicating.
        schedule: factor on the local step by round.
        fidelity: ``released`` is what FedEM's code does: the pull is assigned to a temporary and has no effect, so clients train alone, and
            ``penalty`` does nothing.

    Raises:
        ValueError: p outside (0, 1), or a pull above 1, which would overshoot the mean.
    """
    if fidelity not in ("paper", "released"):
        raise ValueError(f"fidelity must be 'paper' or 'released', got {fidelity!r}")
    if not isinstance(probability, jax.core.Tracer) and not 0 < probability < 1:
        raise ValueError(f"probability is {probability}; the coin needs 0 < p < 1")
    pull = learning_rate * (1 - probability) / probability * penalty
    if isinstance(pull, float) and pull > 1:
        raise ValueError(
            f"the pull to the mean is {pull:.3g} > 1, which overshoots it; lower learning_rate or penalty, or raise probability"
        )
    pull = 0.0 if fidelity == "released" else pull
    losses = example_losses(model, task)
    gradient = loss_gradient(losses)
    optimizer = optax.sgd(learning_rate)

    def pulled(own: PyTree, mean: PyTree) -> PyTree:
        # The head of the last round, carried out where it is read: w is the mean of all the clients' models.
        return jax.tree.map(lambda v, w: ((1 - pull) * v + pull * w).astype(v.dtype), own, mean)

    def init(params):
        return L2SGDClientState(params)

    def update(params, state, client, key):
        start = pulled(state.own, params)
        plan = batching.steps(geometric(coin_key(client.round_key), probability), batch_size)
        trained = train(
            gradient,
            optimizer,
            plan,
            start,
            optimizer.init(start),
            client,
            key,
            step_scale=1.0 if schedule is None else schedule(client.round),
        )
        # The coin can show heads at once; what is reported then is the loss there is.
        loss = jax.lax.cond(
            plan.num_steps > 0,
            lambda: trained.loss,
            lambda: jnp.sum(local_losses(losses, start, client, 256)) / jnp.maximum(client.size, 1),
        )
        metrics = {"loss": loss, "num_steps": trained.num_steps}
        kept = L2SGDClientState(trained.params)
        return ClientResult(optax.tree.sub(params, trained.params), kept, metrics)

    def predict(params, state, inputs):
        return model.apply(pulled(state.own, params), inputs, None)

    def adapt(params, client, key):
        del client, key
        return init(params)

    return federated(
        model.init,
        ClientUpdate(init, update, predict, adapt),
        step_from(optax.sgd(1.0)),
        num_clients=num_clients,
        weighting="uniform",
        execution=execution,
        full_participation=True,
    )
