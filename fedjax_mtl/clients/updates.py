"""Client updates: what one client does in a round, as pure functions without a client axis.

A client update is what an algorithm maps over a cohort. Most are :func:`local_trainer`, which
trains the model that the client received. :func:`anchored_trainer` trains a model of the client's
own, and what the client received pulls at that model.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedjax_mtl.clients.training import (
    Gradient,
    Losses,
    Pull,
    Solver,
    Trained,
    local_losses,
    loss_gradient,
    proximal,
    train,
)
from fedjax_mtl.core import trees
from fedjax_mtl.core.batching import Batch, BatchPlan
from fedjax_mtl.core.checks import InputError, check_choice
from fedjax_mtl.core.federation import ClientView
from fedjax_mtl.core.model import Model
from fedjax_mtl.core.task import Task, example_losses

PyTree = Any


class ClientResult(NamedTuple):
    """What a client sends, keeps and reports.

    Attributes:
        pseudo_gradient: what it sends, the start minus the result; None for leaves that stay.
        state: what it keeps.
        metrics: the scalars that it reports. There is always ``loss``, which the server's
            transformations see as ``losses`` and which is NaN where no step was made. A client that
            counts its steps reports ``num_steps``.
    """

    pseudo_gradient: PyTree
    state: PyTree
    metrics: dict[str, jax.Array]


class ClientUpdate(NamedTuple):
    """An algorithm's client side, as pure functions of one client.

    Attributes:
        init: ``params -> state``, what a client keeps between rounds.
        update: ``(params, state, client, key) -> ClientResult``.
        predict: ``(params, state, inputs [batch, ...]) -> outputs``, the client's personalised
            model.
        adapt: ``(params, client, key) -> state`` for a client that was never trained with.
        shared: path predicate of the leaves that travel. ``params`` is always the whole tree; the
            leaves that are not shared stay as initialised there, and are None in pseudo-gradients.
    """

    init: Callable[[PyTree], PyTree]
    update: Callable[[PyTree, PyTree, ClientView, jax.Array], ClientResult]
    predict: Callable[[PyTree, PyTree, jax.Array], jax.Array]
    adapt: Callable[[PyTree, ClientView, jax.Array], PyTree]
    shared: trees.PathPredicate = trees.everything


class TrainerState(NamedTuple):
    """What a locally training client keeps.

    Attributes:
        personal: its personal leaves.
        optimizer: its optimiser's state, or ``()`` where that starts afresh in every round.
    """

    personal: PyTree
    optimizer: Any


class Phase(NamedTuple):
    """A part of a round's local training.

    Attributes:
        trained: path predicate of the leaves that move.
        plan: how far they go.
        optimizer: by which optimiser; None is the solver's.
    """

    trained: trees.PathPredicate
    plan: BatchPlan
    optimizer: optax.GradientTransformation | None = None


REPORTED_LOSSES = ("mean", "first", "start", "full")


class LocalTraining(NamedTuple):
    """What :func:`local_trainer` was asked for; its arguments explain each."""

    model: Model
    losses: Losses
    solver: Solver
    personal: trees.PathPredicate
    frozen: trees.PathPredicate
    phases: tuple[Phase, ...]
    proximal_strength: float | jax.Array
    reported_loss: str
    watched: trees.PathPredicate
    adaptation: BatchPlan | None

    def trainable(self, path: trees.Path) -> bool:
        """Whether anybody trains a leaf."""
        return not self.frozen(path)

    def travels(self, path: trees.Path) -> bool:
        """Whether a leaf is sent."""
        return not self.personal(path) and not self.frozen(path)

    def gradient_beside(self, still: PyTree) -> Gradient:
        """The gradient in some leaves, beside others that stay as they are."""
        return loss_gradient(lambda moving, e, k: self.losses(trees.combine(moving, still), e, k))


def local_trainer(
    model: Model,
    task: Task,
    solver: Solver,
    *,
    personal: trees.PathPredicate = trees.nothing,
    frozen: trees.PathPredicate = trees.nothing,
    phases: Sequence[Phase] | None = None,
    proximal_strength: float | jax.Array = 0.0,
    reported_loss: str = "mean",
    watched: trees.PathPredicate = trees.nothing,
    adaptation: BatchPlan | None = None,
) -> ClientUpdate:
    """A client that trains on its own data: FedAvg's, FedProx's, FedPer's, FedRep's, or one alone.

    Args:
        model: what is trained, on ``examples["inputs"]``.
        task: on ``examples["labels"]``.
        solver: how the local problem is solved; its optimiser starts afresh in every round unless
            ``keep_optimizer``.
        personal: path predicate of the leaves that stay on the client; the others are the
            pseudo-gradient.
        frozen: path predicate of the leaves that nobody trains. They neither travel nor are copied
            to clients, and no gradient of them is computed. With it, ``phases`` name what they
            train.
        phases: alternation, e.g. head then body. Each phase trains only the leaves that its
            predicate selects, by its own plan and optimiser. The default is one phase that trains
            everything by the solver's plan. Budgets apply to each phase.
        proximal_strength: FedProx's mu; the anchor is the start of the round.
        reported_loss: ``mean`` over the last phase's steps; ``first``, of the last phase's first
            step; ``start``, of the round's first step; ``full``, of the received model on all local
            data.
        watched: path predicate of the leaves whose gradient norms in the last phase are reported as
            ``first_step_norm`` and ``mean_step_norm``.
        adaptation: fine-tuning of a newcomer (or, in FedAvg + tuning, of everybody before
            evaluation), of all leaves, without schedule, phases or proximal term; None leaves the
            received model.

    Raises:
        InputError: an unknown reported loss, or an optimiser that is kept through several phases.
    """
    if solver.keep_optimizer and phases is not None:
        raise InputError("keep_optimizer works with a single phase; drop phases or keep_optimizer")
    check_choice("reported_loss", reported_loss, REPORTED_LOSSES)
    training = LocalTraining(
        model=model,
        losses=example_losses(model, task),
        solver=solver,
        personal=personal,
        frozen=frozen,
        phases=(Phase(trees.negate(frozen), solver.plan),) if phases is None else tuple(phases),
        proximal_strength=proximal_strength,
        reported_loss=reported_loss,
        watched=watched,
        adaptation=adaptation,
    )
    return ClientUpdate(
        init=functools.partial(_init_trainer, training),
        update=functools.partial(_update_locally, training),
        predict=functools.partial(_predict_locally, training),
        adapt=functools.partial(_adapt_locally, training),
        shared=training.travels,
    )


def _init_trainer(training: LocalTraining, params: PyTree) -> TrainerState:
    moving = trees.partition(params, training.trainable)[0]
    own = trees.partition(moving, training.personal)[0]
    keeps = training.solver.keep_optimizer
    return TrainerState(own, training.solver.optimizer.init(moving) if keeps else ())


def _train_phase(
    training: LocalTraining,
    params: PyTree,
    optimizer_state: optax.OptState,
    client: ClientView,
    key: jax.Array,
    phase: Phase,
) -> Trained:
    """One phase, from all parameters to all parameters."""
    solver, strength = training.solver, training.proximal_strength
    moving, still = trees.partition(params, phase.trained)
    gradient = training.gradient_beside(still)
    if not isinstance(strength, (int, float)) or strength != 0:
        gradient = proximal(gradient, strength, moving)
    optimizer = phase.optimizer or solver.optimizer
    result = train(
        gradient,
        optimizer,
        phase.plan,
        moving,
        optimizer_state if solver.keep_optimizer else optimizer.init(moving),
        client,
        key,
        step_scale=solver.step_scale(client.round),
        watched=training.watched,
    )
    return result._replace(params=trees.combine(result.params, still))


def _update_locally(
    training: LocalTraining,
    params: PyTree,
    state: TrainerState,
    client: ClientView,
    key: jax.Array,
) -> ClientResult:
    start = trees.combine(state.personal, params)
    current, optimizer_state, stages = start, state.optimizer, []
    for index, phase in enumerate(training.phases):
        phase_key = jax.random.fold_in(key, index)
        trained = _train_phase(training, current, optimizer_state, client, phase_key, phase)
        current = trained.params
        stages.append(trained)
    own = trees.partition(trees.partition(current, training.trainable)[0], training.personal)[0]
    before, after = (trees.partition(p, training.travels)[0] for p in (start, current))
    kept = TrainerState(own, stages[-1].optimizer if training.solver.keep_optimizer else ())
    metrics = _training_metrics(training, start, client, stages)
    return ClientResult(optax.tree.sub(before, after), kept, metrics)


def _training_metrics(
    training: LocalTraining, start: PyTree, client: ClientView, stages: list[Trained]
) -> dict[str, jax.Array]:
    last = stages[-1]
    loss = {
        "mean": lambda: last.loss,
        "first": lambda: last.first_loss,
        "start": lambda: stages[0].first_loss,
        "full": lambda: full_loss(training.losses, start, client),
    }[training.reported_loss]()
    metrics = {"loss": loss, "num_steps": last.num_steps}
    if jax.tree.leaves(trees.partition(start, training.watched)[0]):
        metrics |= {"first_step_norm": last.first_norm, "mean_step_norm": last.mean_norm}
    return metrics


def full_loss(losses: Losses, params: PyTree, client: ClientView) -> jax.Array:
    """The mean loss over all of a client's data, ``[]``, in batches of 256."""
    return jnp.sum(local_losses(losses, params, client, 256)) / jnp.maximum(client.size, 1)


