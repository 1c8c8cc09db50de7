"""How far clients' updates conflict, seen from their Gram matrix ``[clients, clients]``.

What projections, GPAggregation and the conflict-averse direction share.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any
Statistics = dict[str, jax.Array]

GRANULARITIES = ("global", "per_leaf")
CONFLICTS = ("conflict_fraction", "mean_cosine")

# For all products in here, not only those that touch updates: what projection leaves is the small
# difference of large inner products, and some devices round the factors unless told not to.
full_precision = jax.default_matmul_precision("highest")


def over_parts(
    granularity: str, fn: Callable[..., tuple[PyTree, Statistics]], *parts: PyTree
) -> tuple[PyTree, Statistics]:
    """``fn`` of the whole trees, or of each leaf as a tree of its own.

    Args:
        granularity: ``global`` or ``per_leaf``. Statistics of leaves become means over the leaves.
        fn: ``parts -> (tree like the parts, scalars by name)``.
        *parts: trees of one structure.
    """
    if granularity == "global":
        return fn(*parts)
    structure = jax.tree.structure(parts[0])
    pairs = [fn(*leaves) for leaves in zip(*map(jax.tree.leaves, parts), strict=True)]
    results, statistics = zip(*pairs, strict=True)
    means = jax.tree.map(lambda *values: sum(values) / len(values), *statistics)
    return jax.tree.unflatten(structure, results), means


def inverse_norms(gram: jax.Array) -> jax.Array:
    """One over the updates' lengths, ``[clients]``; 0 for an update of length 0."""
    squared = jnp.diagonal(gram)
    return jnp.where(squared > 0, jax.lax.rsqrt(jnp.where(squared > 0, squared, 1)), 0)


def conflicts(gram: jax.Array, present: jax.Array) -> Statistics:
    """The share of the pairs that conflict (a negative product), and the mean cosine of the pairs.

    Args:
        gram: ``[clients, clients]``.
        present: bool ``[clients]``; whose pairs count.
    """
    scale = inverse_norms(gram)
    cosines = scale[:, None] * gram * scale
    pairs = present[:, None] & present[None, :] & ~jnp.eye(gram.shape[0], dtype=bool)
    number = jnp.maximum(jnp.sum(pairs), 1)
    return {
        "conflict_fraction": jnp.sum(pairs & (gram < 0)) / number,
        "mean_cosine": jnp.sum(jnp.where(pairs, cosines, 0)) / number,
    }
