"""Local training: gradients of a client's loss, and a loop of optimiser steps over its batches. Nothing here has a client axis."""

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
        return jnp.stack([loss, optax.tree.norm(trees.partition(grads, watched)[0])]).astype(
            loss.dtype
        )

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
    (params, state, total, first), done = for_each_batch(
        step, carry, client, plan, key, example_weights
    )
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


Pull = Callable[[PyTree, PyTree], PyTree]


def quadratic_pull(strength: float | jax.Array) -> Pull:
    """The gradient of ``strength / 2 ||own - received||^2``."""
    return lambda own, received: jax.tree.map(lambda w, a: strength * (w - a), own, received)
