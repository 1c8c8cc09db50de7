"""Means that a few bad clients cannot move: coordinate-wise median and trimmed mean (Yin et al., arXiv 1803.01498)."""

import jax
import jax.numpy as jnp
import optax

from fedjax_mtl.core import trees


def _sorted_present(leaf: jax.Array, present: jax.Array) -> jax.Array:
    """Sorts along the client axis with absent clients (and NaNs) last."""
    shown = trees.along_first_axis(present, leaf)
    return jnp.sort(jnp.where(shown, leaf, jnp.inf), axis=0)


def _presence(updates, present):
    count = jax.tree.leaves(updates)[0].shape[0]
    return jnp.ones(count, bool) if present is None else present


def coordinate_median() -> optax.GradientTransformationExtraArgs:
    """The median of every coordinate over the clients present, ``[clients, ...] -> [...]``; 0 if nobody is.

    Every client counts once, whatever its weight. Extra arguments used: ``present``.
    """

    def update(updates, state, params=None, *, present=None, **extra_args):
        del params, extra_args
        there = _presence(updates, present)
        number = jnp.sum(there)

        def median(leaf):
            ordered = _sorted_present(leaf, there)
            low = ordered[jnp.maximum((number - 1) // 2, 0)]
            return jnp.where(number > 0, (low + ordered[number // 2 * (number > 0)]) / 2, 0)

        return jax.tree.map(median, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def trimmed_mean(trim: float = 0.1) -> optax.GradientTransformationExtraArgs:
    """The mean of every coordinate without the ``floor(trim * present)`` lowest and as many highest, ``[clients, ...] -> [...]``.

    Args:
        trim: share cut on each side, in [0, 0.5).

    Extra arguments used: ``present``.
    """
    if not 0 <= trim < 0.5:
        raise ValueError(f"trim is {trim}; give a share in [0, 0.5) to cut on each side")

    def update(updates, state, params=None, *, present=None, **extra_args):
        del params, extra_args
        there = _presence(updates, present)
        number = jnp.sum(there)
        cut = jnp.floor(trim * number + 1e-6).astype(number.dtype)
        place = jnp.arange(there.shape[0])
        inside = (place >= cut) & (place < number - cut)

        def mean(leaf):
            ordered = _sorted_present(leaf, there)
            shown = trees.along_first_axis(inside, leaf)
            return jnp.sum(jnp.where(shown, ordered, 0), axis=0) / jnp.maximum(
                number - 2 * cut, 1
            ).astype(leaf.dtype)

        return jax.tree.map(mean, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
