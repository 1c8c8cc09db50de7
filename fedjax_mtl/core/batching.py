"""The minibatches of one client: epochs or steps, shuffled on the device, padding masked."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_mtl.core.checks import InputError
from fedjax_mtl.core.federation import ClientView

PyTree = Any

_INDEX_BITS = 12


class BatchPlan(NamedTuple):
    """How a client goes through its data in one round. Use :func:`epochs` or :func:`steps`.

    Attributes:
        batch_size: examples a step; None is the whole local set.
        num_epochs: passes over the data, each of ceil(size / batch_size) steps, where the last
            batch may be partial. None if ``num_steps`` is given.
        num_steps: steps, reshuffling whenever the data are used up. May be a traced int32 scalar.
            None if ``num_epochs`` is given.
        shuffle: False takes the examples in order.
    """

    batch_size: int | None
    num_epochs: int | None
    num_steps: int | jax.Array | None
    shuffle: bool


def _check(batch_size: int | None, amount: Any, name: str) -> None:
    if batch_size is not None and batch_size < 1:
        raise InputError(
            f"batch_size is {batch_size}; give at least 1, or None for the whole local set"
        )
    if isinstance(amount, int) and amount < 0:
        raise InputError(f"{name} is {amount}; give 0 or more")


def epochs(num: int, batch_size: int | None, *, shuffle: bool = True) -> BatchPlan:
    """``num`` passes over the local data in batches of ``batch_size``."""
    _check(batch_size, num, "the number of local epochs")
    return BatchPlan(batch_size, num, None, shuffle)


def steps(num: int | jax.Array, batch_size: int | None, *, shuffle: bool = True) -> BatchPlan:
    """``num`` local steps in batches of ``batch_size``, however many epochs that makes."""
    _check(batch_size, num, "the number of local steps")
    return BatchPlan(batch_size, None, num, shuffle)


class Batch(NamedTuple):
    """One minibatch of one client.

    Attributes:
        examples: pytree, leaves ``[batch, ...]``.
        mask: bool ``[batch]``; False marks padding.
        weights: float ``[batch]``, one weight for each example. They are 1 unless the algorithm
            gives others, as EM does.
    """

    examples: PyTree
    mask: jax.Array
    weights: jax.Array


def epoch_order(key: jax.Array, size: jax.Array, capacity: int) -> jax.Array:
    """A uniformly random order of the positions ``0 .. size - 1``, followed by the padding.

    The order is int32 ``[capacity]``. Among capacities up to 4096 the order of the real examples
    does not depend on the capacity, and neither does it among capacities beyond 4096.

    Up to 4096 the random number and the position are packed in one integer, because a sort of one
    operand is twice as fast as an argsort on CPUs. The 20 random bits that remain tie for one pair
    in a million, which then keeps its order.
    """
    position = jnp.arange(capacity, dtype=jnp.uint32)
    bits = jax.random.bits(key, (capacity,), jnp.uint32)
    if capacity > 1 << _INDEX_BITS:
        last = jnp.uint32(0xFFFFFFFF)
        _, order = jax.lax.sort((jnp.where(position < size, bits, last), position), num_keys=2)
        return order.astype(jnp.int32)
    low = jnp.uint32((1 << _INDEX_BITS) - 1)
    packed = jnp.where(position < size, bits & ~low, ~low) | position
    return (jnp.sort(packed) & low).astype(jnp.int32)


def gather(client: ClientView, positions: jax.Array) -> PyTree:
    """The client's examples at these positions of its data, leaves ``[*positions.shape, ...]``."""
    rows = client.rows[positions]
    return jax.tree.map(lambda leaf: leaf[rows], client.examples)


def draw_batch(client: ClientView, batch_size: int, key: jax.Array) -> Batch:
    """One minibatch drawn uniformly without replacement.

    It is for algorithms whose clients go in lock step. A client with fewer than ``batch_size``
    examples gives all of them, and the rest is padding.
    """
    capacity = client.rows.shape[0]
    order = epoch_order(key, client.size, capacity)
    positions = jnp.pad(order, (0, max(0, batch_size - capacity)))[:batch_size]
    return Batch(
        gather(client, positions), jnp.arange(batch_size) < client.size, jnp.ones(batch_size)
    )


def for_each_batch(
    step: Callable[[PyTree, Batch, jax.Array], PyTree],
    carry: PyTree,
    client: ClientView,
    plan: BatchPlan,
    key: jax.Array,
    example_weights: jax.Array | None = None,
) -> tuple[PyTree, jax.Array]:
    """Runs ``carry = step(carry, batch, key)`` over the batches of one client.

    There are two nested loops, over epochs and over the steps of an epoch, whose trip counts are
    the client's own. Small clients and stragglers therefore stop early. Under ``vmap`` a chunk of
    clients runs as long as its largest client and masks the rest. Loops with traced trip counts
    cannot be differentiated in reverse mode.

    Args:
        step: pure; called with the carry, a Batch and a key of its own.
        carry: pytree of arrays.
        client: the client's view; it makes ``floor(client.work * planned)`` steps, and at most
            ``client.budget``.
        plan: how to go through the data.
        key: decides the shuffles and the steps' keys.
        example_weights: float ``[capacity]``, by position; default 1.

    Returns:
        The last carry, and the number of steps made, int32 ``[]``.
    """
    capacity = client.rows.shape[0]
    batch_size = capacity if plan.batch_size is None else min(plan.batch_size, capacity)
    steps_per_epoch = -(-client.size // batch_size)
    passes = 0 if plan.num_epochs is None else plan.num_epochs
    planned = passes * steps_per_epoch if plan.num_steps is None else plan.num_steps
    # A client without data makes no step, whatever was planned.
    planned = jnp.where(client.size > 0, planned, 0)
    managed = jnp.where(client.work < 1, jnp.floor(client.work * planned), planned)
    num_steps = jnp.minimum(managed, client.budget).astype(jnp.int32)
    slots = -(-capacity // batch_size) * batch_size
    order_key, step_key = jax.random.split(key)

    def epoch(loop):
        done, carry = loop
        order = jnp.arange(capacity, dtype=jnp.int32)
        if plan.shuffle and batch_size < capacity:
            order = epoch_order(jax.random.fold_in(order_key, done), client.size, capacity)
        order = jnp.pad(order, (0, slots - capacity))
        rows = client.rows[order]
        until = jnp.minimum(done + steps_per_epoch, num_steps)

        def one(inner):
            index, carry = inner
            start = (index - done) * batch_size
            own = jax.lax.dynamic_slice(rows, (start,), (batch_size,))
            examples = jax.tree.map(lambda leaf: leaf[own], client.examples)
            mask = start + jnp.arange(batch_size) < client.size
            weights = jnp.ones(batch_size)
            if example_weights is not None:
                weights = example_weights[jax.lax.dynamic_slice(order, (start,), (batch_size,))]
            batch = Batch(examples, mask, weights)
            return index + 1, step(carry, batch, jax.random.fold_in(step_key, index))

        return jax.lax.while_loop(lambda inner: inner[0] < until, one, (done, carry))

    done, carry = jax.lax.while_loop(
        lambda loop: loop[0] < num_steps, epoch, (jnp.zeros((), jnp.int32), carry)
    )
    return carry, done
