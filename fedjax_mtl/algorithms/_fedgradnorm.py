"""FedGradNorm (Mortaheb, Vahapoglu, Ulukus, arXiv 2203.13663) and HOTA-FedGradNorm (arXiv 2212.07414).

Every client owns one task: a shared body, a personal head. A round is FedRep's, first the head, then the body with the head frozen; the server weighs the clients' mean gradients by GradNorm.
Goal, split, dynamic weights and baseline are the papers'; the order of lines and all values are reconstructed, and every unsettled reading is an argument.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedjax_mtl.clients.updates import ClientUpdate, Phase, local_trainer
from fedjax_mtl.core import trees
from fedjax_mtl.core.batching import BatchPlan
from fedjax_mtl.execution import Execution
from fedjax_mtl.models import Model
from fedjax_mtl.rounds.federated import Algorithm, federated
from fedjax_mtl.server import average_clients, normalize_gradients
from fedjax_mtl.server.wireless import over_the_air_gradnorm
from fedjax_mtl.tasks import Task

PyTree = Any

LOSS_POINTS = {"shared": "first", "before_head": "start", "full": "full"}
NORMS = {"update": "update", "first_step": "first_step_norm", "mean_step": "mean_step_norm"}


def alternating_client(
    model: Model,
    task: Task,
    *,
    head: trees.PathPredicate,
    head_plan: BatchPlan,
    plan: BatchPlan,
    head_optimizer: optax.GradientTransformation,
    optimizer: optax.GradientTransformation,
    loss_point: str = "shared",
    measured: trees.PathPredicate = trees.everything,
) -> ClientUpdate:
    """The client of FedGradNorm and FedRep: head steps with the body frozen, then body steps with the head frozen.

    Args:
        head: path predicate of the personal head. head_plan, head_optimizer: its steps. plan, optimizer: the body's.
        loss_point: which loss it reports: ``shared``, at the first step of the body; ``before_head``; or ``full``, over all its data as received.
        measured: leaves of the body whose gradient norms it reports.
    """
    if loss_point not in LOSS_POINTS:
        raise ValueError(
            f"unknown loss_point {loss_point!r}; expected one of {', '.join(LOSS_POINTS)}"
        )
    return local_trainer(
        model,
        task,
        optimizer,
        plan,
        personal=head,
        phases=[Phase(head, head_plan, head_optimizer), Phase(trees.negate(head), plan)],
        reported_loss=LOSS_POINTS[loss_point],
        watched=lambda path: measured(path) and not head(path),
    )


def mean_gradients(learning_rate: float | jax.Array) -> optax.GradientTransformationExtraArgs:
    """Pseudo-gradients of plain SGD as mean gradients along the local path, ``[clients, ...] -> [clients, ...]``: divided by learning rate and steps made.

    Extra arguments used: ``reports`` with ``num_steps`` ``[clients]``.
    """

    def update(updates, state, params=None, *, reports, **extra_args):
        del params, extra_args
        return trees.scale_clients(
            1 / (learning_rate * jnp.maximum(reports["num_steps"], 1)), updates
        ), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def _check_plan(plan: BatchPlan) -> None:
    if plan.num_steps is None or (isinstance(plan.num_steps, int) and plan.num_steps < 1):
        raise ValueError(
            "fedgradnorm needs a plan of local steps (batching.steps, at least 1), whose mean gradient is sent"
        )


class WeightedClientState(NamedTuple):
    """What a client that weighs its own loss keeps: the weight it was sent last, and its trainer's state."""

    weight: jax.Array
    own: PyTree


def _self_weighting(make_client, task: Task) -> ClientUpdate:
    """The client whose local loss is multiplied by the weight it was sent; it reports the unweighted loss."""
    plain = make_client(task)

    def init(params):
        return WeightedClientState(jnp.ones(()), plain.init(params))

    def update(params, state, client, key):
        scaled = task._replace(
            loss=lambda outputs, labels: state.weight * task.loss(outputs, labels)
        )
        result = make_client(scaled).update(params, state.own, client, key)
        metrics = result.metrics | {"loss": result.metrics["loss"] / state.weight}
        return result._replace(
            state=WeightedClientState(state.weight, result.state), metrics=metrics
        )

    def predict(params, state, inputs):
        return plain.predict(params, state.own, inputs)

    def adapt(params, client, key):
        return WeightedClientState(jnp.ones(()), plain.adapt(params, client, key))

    return ClientUpdate(init, update, predict, adapt, plain.shared)


