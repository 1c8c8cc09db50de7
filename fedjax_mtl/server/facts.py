"""What a transformation takes for granted where the caller does not say it.

Every client of the cohort is there, row k belongs to client k, and all weigh the same.
"""

from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any


def num_rows(tree: PyTree) -> int:
    """How many clients the leaves ``[clients, ...]`` are of; 0 for a tree without leaves."""
    leaves = jax.tree.leaves(tree)
    return leaves[0].shape[0] if leaves else 0


def who_is_there(updates: PyTree, present: jax.Array | None) -> jax.Array:
    """``present``, or that everybody is there: bool ``[clients]``."""
    return jnp.ones(num_rows(updates), bool) if present is None else present


def numbers_of(updates: PyTree, client_ids: jax.Array | None) -> jax.Array:
    """``client_ids``, or 0, 1, 2, ...: int ``[clients]``."""
    return jnp.arange(num_rows(updates)) if client_ids is None else client_ids


def mean_weights(present: jax.Array, weights: jax.Array | None = None) -> jax.Array:
    """``weights``, or those of the plain mean of the clients present: float ``[clients]``."""
    return present / jnp.maximum(jnp.sum(present), 1) if weights is None else weights
