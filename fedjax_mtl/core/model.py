"""What a model is: a pair of pure functions. Flax (Linen) stays behind them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

PyTree = Any


class Model(NamedTuple):
    """A model.

    Attributes:
        init: ``key -> params``, a plain pytree.
        apply: ``(params, inputs [batch, ...], key) -> outputs [batch, ...]``; a key means training
            (dropout), None evaluation.
    """

    init: Callable[[jax.Array], PyTree]
    apply: Callable[[PyTree, PyTree, jax.Array | None], PyTree]


class Part(NamedTuple):
    """A piece of a model that is cut.

    Attributes:
        init: ``(key, inputs) -> params``, where the inputs are arrays or shapes.
        apply: ``(params, inputs) -> outputs``.
    """

    init: Callable[[jax.Array, PyTree], PyTree]
    apply: Callable[[PyTree, PyTree], PyTree]
