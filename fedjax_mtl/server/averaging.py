"""Averaging and clipping of the cohort's pseudo-gradients."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedjax_mtl.core import trees
from fedjax_mtl.server.facts import mean_weights, who_is_there

PyTree = Any


class AverageClientsState(NamedTuple):
    """Nothing to remember; its type and structure tell what a chain does first.

    Attributes:
        covers: the structure of the parameters that are averaged, with ``()`` for every leaf, and
            ``optax.MaskedNode`` where ``optax.masked`` hides one.
    """

    covers: Any


def average_clients() -> optax.GradientTransformationExtraArgs:
    """The weighted sum of the clients' pseudo-gradients, ``[clients, ...] -> [...]``.

    It is the server of FedAvg (arXiv 1602.05629, algorithm 1). The weights are the extra argument
    ``weights`` ``[clients]``, taken as they are: the algorithm's ``weighting`` decides what they
    are and whether they sum to 1. Without it, each client that is present counts 1 / clients
    present.

    With the extra argument ``already_averaged=True`` the updates have no client axis any more, and
    pass as they are.
    """

    def init(params: PyTree) -> AverageClientsState:
        return AverageClientsState(jax.tree.map(lambda _: (), params))

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
        weights = mean_weights(who_is_there(updates, present), weights)
        return trees.weighted_sum(weights, trees.mask_clients(updates, present)), state

    return optax.GradientTransformationExtraArgs(init, update)


def averages_first(server: optax.GradientTransformation, params: PyTree) -> bool:
    """Whether the first step of a server is :func:`average_clients`, of all parameters.

    Then nobody needs the clients' updates one by one: a round may carry the weighted sum from chunk
    to chunk and hand the server the result. It is seen through ``optax.chain``,
    ``optax.named_chain``, ``optax.inject_hyperparams`` and ``optax.masked`` (whose mask must select
    everything).

    Args:
        server: the transformation.
        params: what it would be initialised with, arrays or shapes.
    """
    states: list[Any] = []
    # The state itself, not what eval_shape returns: passing a boundary of JAX sorts a named chain.
    jax.eval_shape(lambda p: states.append(server.init(p)), params)
    return _averages_everything(states[0])


def _averages_everything(state: optax.OptState) -> bool:
    """Whether the first step of a chain is an average of all parameters, seen from its state."""
    if isinstance(state, AverageClientsState):
        nodes = jax.tree.leaves(state.covers, is_leaf=_is_masked)
        return not any(map(_is_masked, nodes))
    if hasattr(state, "inner_state"):
        return _averages_everything(state.inner_state)
    steps = list(state.values()) if isinstance(state, dict) else state
    return type(steps) in (tuple, list) and bool(steps) and _averages_everything(steps[0])


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def clip_clients(max_norm: float | jax.Array) -> optax.GradientTransformationExtraArgs:
    """Scales every client's pseudo-gradient down to a bounded length; keeps the client axis.

    Args:
        max_norm: the largest l2 norm over all leaves.
    """

    def clip(update: PyTree) -> PyTree:
        norm = optax.tree.norm(update)
        scale = jnp.minimum(1.0, max_norm / jnp.maximum(norm, jnp.finfo(norm.dtype).tiny))
        return jax.tree.map(lambda leaf: leaf * scale.astype(leaf.dtype), update)

    def update(updates, state, params=None, **extra_args):
        del params, extra_args
        return jax.vmap(clip)(updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def step_from(
    optimizer: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """A server that averages and then lets an optax optimiser take the step.

    FedAvgM, FedAdam and FedYogi (arXiv 2003.00295) are such servers.
    """
    return optax.chain(average_clients(), optimizer)
