"""Compressed uploads with error feedback.

What a client did not send now, it adds to what it sends next (Karimireddy et al., arXiv 1901.09847,
algorithm 1). Sparsification: Stich et al., arXiv 1809.07599. Quantisation: QSGD, Alistarh et al.,
arXiv 1610.02132.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.flatten_util
import jax.numpy as jnp
import optax

from fedjax_mtl.core import trees
from fedjax_mtl.core.checks import InputError
from fedjax_mtl.server.decoupling import largest_entries
from fedjax_mtl.server.facts import who_is_there

PyTree = Any
Compressor = Callable[[jax.Array, jax.Array], jax.Array]


def top_entries(fraction: float) -> Compressor:
    """Keeps the ``max(1, ceil(fraction * size))`` largest entries of a vector.

    Args:
        fraction: the share of the entries that is kept, in (0, 1].
    """
    if not 0 < fraction <= 1:
        raise InputError(f"fraction is {fraction}; give a share in (0, 1]")

    def compress(vector: jax.Array, key: jax.Array) -> jax.Array:
        del key
        count = max(1, math.ceil(fraction * vector.shape[0] - 1e-9))
        return jnp.where(largest_entries(jnp.abs(vector), count), vector, 0)

    return compress


def stochastic_levels(levels: int) -> Compressor:
    """QSGD: signs and norm are exact, magnitudes are rounded at random; the result is unbiased.

    Args:
        levels: the number of equal steps from 0 to the norm, to which magnitudes are rounded.
    """
    if levels < 1:
        raise InputError(f"levels is {levels}; give at least 1")

    def compress(vector: jax.Array, key: jax.Array) -> jax.Array:
        norm = jnp.linalg.norm(vector)
        scaled = jnp.abs(vector) / jnp.where(norm > 0, norm, 1) * levels
        up = jax.random.uniform(key, vector.shape, vector.dtype) < scaled - jnp.floor(scaled)
        return jnp.sign(vector) * norm / levels * (jnp.floor(scaled) + up)

    return compress


class CompressClientsState(NamedTuple):
    """What clients owe.

    Attributes:
        unsent: what each client has not sent yet, leaves ``[population, ...]``; ``()`` without
            error feedback.
    """

    unsent: PyTree


def compress_clients(
    compressor: Compressor, num_clients: int, *, error_feedback: bool = True
) -> optax.GradientTransformationExtraArgs:
    """Every client's update as the server gets it through a lossy upload.

    ``[clients, ...] -> [clients, ...]``. Absent clients send nothing and keep what they owe.

    Args:
        compressor: ``(vector [parameters], key) -> vector``: :func:`top_entries`,
            :func:`stochastic_levels` or your own.
        num_clients: clients in the population.
        error_feedback: add to each update what the client's earlier compressions left out.

    Extra arguments used: ``client_ids``, ``present``, ``key``.
    """

    def init(params: PyTree) -> CompressClientsState:
        nothing = optax.tree.zeros_like(params) if error_feedback else ()
        return CompressClientsState(trees.broadcast_clients(nothing, num_clients))

    def send(update: PyTree, client_id: jax.Array, key: jax.Array) -> PyTree:
        flat, unravel = jax.flatten_util.ravel_pytree(update)
        return unravel(compressor(flat, jax.random.fold_in(key, client_id)))

    def update(updates, state, params=None, *, client_ids, key, present=None, **extra_args):
        del params, extra_args
        there = who_is_there(updates, present)
        if error_feedback:
            updates = optax.tree.add(updates, trees.take_clients(state.unsent, client_ids))
        meant = trees.mask_clients(updates, there)
        sent = jax.vmap(send, (0, 0, None))(meant, client_ids, key)
        if not error_feedback:
            return sent, state
        left = optax.tree.sub(meant, sent)
        return sent, CompressClientsState(trees.put_clients(state.unsent, client_ids, left, there))

    return optax.GradientTransformationExtraArgs(init, update)