def _predict_locally(
    training: LocalTraining, params: PyTree, state: TrainerState, inputs: jax.Array
) -> jax.Array:
    return training.model.apply(trees.combine(state.personal, params), inputs, None)


def _adapt_locally(
    training: LocalTraining, params: PyTree, client: ClientView, key: jax.Array
) -> TrainerState:
    if training.adaptation is None:
        return _init_trainer(training, params)
    moving, still = trees.partition(params, training.trainable)
    optimizer = training.solver.optimizer
    tuned = train(
        training.gradient_beside(still),
        optimizer,
        training.adaptation,
        moving,
        optimizer.init(moving),
        client,
        key,
    )
    # The newcomer keeps the whole tuned model, whatever it would share in training.
    return TrainerState(tuned.params, ())


def anchored_trainer(
    model: Model,
    task: Task,
    solver: Solver,
    pull: Pull,
    *,
    personal: trees.PathPredicate = trees.nothing,
    adaptation: BatchPlan | None = None,
) -> ClientUpdate:
    """A client that keeps its own model and trains it on, while what the server sends pulls at it.

    It predicts with its own model, and sends that model as a pseudo-gradient: what it received
    minus its own model.

    Args:
        model: as for :func:`local_trainer`.
        task: as for :func:`local_trainer`.
        solver: as for :func:`local_trainer`.
        pull: ``(own, received) -> gradient`` that is added to the loss's, see
            :func:`fedjax_mtl.clients.training.quadratic_pull`; of the leaves that travel.
        personal: path predicate of the leaves that are neither sent nor pulled at.
        adaptation: training of a newcomer, from what it receives; None leaves that.
    """
    gradient = loss_gradient(example_losses(model, task))
    travels = trees.negate(personal)

    def pulled_to(received: PyTree) -> Gradient:
        anchor = trees.partition(received, travels)[0]

        def pulled(params: PyTree, batch: Batch, key: jax.Array) -> tuple[jax.Array, PyTree]:
            loss, grads = gradient(params, batch, key)
            moving, still = trees.partition(params, travels)
            towards = jax.tree.map(
                jnp.add, trees.partition(grads, travels)[0], pull(moving, anchor)
            )
            return loss, trees.combine(towards, trees.partition(grads, personal)[0])

        return pulled

    def init(params: PyTree) -> TrainerState:
        return TrainerState(params, solver.optimizer.init(params) if solver.keep_optimizer else ())

    def run(
        received: PyTree, state: TrainerState, client: ClientView, key: jax.Array, plan: BatchPlan
    ) -> Trained:
        fresh = not solver.keep_optimizer
        return train(
            pulled_to(received),
            solver.optimizer,
            plan,
            state.personal,
            solver.optimizer.init(state.personal) if fresh else state.optimizer,
            client,
            # The batches of local_trainer's first phase, so that without a pull it trains the same.
            jax.random.fold_in(key, 0),
            step_scale=solver.step_scale(client.round),
        )

    def update(
        params: PyTree, state: TrainerState, client: ClientView, key: jax.Array
    ) -> ClientResult:
        trained = run(params, state, client, key, solver.plan)
        kept = TrainerState(trained.params, trained.optimizer if solver.keep_optimizer else ())
        metrics = {"loss": trained.loss, "num_steps": trained.num_steps}
        received, own = (trees.partition(p, travels)[0] for p in (params, trained.params))
        return ClientResult(optax.tree.sub(received, own), kept, metrics)

    def predict(params: PyTree, state: TrainerState, inputs: jax.Array) -> jax.Array:
        del params
        return model.apply(state.personal, inputs, None)

    def adapt(params: PyTree, client: ClientView, key: jax.Array) -> TrainerState:
        if adaptation is None:
            return init(params)
        return init(run(params, init(params), client, key, adaptation).params)

    return ClientUpdate(init, update, predict, adapt, shared=travels)
