"""From flax (Linen) modules to models: the one place where the library meets flax's variables."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fedjax_mtl.core.checks import InputError
from fedjax_mtl.core.model import Model

PyTree = Any


def from_flax(module: nn.Module, input_shape: tuple[int, ...], dtype: Any = jnp.float32) -> Model:
    """Wraps a flax module as a model.

    Args:
        module: its ``__call__`` takes ``(inputs, train)``, and its only collection is ``params``.
        input_shape: shape of one example.
        dtype: of the inputs.

    Raises:
        InputError: (at init) the module has other collections, e.g. batch statistics; use GroupNorm
            or LayerNorm.
    """

    def init(key: jax.Array) -> PyTree:
        variables = module.init({"params": key}, jnp.zeros((1, *input_shape), dtype), False)
        others = set(variables) - {"params"}
        if others:
            raise InputError(
                f"the model keeps {sorted(others)} beside its parameters, which federated "
                "averaging does not know how to average; use GroupNorm or LayerNorm instead of "
                "BatchNorm"
            )
        return variables["params"]

    def apply(params: PyTree, inputs: PyTree, key: jax.Array | None = None) -> PyTree:
        rngs = None if key is None else {"dropout": key}
        return module.apply({"params": params}, inputs, key is not None, rngs=rngs)

    return Model(init, apply)
