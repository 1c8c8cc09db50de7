"""Averaging and clipping of the cohort's pseudo-gradients."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedjax_mtl.core import trees


class AverageClientsState(NamedTuple):
    """Empty. Its type at the head of a chain's state tells the round that nobody needs the clients' updates one by one."""


def average_clients() -> optax.GradientTransformationExtraArgs:
    """The weighted sum of the clients' pseudo-gradients, ``[clients, ...] -> [...]`` (FedAvg, arXiv 1602.05629, algorithm 1).

    The weights are the extra argument ``weights`` ``[clients]``, taken as they are (the algorithm's ``weighting`` decides what they are and
    whether they sum to 1); without it, each client counts 1 / clients. With ``already_averaged`` the updates have no client axis any more, and pass.
    """

    def init(params):
        del params
        return AverageClientsState()

    def update(
        updates,
        state,
        params=None,
        *,
        weights=None,
        present=None,
        already_averaged=False,
        **extra_args,
    ):
        del params, extra_args
        if already_averaged:
            return updates, state
        updates = trees.mask_clients(updates, present)
        if weights is None:
            there = jnp.ones(jax.tree.leaves(updates)[0].shape[0]) if present is None else present
            weights = there / jnp.maximum(jnp.sum(there), 1)
        return trees.weighted_sum(weights, updates), state

    return optax.GradientTransformationExtraArgs(init, update)


def only_averages(server_state: optax.OptState) -> bool:
    """Whether the server's first step is :func:`average_clients`, seen from its state.

    The state of an ``optax.chain`` is the tuple of its members' states, in order. If averaging comes first, the round may carry the weighted
    sum from chunk to chunk and hand the server the result.
    """
    while type(server_state) is tuple and server_state:
        server_state = server_state[0]
    return isinstance(server_state, AverageClientsState)


def clip_clients(max_norm: float | jax.Array) -> optax.GradientTransformationExtraArgs:
    """Scales each client's pseudo-gradient down to an l2 norm of at most ``max_norm`` over all leaves; keeps the client axis."""

    def init(params):
        del params
        return optax.EmptyState()

    def clip(update):
        norm = optax.tree.norm(update)
        scale = jnp.minimum(1.0, max_norm / jnp.maximum(norm, jnp.finfo(norm.dtype).tiny))
        return jax.tree.map(lambda leaf: leaf * scale.astype(leaf.dtype), update)

    def update(updates, state, params=None, **extra_args):
        del params, extra_args
        return jax.vmap(clip)(updates), state

    return optax.GradientTransformationExtraArgs(init, update)


def step_from(optimizer: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """A server that averages and then lets an optax optimiser take the step: FedAvgM, FedAdam, FedYogi (arXiv 2003.00295)."""
    return optax.chain(average_clients(), optimizer)
