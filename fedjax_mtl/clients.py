"""Client updates: what ONE client does in a round. Nothing in here has a client axis.

Three levels, each usable alone: a *gradient* (``loss_gradient`` and its wrappers, the local objectives), *local training* (a
loop of optimiser steps over the client's batches), and the *client update* that an algorithm maps over a cohort.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedjax_mtl import trees
from fedjax_mtl.batching import Batch, BatchPlan, for_each_batch, gather
from fedjax_mtl.federation import ClientView
from fedjax_mtl.tasks import Task, example_losses

PyTree = Any
Losses = Callable[[PyTree, PyTree, jax.Array | None], jax.Array]
Gradient = Callable[[PyTree, Batch, jax.Array], tuple[jax.Array, PyTree]]
Schedule = Callable[[jax.Array], jax.Array]


def loss_gradient(losses: Losses) -> Gradient:
    """The weighted mean loss of a batch and its gradient.

    The mean is ``sum_i weights_i loss_i / (number of real examples)``: padding counts for nothing, and weights are not
    renormalised (FedEM's weighted loss divides by the batch size, not by the sum of responsibilities).
    """

    def mean_loss(params: PyTree, batch: Batch, key: jax.Array) -> jax.Array:
        values = losses(params, batch.examples, key) * batch.weights
        return jnp.sum(jnp.where(batch.mask, values, 0)) / jnp.maximum(jnp.sum(batch.mask), 1)

    return jax.value_and_grad(mean_loss)


def proximal(gradient: Gradient, strength: float | jax.Array, anchor: PyTree) -> Gradient:
    """Adds the gradient of ``strength / 2 * ||params - anchor||^2``; the reported loss stays that of the data.

    With the round's starting point as anchor it is FedProx (Li et al., arXiv 1812.06127, equation 2); with any other anchor, an L2
    penalty to it.
    """

    def pulled(params: PyTree, batch: Batch, key: jax.Array) -> tuple[jax.Array, PyTree]:
        loss, grads = gradient(params, batch, key)
        return loss, jax.tree.map(lambda g, p, a: g + strength * (p - a), grads, params, anchor)

    return pulled


class Trained(NamedTuple):
    """What local training leaves.

    Attributes:
        params, optimizer: parameters and optimiser state after the last step.
        loss: mean loss over the steps. first_loss: of the first step, before it changed anything; 0 without a step.
        num_steps: steps made.
        first_norm, mean_norm: l2 norm of the watched gradient leaves, at the first step and averaged over the steps; 0 if nothing is watched.
    """

    params: PyTree
    optimizer: optax.OptState
    loss: jax.Array
    first_loss: jax.Array
    num_steps: jax.Array
    first_norm: jax.Array
    mean_norm: jax.Array


def train(
    gradient: Gradient,
    optimizer: optax.GradientTransformation,
    plan: BatchPlan,
    params: PyTree,
    optimizer_state: optax.OptState,
    client: ClientView,
    key: jax.Array,
    *,
    example_weights: jax.Array | None = None,
    step_scale: jax.Array | float = 1.0,
    watched: trees.PathPredicate = trees.nothing,
) -> Trained:
    """Local SGD, or any optax optimiser, over the client's batches.

    A client that makes fewer steps than its neighbours (less data, a budget) leaves parameters and optimiser state alone from then
    on: no momentum, no weight decay.

    Args:
        gradient: see :func:`loss_gradient`; optimizer, plan: the local solver.
        params, optimizer_state: where to start.
        client, key: one client's view and key.
        example_weights: float ``[capacity]`` by position.
        step_scale: multiplies every optimiser update; the factor of a learning-rate schedule.
        watched: path predicate of the leaves whose gradient norm is reported.
    """

    def observe(loss, grads):
        """What is summed over the steps, and kept of the first."""
        return jnp.stack([loss, optax.tree.norm(trees.partition(grads, watched)[0])]).astype(loss.dtype)

    watches = bool(jax.tree.leaves(trees.partition(params, watched)[0]))

    def step(carry, batch, step_key):
        params, state, total, first = carry
        loss, grads = gradient(params, batch, step_key)
        seen = observe(loss, grads) if watches else loss
        updates, state = optimizer.update(grads, state, params)
        updates = jax.tree.map(lambda u: u * jnp.asarray(step_scale, u.dtype), updates)
        first = jnp.where(jnp.isnan(first), seen, first)
        return optax.apply_updates(params, updates), state, total + seen, first

    zero = jnp.zeros((2,) if watches else ())
    carry = (params, optimizer_state, zero, jnp.full_like(zero, jnp.nan))
    (params, state, total, first), done = for_each_batch(step, carry, client, plan, key, example_weights)
    mean, first = total / jnp.maximum(done, 1), jnp.where(done > 0, first, 0)
    if not watches:
        return Trained(params, state, mean, first, done, jnp.zeros(()), jnp.zeros(()))
    return Trained(params, state, mean[0], first[0], done, first[1], mean[1])


def local_losses(
    losses: Losses, params: PyTree, client: ClientView, batch_size: int | None = None
) -> jax.Array:
    """The loss of each of the client's examples, by position, float ``[capacity, ...]``; padding holds 0.

    ``losses`` may return more axes behind the examples', e.g. one loss a component. Batches of ``batch_size`` (None: all at once) bound the
    memory; batches of nothing but padding are not computed.
    """
    capacity = client.rows.shape[0]
    width = capacity if batch_size is None else min(batch_size, capacity)
    slots = -(-capacity // width) * width

    def block_at(start):
        positions = start + jnp.arange(width)
        block = losses(params, gather(client, jnp.minimum(positions, capacity - 1)), None)
        real = trees.along_first_axis(positions < client.size, block)
        return jnp.where(real, block, 0)

    def one(carry):
        start, values = carry
        values = jax.lax.dynamic_update_slice_in_dim(values, block_at(start), start, axis=0)
        return start + width, values

    start = jnp.zeros((), jnp.int32)
    block = jax.eval_shape(block_at, start)
    values = jnp.zeros((slots, *block.shape[1:]), block.dtype)
    _, values = jax.lax.while_loop(lambda carry: carry[0] < client.size, one, (start, values))
    return values[:capacity]


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
        raise ValueError(f"unknown reported_loss {reported_loss!r}; expected mean, first, start or full")
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
            metrics["loss"] = jnp.sum(local_losses(losses, start, client, 256)) / jnp.maximum(client.size, 1)
        for index, phase in enumerate(phases or (Phase(trainable, plan),)):
            trained = train_phase(current, optimizer_state, client, jax.random.fold_in(key, index), phase)
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


Pull = Callable[[PyTree, PyTree], PyTree]


def quadratic_pull(strength: float | jax.Array) -> Pull:
    """The gradient of ``strength / 2 ||own - received||^2``."""
    return lambda own, received: jax.tree.map(lambda w, a: strength * (w - a), own, received)


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
