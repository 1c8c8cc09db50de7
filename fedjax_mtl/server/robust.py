"""Means that a few bad clients cannot move.

They are the coordinate-wise median and trimmed mean of Yin et al. (arXiv 1803.01498).
"""

import jax
import jax.numpy as jnp
import optax

from fedjax_mtl.core import trees
from fedjax_mtl.core.checks import InputError
from fedjax_mtl.server.facts import who_is_there


def _sorted_present(leaf: jax.Array, present: jax.Array) -> jax.Array:
    """Sorts along the client axis with absent clients (and NaNs) last."""
    shown = trees.along_first_axis(present, leaf)
    return jnp.sort(jnp.where(shown, leaf, jnp.inf), axis=0)


def coordinate_median() -> optax.GradientTransformationExtraArgs:
    """The median of every coordinate over the clients present, ``[clients, ...] -> [...]``.

    It is 0 if nobody is there. Every client counts once, whatever its weight.

    Extra arguments used: ``present``.
    """

    def update(updates, state, params=None, *, present=None, **extra_args):
        del params, extra_args
        there = who_is_there(updates, present)
        number = jnp.sum(there)

        def median(leaf: jax.Array) -> jax.Array:
            ordered = _sorted_present(leaf, there)
            low = ordered[jnp.maximum((number - 1) // 2, 0)]
            return jnp.where(number > 0, (low + ordered[number // 2 * (number > 0)]) / 2, 0)

        return jax.tree.map(median, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def trimmed_mean(trim: float = 0.1) -> optax.GradientTransformationExtraArgs:
    """The mean of every coordinate without its extremes, ``[clients, ...] -> [...]``.

    The ``floor(trim * present)`` lowest values are left out, and as many of the highest.

    Args:
        trim: share cut on each side, in [0, 0.5).

    Extra arguments used: ``present``.
    """
    if not 0 <= trim < 0.5:
        raise InputError(f"trim is {trim}; give a share in [0, 0.5) to cut on each side")

    def update(updates, state, params=None, *, present=None, **extra_args):
        del params, extra_args
        there = who_is_there(updates, present)
        number = jnp.sum(there)
        cut = jnp.floor(trim * number + 1e-6).astype(number.dtype)
        place = jnp.arange(there.shape[0])
        inside = (place >= cut) & (place < number - cut)
        left = jnp.maximum(number - 2 * cut, 1)

        def mean(leaf: jax.Array) -> jax.Array:
            ordered = _sorted_present(leaf, there)
            shown = trees.along_first_axis(inside, leaf)
            return jnp.sum(jnp.where(shown, ordered, 0), axis=0) / left.astype(leaf.dtype)

        return jax.tree.map(mean, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
