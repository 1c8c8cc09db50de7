"""Bytes and FLOPs: what a round moves and computes."""

from collections.abc import Callable
from typing import Any

import jax

PyTree = Any


def tree_bytes(tree: PyTree) -> int:
    """The bytes of all leaves (arrays or shapes)."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def flops(fn: Callable, *args: PyTree) -> float:
    """The floating-point operations of ``fn(*args)`` as XLA counts them; loops with traced trip counts count once.

    Args:
        fn: a function of arrays. args: arrays or ``jax.ShapeDtypeStruct``.
    """
    return float(jax.jit(fn).lower(*args).compile().cost_analysis()["flops"])
