"""FedGradNorm: gradient normalisation between the tasks that clients have.

Mortaheb, Vahapoglu, Ulukus, arXiv 2203.13663. Every client owns one task: a shared body, a personal
head. A round is FedRep's, first the head, then the body with the head frozen; the server weighs the
clients' mean gradients by GradNorm. Goal, split, dynamic weights and baseline are the paper's; the
order of lines and all values are reconstructed, and every unsettled reading is an argument.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedjax_mtl.algorithms._partial import DECODERS
from fedjax_mtl.clients.training import Solver
from fedjax_mtl.clients.updates import ClientResult, ClientUpdate, Phase, local_trainer
from fedjax_mtl.core import trees
from fedjax_mtl.core.algorithm import Algorithm, Info
from fedjax_mtl.core.batching import BatchPlan
from fedjax_mtl.core.checks import InputError, check_choice
from fedjax_mtl.core.federation import ClientView
from fedjax_mtl.core.model import Model
from fedjax_mtl.core.task import Task
from fedjax_mtl.execution import Execution
from fedjax_mtl.rounds.composition import FederatedState
from fedjax_mtl.rounds.federated import federated
from fedjax_mtl.rounds.groups import (
    Counts,
    Models,
    Server,
    Tasks,
    each_group,
    population_ids,
    population_size,
)
from fedjax_mtl.server import average_clients, normalize_gradients

PyTree = Any
LOSS_POINTS = {"shared": "first", "before_head": "start", "full": "full"}
NORMS = {"update": "update", "first_step": "first_step_norm", "mean_step": "mean_step_norm"}
SERVER_STEP = optax.adam(0.01)


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
    """The client of FedGradNorm and FedRep: steps of the head, then of the body, the other frozen.

    Args:
        model: what is trained.
        task: what it is trained on.
        head: path predicate of the personal head.
        head_plan: the head's steps.
        plan: the body's steps.
        head_optimizer: of the head's steps.
        optimizer: of the body's steps.
        loss_point: which loss it reports: ``shared``, at the first step of the body;
            ``before_head``, at the first step of the head; or ``full``, over all its data as
            received.
        measured: path predicate of the leaves of the body whose gradient norms it reports.

    Raises:
        InputError: an unknown loss point.
    """
    check_choice("loss_point", loss_point, LOSS_POINTS)
    return local_trainer(
        model,
        task,
        Solver(optimizer, plan),
        personal=head,
        phases=[Phase(head, head_plan, head_optimizer), Phase(trees.negate(head), plan)],
        reported_loss=LOSS_POINTS[loss_point],
        watched=lambda path: measured(path) and not head(path),
    )


def mean_gradients(learning_rate: float | jax.Array) -> optax.GradientTransformationExtraArgs:
    """Turns pseudo-gradients of plain SGD into mean gradients along the local path.

    They are divided by the learning rate and the steps made, ``[clients, ...] -> [clients, ...]``.
    Extra arguments used: ``reports`` with ``num_steps`` ``[clients]``.

    Args:
        learning_rate: of the local steps.
    """

    def update(updates, state, params=None, *, reports, **extra_args):
        del params, extra_args
        lengths = learning_rate * jnp.maximum(reports["num_steps"], 1)
        return trees.scale_clients(1 / lengths, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def check_plan(plan: BatchPlan) -> None:
    """Raises InputError unless the plan counts local steps, and at least one."""
    if plan.num_steps is None or (isinstance(plan.num_steps, int) and plan.num_steps < 1):
        raise InputError(
            "fedgradnorm needs a plan of local steps (batching.steps, at least 1), whose mean "
            "gradient is sent"
        )


class WeightedClientState(NamedTuple):
    """What a client that weighs its own loss keeps.

    Attributes:
        weight: the weight it was sent last.
        own: its trainer's state.
    """

    weight: jax.Array
    own: PyTree


def _self_weighting(
    make_client: Callable[[Model, Task], ClientUpdate], model: Model, task: Task
) -> ClientUpdate:
    """The client whose local loss is multiplied by the weight it was sent.

    It reports the loss without the weight.
    """
    plain = make_client(model, task)

    def init(params: PyTree) -> WeightedClientState:
        return WeightedClientState(jnp.ones(()), plain.init(params))

    def update(
        params: PyTree, state: WeightedClientState, client: ClientView, key: jax.Array
    ) -> ClientResult:
        scaled = task._replace(
            loss=lambda outputs, labels: state.weight * task.loss(outputs, labels)
        )
        result = make_client(model, scaled).update(params, state.own, client, key)
        metrics = result.metrics | {"loss": result.metrics["loss"] / state.weight}
        kept = WeightedClientState(state.weight, result.state)
        return result._replace(state=kept, metrics=metrics)

    def predict(params: PyTree, state: WeightedClientState, inputs: jax.Array) -> jax.Array:
        return plain.predict(params, state.own, inputs)

    def adapt(params: PyTree, client: ClientView, key: jax.Array) -> WeightedClientState:
        return WeightedClientState(jnp.ones(()), plain.adapt(params, client, key))

    return ClientUpdate(init, update, predict, adapt, plain.shared)


def _round_that_tells_weights(
    algorithm: Algorithm, state: FederatedState, cohort: PyTree, key: jax.Array
) -> tuple[FederatedState, Info]:
    """A round after which every client, present or not, knows the weight of its loss."""
    state, info = algorithm.round(state, cohort, key)
    clients = algorithm.parts.by_group(state.clients)
    counts = {name: group.num_clients for name, group in algorithm.parts.groups.items()}
    told = {
        name: own._replace(weight=info["loss_weights"][population_ids((name,), counts)])
        for name, own in clients.items()
    }
    return state._replace(clients=algorithm.parts.outside(told)), info


def fedgradnorm(
    model: Models,
    task: Tasks,
    *,
    num_clients: Counts,
    plan: BatchPlan,
    learning_rate: float | jax.Array,
    head: trees.PathPredicate = DECODERS,
    head_plan: BatchPlan | None = None,
    head_learning_rate: float | jax.Array = 0.02,
    server_optimizer: Server | None = None,
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
    before_average: Server | None = None,
    execution: Execution | None = None,
) -> Algorithm:
    """FedGradNorm, and with ``dynamic=False`` its equal-weight twin.

    The twin is FedRep with a server optimiser. Local training is plain SGD, so the pseudo-gradient
    divided by learning rate and steps made is the mean gradient g_i along the local path, which is
    what a client sends; then ``omega <- server_optimizer(mean_i p_i g_i)`` with the new weights p,
    which a round's info holds as ``loss_weights``, ``[population]``.

    Args:
        model: as for :func:`fedavg`.
        task: as for :func:`fedavg`.
        num_clients: as for :func:`fedavg`.
        plan: the body's local steps, ``batching.steps``.
        learning_rate: of the body's steps.
        head: path predicate of the personal head; the rest is shared.
        head_plan: the head's local steps; default those of the body.
        head_learning_rate: of the head's steps.
        server_optimizer: on the weighted mean gradient; default Adam at 0.01. With plain SGD the
            method takes length from the step when it takes weight from the largest gradients;
            compare with Adam on both sides, or tune each.
        weight_learning_rate: of the weights, see :func:`fedjax_mtl.server.normalize_gradients`.
        exponent: of the relative training rates, see there.
        measured: path predicate of the leaves at which norms are taken; GradNorm's is the last
            shared layer.
        norms: of the mean gradient (``update``), of the ``first_step``, or ``mean_step``, the mean
            of all local steps' norms.
        loss_point: which loss counts, see :func:`alternating_client`.
        local_weighting: clients multiply their own loss by the weight they were sent last; the
            server applies only its change.
        initial_losses: ``[population]``, to which training rates refer; default the first ones
            seen.
        minimum: weights never fall below.
        renormalise: keep the sum of the weights.
        dynamic: False keeps all weights at 1.
        before_average: further transformations of the weighted gradients,
            ``[clients, ...] -> [clients, ...]``.
        execution: as for :func:`fedavg`.

    Raises:
        InputError: an unknown choice, or a plan that does not count steps.
    """
    check_choice("norms", norms, NORMS)
    check_plan(plan)

    make_client = functools.partial(
        alternating_client,
        head=head,
        head_plan=head_plan or plan,
        plan=plan,
        head_optimizer=optax.sgd(head_learning_rate),
        optimizer=optax.sgd(learning_rate),
        loss_point=loss_point,
        measured=measured,
    )
    if local_weighting:
        make_client = functools.partial(_self_weighting, make_client)
    weigh = normalize_gradients(
        population_size(num_clients),
        learning_rate=weight_learning_rate if dynamic else 0.0,
        exponent=exponent,
        measured=measured,
        norms=NORMS[norms],
        initial_losses=initial_losses,
        minimum=minimum,
        renormalise=renormalise,
        already_weighted=local_weighting,
    )
    groups = each_group(model, task, num_clients, make_client)
    rest = (before_average or optax.identity(), average_clients(), server_optimizer or SERVER_STEP)
    server = optax.chain(mean_gradients(learning_rate), weigh, *rest)
    algorithm = federated(groups, server, weighting="uniform", execution=execution)
    if not local_weighting:
        return algorithm
    return algorithm._replace(round=functools.partial(_round_that_tells_weights, algorithm))
