"""Local training: gradients of a client's loss, and a loop of optimiser steps over its batches.

Nothing here has a client axis, and nothing knows what is done with the result.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedjax_mtl.core import trees
from fedjax_mtl.core.batching import Batch, BatchPlan, for_each_batch, gather
from fedjax_mtl.core.federation import ClientView

PyTree = Any
Losses = Callable[[PyTree, PyTree, jax.Array | None], jax.Array]
Gradient = Callable[[PyTree, Batch, jax.Array], tuple[jax.Array, PyTree]]
Schedule = Callable[[jax.Array], jax.Array]


class Solver(NamedTuple):
    """How a client solves its local problem.

    Attributes:
        optimizer: any optax optimiser.
        plan: how far a round goes, ``batching.epochs`` or ``batching.steps``.
        schedule: factor on the learning rate as a function of the round number; None is 1.
        keep_optimizer: whether momenta and counters are kept from round to round instead of
            starting afresh. None leaves the choice to the algorithm, which starts afresh unless the
            work it reproduces keeps them.
    """

    optimizer: optax.GradientTransformation
    plan: BatchPlan
    schedule: Schedule | None = None
    keep_optimizer: bool | None = None

    def step_scale(self, round_index: jax.Array) -> jax.Array | float:
        """The factor on the learning rate in this round."""
        return 1.0 if self.schedule is None else self.schedule(round_index)

    def keeping(self, default: bool) -> "Solver":
        """This solver, which keeps its optimiser's state by ``default`` where nothing was said."""
        return self if self.keep_optimizer is not None else self._replace(keep_optimizer=default)


def loss_gradient(losses: Losses) -> Gradient:
    """The weighted mean loss of a batch and its gradient.

    The mean is ``sum_i weights_i loss_i / (number of real examples)``. Padding counts for nothing,
    and weights are not renormalised: FedEM's weighted loss divides by the batch size, not by the
    sum of responsibilities.
    """

    def mean_loss(params: PyTree, batch: Batch, key: jax.Array) -> jax.Array:
        values = losses(params, batch.examples, key) * batch.weights
        return jnp.sum(jnp.where(batch.mask, values, 0)) / jnp.maximum(jnp.sum(batch.mask), 1)

    return jax.value_and_grad(mean_loss)


def proximal(gradient: Gradient, strength: float | jax.Array, anchor: PyTree) -> Gradient:
    """Adds the gradient of ``strength / 2 * ||params - anchor||^2``.

    The reported loss stays that of the data. With the round's starting point as anchor the result
    is FedProx (Li et al., arXiv 1812.06127, equation 2). With any other anchor it is an L2 penalty
    on the distance to that anchor.
    """

    def pulled(params: PyTree, batch: Batch, key: jax.Array) -> tuple[jax.Array, PyTree]:
        loss, grads = gradient(params, batch, key)
        return loss, jax.tree.map(lambda g, p, a: g + strength * (p - a), grads, params, anchor)

    return pulled


Pull = Callable[[PyTree, PyTree], PyTree]
"""``(own, received) -> gradient``: what pulls a client's own model towards what it received."""


def quadratic_pull(strength: float | jax.Array) -> Pull:
    """The gradient of ``strength / 2 ||own - received||^2``."""
    return lambda own, received: jax.tree.map(lambda w, a: strength * (w - a), own, received)


class Trained(NamedTuple):
    """What local training leaves.

    Attributes:
        params: after the last step.
        optimizer: the optimiser's state after the last step.
        loss: mean loss over the steps; NaN where no step was made.
        first_loss: of the first step, before it changed anything; NaN where no step was made.
        num_steps: steps made.
        first_norm: l2 norm of the watched gradient leaves at the first step; 0 if nothing is
            watched.
        mean_norm: the same, averaged over the steps.
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

    A client that makes fewer steps than its neighbours (less data, a budget) leaves parameters and
    optimiser state alone from then on: no momentum, no weight decay.

    Args:
        gradient: see :func:`loss_gradient`.
        optimizer: of the local steps.
        plan: the local steps.
        params: where to start.
        optimizer_state: the optimiser's state there.
        client: the client's view.
        key: the client's key.
        example_weights: float ``[capacity]`` by position.
        step_scale: multiplies every optimiser update; the factor of a learning-rate schedule.
        watched: path predicate of the leaves whose gradient norm is reported.
    """

    def observe(loss: jax.Array, grads: PyTree) -> jax.Array:
        """What is summed over the steps, and kept of the first."""
        norm = optax.tree.norm(trees.partition(grads, watched)[0])
        return jnp.stack([loss, norm]).astype(loss.dtype)

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
    carry, done = for_each_batch(step, carry, client, plan, key, example_weights)
    params, state, total, first = carry
    mean = mean_over_steps(total, done)
    if not watches:
        return Trained(params, state, mean, first, done, jnp.zeros(()), jnp.zeros(()))
    norms = jnp.where(done > 0, jnp.stack([first[1], mean[1]]), 0)
    return Trained(params, state, mean[0], first[0], done, *norms)


def mean_over_steps(total: jax.Array, num_steps: jax.Array) -> jax.Array:
    """The mean of what was summed over a client's steps; NaN where it made none."""
    return jnp.where(num_steps > 0, total / jnp.maximum(num_steps, 1), jnp.nan)


def local_losses(
    losses: Losses, params: PyTree, client: ClientView, batch_size: int | None = None
) -> jax.Array:
    """The loss of each of the client's examples, by position, float ``[capacity, ...]``.

    Padding holds 0. ``losses`` may return more axes behind the one of the examples, e.g. one loss
    for each component. Batches of ``batch_size`` examples bound the memory; None takes all examples
    at once. Batches that hold nothing but padding are not computed.
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
