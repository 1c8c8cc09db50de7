"""Compressed uploads with error feedback: what a client did not send now, it adds to what it sends next.

Error feedback: Karimireddy et al., arXiv 1901.09847, algorithm 1. Sparsification: Stich et al., arXiv 1809.07599. Quantisation: QSGD, Alistarh et al., arXiv 1610.02132.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.flatten_util
import jax.numpy as jnp
import optax

from fedjax_mtl.core import trees
from fedjax_mtl.server.decoupling import largest_entries

PyTree = Any
Compressor = Callable[[jax.Array, jax.Array], jax.Array]


def top_entries(fraction: float) -> Compressor:
    """Keeps the ``max(1, ceil(fraction * size))`` largest entries of a vector."""
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction is {fraction}; give a share in (0, 1]")

    def compress(vector, key):
        del key
        count = max(1, math.ceil(fraction * vector.shape[0] - 1e-9))
        return jnp.where(largest_entries(jnp.abs(vector), count), vector, 0)

    return compress


def stochastic_levels(levels: int) -> Compressor:
    """QSGD: signs and norm exactly, magnitudes rounded at random to one of ``levels`` equal steps; unbiased."""
    if levels < 1:
        raise ValueError(f"levels is {levels}; give at least 1")

    def compress(vector, key):
        norm = jnp.linalg.norm(vector)
        scaled = jnp.abs(vector) / jnp.where(norm > 0, norm, 1) * levels
        up = jax.random.uniform(key, vector.shape, vector.dtype) < scaled - jnp.floor(scaled)
        return jnp.sign(vector) * norm / levels * (jnp.floor(scaled) + up)

    return compress


class CompressClientsState(NamedTuple):
    """What each client has not sent yet, leaves ``[population, ...]``; ``()`` without error feedback."""

    unsent: PyTree


def compress_clients(
    compressor: Compressor, num_clients: int, *, error_feedback: bool = True
) -> optax.GradientTransformationExtraArgs:
    """Every client's update as the server gets it through a lossy upload, ``[clients, ...] -> [clients, ...]``.

    Args:
        compressor: ``(vector [parameters], key) -> vector``: :func:`top_entries`, :func:`stochastic_levels` or your own.
        num_clients: clients in the population.
        error_feedback: add to each update what the client's earlier compressions left out.

    Extra arguments used: ``client_ids``, ``present``, ``key``. Absent clients send nothing and keep what they owe.
    """

    def init(params):
        owed = (
            trees.broadcast_clients(optax.tree.zeros_like(params), num_clients)
            if error_feedback
            else ()
        )
        return CompressClientsState(owed)

    def update(updates, state, params=None, *, client_ids, key, present=None, **extra_args):
        del params, extra_args
        there = jnp.ones(client_ids.shape, bool) if present is None else present
        updates = trees.mask_clients(updates, there)
        if error_feedback:
            updates = optax.tree.add(
                updates, trees.mask_clients(trees.take_clients(state.unsent, client_ids), there)
            )

        def one(update, client_id):
            flat, unravel = jax.flatten_util.ravel_pytree(update)
            return unravel(compressor(flat, jax.random.fold_in(key, client_id)))

        sent = jax.vmap(one)(updates, client_ids)
        if not error_feedback:
            return sent, state
        left = optax.tree.sub(updates, sent)
        return sent, CompressClientsState(trees.put_clients(state.unsent, client_ids, left, there))

    return optax.GradientTransformationExtraArgs(init, update)
