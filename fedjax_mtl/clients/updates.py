"""Client updates: what ONE client does in a round. Nothing in here has a client axis.

Three levels, each usable alone: a *gradient* (``loss_gradient`` and its wrappers, the local objectives), *local training* (a
loop of optimiser steps over the client's batches), and the *client update* that an algorithm maps over a cohort.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedjax_mtl.clients.training import (
    Pull,
    Schedule,
    local_losses,
    loss_gradient,
    proximal,
    train,
)
from fedjax_mtl.core import trees
from fedjax_mtl.core.batching import BatchPlan
from fedjax_mtl.core.federation import ClientView
from fedjax_mtl.tasks import Task, example_losses

PyTree = Any


class ClientResult(NamedTuple):
    """What a client sends (``pseudo_gradient``, the start minus the result), keeps (``state``) and reports (``metrics``).

    ``metrics`` holds scalars and always ``loss``, which the server's transformations see as ``losses``.
    """

    pseudo_gradient: PyTree
    state: PyTree
    metrics: dict[str, jax.Array]


class ClientUpdate(NamedTuple):
    """An algorithm's client side, as pure functions of one client.

    Attributes:
        init: ``params -> state``, what a client keeps between rounds.
        update: ``(params, state, client, key) -> ClientResult``.
        predict: ``(params, state, inputs [batch, ...]) -> outputs``, the client's personalised model.
        adapt: ``(params, client, key) -> state`` for a client that was never trained with.
        shared: path predicate of the leaves that travel. ``params`` is always the whole tree; the leaves that are not shared
            stay as initialised there, and are None in pseudo-gradients.
    """

    init: Callable[[PyTree], PyTree]
    update: Callable[[PyTree, PyTree, ClientView, jax.Array], ClientResult]
    predict: Callable[[PyTree, PyTree, jax.Array], jax.Array]
    adapt: Callable[[PyTree, ClientView, jax.Array], PyTree]
    shared: trees.PathPredicate = trees.everything


class TrainerState(NamedTuple):
    """What a locally training client keeps: its personal leaves, and its optimiser's state (or ``()``)."""

    personal: PyTree
    optimizer: Any


class Phase(NamedTuple):
    """A part of a round's local training: which leaves move, how far, and by which optimiser (None: the trainer's)."""

    trained: trees.PathPredicate
    plan: BatchPlan
    optimizer: optax.GradientTransformation | None = None


