"""A model is a pair of pure functions; flax (Linen) lives behind it and no algorithm imports it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

PyTree = Any


class Model(NamedTuple):
    """A model.

    Attributes:
        init: ``key -> params``, a plain pytree.
        apply: ``(params, inputs [batch, ...], key) -> outputs [batch, ...]``; a key means training (dropout), None evaluation.
    """

    init: Callable[[jax.Array], PyTree]
    apply: Callable[[PyTree, jax.Array, jax.Array | None], jax.Array]


def from_flax(module: nn.Module, input_shape: tuple[int, ...], dtype: Any = jnp.float32) -> Model:
    """Wraps a flax module whose ``__call__`` takes ``(inputs, train)`` and whose only collection is ``params``.

    Args:
        module: the module. input_shape, dtype: of one example.

    Raises:
        ValueError: (at init) the module has other collections, e.g. batch statistics; use GroupNorm or LayerNorm.
    """

    def init(key):
        variables = module.init({"params": key}, jnp.zeros((1, *input_shape), dtype), False)
        others = set(variables) - {"params"}
        if others:
            raise ValueError(
                f"the model keeps {sorted(others)} beside its parameters, which federated averaging does not know how to "
                "average; use GroupNorm or LayerNorm instead of BatchNorm"
            )
        return variables["params"]

    def apply(params, inputs, key=None):
        rngs = None if key is None else {"dropout": key}
        return module.apply({"params": params}, inputs, key is not None, rngs=rngs)

    return Model(init, apply)
