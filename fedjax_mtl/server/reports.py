"""What a server's transformations report: named arrays in their states, collected after a round.

A transformation that has something to tell keeps a :class:`Report` in its state. The round collects
the reports of a whole chain, wherever they stand in it, into its ``info``; nobody reads the other
fields of somebody else's state.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

PyTree = Any


class Report(NamedTuple):
    """Named arrays of any shape; the names and shapes are the same from ``init`` on."""

    values: dict[str, jax.Array]


def no_scalars(names: Iterable[str]) -> Report:
    """What a transformation that reports scalars says before its first round: zeros."""
    return Report({name: jnp.zeros((), jnp.float32) for name in names})


def scalars(values: dict[str, jax.Array]) -> Report:
    """A report of scalars, in one type whatever they were computed in."""
    return Report({name: jnp.asarray(value, jnp.float32) for name, value in values.items()})


def reported(state: PyTree) -> dict[str, jax.Array]:
    """All that the transformations of a chain report, from the chain's state.

    Where two report under one name, the later one's gets a number: ``conflicts``, ``conflicts_2``.
    """
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, Report))
    info: dict[str, jax.Array] = {}
    for report in (node for node in nodes if isinstance(node, Report)):
        for name, value in report.values.items():
            info[_free_name(name, info)] = value
    return info


def _free_name(name: str, taken: dict[str, jax.Array]) -> str:
    """The name, or the name with the first number from 2 on that is not taken."""
    number, free = 1, name
    while free in taken:
        number += 1
        free = f"{name}_{number}"
    return free