def local_trainer(
    model: Any,
    task: Task,
    optimizer: optax.GradientTransformation,
    plan: BatchPlan,
    *,
    personal: trees.PathPredicate = trees.nothing,
    frozen: trees.PathPredicate = trees.nothing,
    phases: Sequence[Phase] | None = None,
    proximal_strength: float | jax.Array = 0.0,
    schedule: Schedule | None = None,
    keep_optimizer: bool = False,
    reported_loss: str = "mean",
    watched: trees.PathPredicate = trees.nothing,
    adaptation: BatchPlan | None = None,
) -> ClientUpdate:
    """A client that trains on its own data: FedAvg's, FedProx's, FedPer's, FedRep's, or one that shares nothing.

    Args:
        model, task: what is trained, on ``examples["inputs"]`` and ``examples["labels"]``.
        optimizer: any optax optimiser. plan: how far a round goes.
        personal: path predicate of the leaves that stay on the client; the others are the pseudo-gradient.
        frozen: path predicate of the leaves that nobody trains: they neither travel nor are copied to clients, and no gradient of them is computed. With it, ``phases`` name what they train.
        phases: alternation, e.g. head then body: each phase trains only the leaves its predicate selects, by its own plan and optimiser.
            Default: one phase, everything, ``plan``. Budgets apply to each phase.
        proximal_strength: FedProx's mu; the anchor is the start of the round.
        schedule: factor on the learning rate as a function of the round number.
        keep_optimizer: keep momenta and counters from round to round instead of starting afresh. Needs one phase.
        reported_loss: ``mean`` over the last phase's steps; ``first``, of the last phase's first step; ``start``, of the round's first step; ``full``, of the
            received model on all local data.
        watched: path predicate of the leaves whose gradient norms in the last phase are reported as ``first_step_norm`` and ``mean_step_norm``.
        adaptation: fine-tuning of a newcomer (or, in FedAvg + tuning, of everybody before evaluation), of all leaves, without schedule,
            phases or proximal term; None leaves the received model.
    """
    if keep_optimizer and phases is not None:
        raise ValueError("keep_optimizer works with a single phase; drop phases or keep_optimizer")
    if reported_loss not in ("mean", "first", "start", "full"):
        raise ValueError(
            f"unknown reported_loss {reported_loss!r}; expected mean, first, start or full"
        )
    losses = example_losses(model, task)
    trainable = trees.negate(frozen)

    def travels(path):
        return not personal(path) and not frozen(path)

    def init(params):
        moving = trees.partition(params, trainable)[0]
        own = trees.partition(moving, personal)[0]
        return TrainerState(own, optimizer.init(moving) if keep_optimizer else ())

    def gradient_beside(still):
        """The gradient in some leaves, beside others that stay as they are."""
        return loss_gradient(lambda moving, e, k: losses(trees.combine(moving, still), e, k))

    def train_phase(params, state, client, key, phase):
        moving, still = trees.partition(params, phase.trained)
        solver = phase.optimizer or optimizer
        moving_gradient = gradient_beside(still)
        pulled = proximal(moving_gradient, proximal_strength, moving)
        uses_anchor = not isinstance(proximal_strength, (int, float)) or proximal_strength != 0
        result = train(
            pulled if uses_anchor else moving_gradient,
            solver,
            phase.plan,
            moving,
            state if keep_optimizer else solver.init(moving),
            client,
            key,
            step_scale=1.0 if schedule is None else schedule(client.round),
            watched=watched,
        )
        return result._replace(params=trees.combine(result.params, still))

    def update(params, state, client, key):
        start = trees.combine(state.personal, params)
        current, optimizer_state = start, state.optimizer
        metrics = {}
        if reported_loss == "full":
            metrics["loss"] = jnp.sum(local_losses(losses, start, client, 256)) / jnp.maximum(
                client.size, 1
            )
        for index, phase in enumerate(phases or (Phase(trainable, plan),)):
            trained = train_phase(
                current, optimizer_state, client, jax.random.fold_in(key, index), phase
            )
            current = trained.params
            if reported_loss == "start":
                metrics.setdefault("loss", trained.first_loss)
        own = trees.partition(trees.partition(current, trainable)[0], personal)[0]
        before, after = (trees.partition(p, travels)[0] for p in (start, current))
        metrics.setdefault("loss", trained.first_loss if reported_loss == "first" else trained.loss)
        metrics["num_steps"] = trained.num_steps
        if jax.tree.leaves(trees.partition(start, watched)[0]):
            metrics |= {"first_step_norm": trained.first_norm, "mean_step_norm": trained.mean_norm}
        kept = TrainerState(own, trained.optimizer if keep_optimizer else ())
        return ClientResult(optax.tree.sub(before, after), kept, metrics)

    def predict(params, state, inputs):
        return model.apply(trees.combine(state.personal, params), inputs, None)

    def adapt(params, client, key):
        if adaptation is None:
            return init(params)
        moving, still = trees.partition(params, trainable)
        state = optimizer.init(moving)
        tuned = train(gradient_beside(still), optimizer, adaptation, moving, state, client, key)
        # The newcomer keeps the whole tuned model, whatever it would share in training.
        return TrainerState(tuned.params, ())

    return ClientUpdate(init, update, predict, adapt, shared=travels)


def anchored_trainer(
    model: Any,
    task: Task,
    optimizer: optax.GradientTransformation,
    plan: BatchPlan,
    pull: Pull,
    *,
    schedule: Schedule | None = None,
    keep_optimizer: bool = False,
    adaptation: BatchPlan | None = None,
) -> ClientUpdate:
    """A client that keeps its own model and trains it on, while what the server sends only pulls at it.

    It sends its own model (as a pseudo-gradient: what it received minus that), and predicts with it.

    Args:
        model, task, optimizer, plan, schedule, keep_optimizer: local training, as for :func:`local_trainer`.
        pull: ``(own, received) -> gradient`` that is added to the loss's, see :func:`quadratic_pull`.
        adaptation: training of a newcomer, from what it receives; None leaves that.
    """
    gradient = loss_gradient(example_losses(model, task))

    def pulled_to(received):
        def pulled(params, batch, key):
            loss, grads = gradient(params, batch, key)
            return loss, jax.tree.map(jnp.add, grads, pull(params, received))

        return pulled

    def init(params):
        return TrainerState(params, optimizer.init(params) if keep_optimizer else ())

    def run(received, state, client, key, plan):
        start = state.optimizer if keep_optimizer else optimizer.init(state.personal)
        scale = 1.0 if schedule is None else schedule(client.round)
        # The batches of local_trainer's first phase, so that without a pull it is the same training.
        return train(
            pulled_to(received),
            optimizer,
            plan,
            state.personal,
            start,
            client,
            jax.random.fold_in(key, 0),
            step_scale=scale,
        )

    def update(params, state, client, key):
        trained = run(params, state, client, key, plan)
        kept = TrainerState(trained.params, trained.optimizer if keep_optimizer else ())
        metrics = {"loss": trained.loss, "num_steps": trained.num_steps}
        return ClientResult(optax.tree.sub(params, trained.params), kept, metrics)

    def predict(params, state, inputs):
        del params
        return model.apply(state.personal, inputs, None)

    def adapt(params, client, key):
        if adaptation is None:
            return init(params)
        return init(run(params, init(params), client, key, adaptation).params)

    return ClientUpdate(init, update, predict, adapt)