def fedgradnorm(
    model: Model,
    task: Task,
    *,
    num_clients: int,
    head: trees.PathPredicate,
    head_plan: BatchPlan,
    plan: BatchPlan,
    head_learning_rate: float | jax.Array,
    learning_rate: float | jax.Array,
    server_optimizer: optax.GradientTransformation,
    weight_learning_rate: float | jax.Array = 0.02,
    exponent: float | jax.Array = 0.6,
    measured: trees.PathPredicate = trees.everything,
    norms: str = "update",
    loss_point: str = "shared",
    local_weighting: bool = False,
    initial_losses: Sequence[float] | jax.Array | None = None,
    minimum: float = 1e-3,
    renormalise: bool = True,
    dynamic: bool = True,
    before_average: optax.GradientTransformation | None = None,
    execution: Execution | None = None,
) -> Algorithm:
    """FedGradNorm, and with ``dynamic=False`` its equal-weight twin (FedRep with a server optimiser).

    Local training is plain SGD, so the pseudo-gradient divided by learning rate and steps made is the mean gradient g_i along the local path, which is
    what a client sends; then ``omega <- server_optimizer(mean_i p_i g_i)`` with the new weights p.

    Args:
        head: path predicate of the personal head; the rest is shared. head_plan: its local steps, ``batching.steps``. plan: the body's, ``batching.steps``.
        server_optimizer: on the weighted mean gradient. With plain SGD the method takes length from the step when it takes weight from the
            largest gradients; compare with Adam on both sides, or tune each.
        weight_learning_rate, exponent, minimum, renormalise, initial_losses: see ``server.normalize_gradients``.
        measured: leaves at which norms are taken; GradNorm's is the last shared layer.
        norms: of the mean gradient (``update``), ``first_step``, or the ``mean_step`` of all local steps' norms.
        loss_point: see :func:`alternating_client`.
        local_weighting: clients multiply their own loss by the weight they were sent last; the server applies only its change.
        dynamic: False keeps all weights at 1.
        before_average: further transformations of the weighted gradients, ``[clients, ...] -> [clients, ...]``.

    Raises:
        ValueError: an unknown choice, plans that do not count steps.
    """
    if norms not in NORMS:
        raise ValueError(f"unknown norms {norms!r}; expected one of {', '.join(NORMS)}")
    _check_plan(plan)

    def make_client(task):
        return alternating_client(
            model,
            task,
            head=head,
            head_plan=head_plan,
            plan=plan,
            head_optimizer=optax.sgd(head_learning_rate),
            optimizer=optax.sgd(learning_rate),
            loss_point=loss_point,
            measured=measured,
        )

    weigh = normalize_gradients(
        num_clients,
        learning_rate=weight_learning_rate if dynamic else 0.0,
        exponent=exponent,
        measured=measured,
        norms=NORMS[norms],
        initial_losses=initial_losses,
        minimum=minimum,
        renormalise=renormalise,
        already_weighted=local_weighting,
    )
    rest = optax.identity() if before_average is None else before_average
    server = optax.chain(
        mean_gradients(learning_rate), weigh, rest, average_clients(), server_optimizer
    )
    algorithm = federated(
        model.init,
        _self_weighting(make_client, task) if local_weighting else make_client(task),
        server,
        num_clients=num_clients,
        weighting="uniform",
        execution=execution,
    )
    if not local_weighting:
        return algorithm

    def one_round(state, cohort, key):
        state, metrics = algorithm.round(state, cohort, key)
        return state._replace(clients=state.clients._replace(weight=loss_weights(state))), metrics

    return algorithm._replace(round=one_round)


def loss_weights(state: PyTree) -> jax.Array:
    """The current loss weights of all clients, ``[population]``."""
    return state.server[1].weights


def hota_fedgradnorm(
    model: Model,
    task: Task,
    *,
    num_clusters: int,
    cluster_size: int,
    head: trees.PathPredicate,
    head_plan: BatchPlan,
    plan: BatchPlan,
    head_learning_rate: float | jax.Array,
    learning_rate: float | jax.Array,
    server_optimizer: optax.GradientTransformation,
    weight_learning_rate: float | jax.Array = 0.02,
    exponent: float | jax.Array = 0.6,
    measured: trees.PathPredicate = trees.everything,
    dynamic: bool = True,
    execution: Execution | None = None,
    **channel: Any,
) -> Algorithm:
    """HOTA-FedGradNorm: clusters that transmit at once over a fading channel; ``dynamic=False`` is the twin with equal weights.

    Client ``l * cluster_size + i`` does task i in cluster l. Arguments as for :func:`fedgradnorm`; ``channel`` (``threshold``, ``fading``, ``noise``,
    ``transmit_scale``, ``power``) as for ``server.over_the_air_gradnorm``. Needs everybody in every round.
    """
    _check_plan(plan)
    client = alternating_client(
        model,
        task,
        head=head,
        head_plan=head_plan,
        plan=plan,
        head_optimizer=optax.sgd(head_learning_rate),
        optimizer=optax.sgd(learning_rate),
        measured=measured,
    )
    air = over_the_air_gradnorm(
        num_clusters,
        cluster_size,
        learning_rate=weight_learning_rate if dynamic else 0.0,
        exponent=exponent,
        measured=measured,
        **channel,
    )
    server = optax.chain(mean_gradients(learning_rate), air, server_optimizer)
    return federated(
        model.init,
        client,
        server,
        num_clients=num_clusters * cluster_size,
        weighting="uniform",
        execution=execution,
        full_participation=True,
    )
