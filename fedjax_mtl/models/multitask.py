"""Small dense networks cut into a shared body and heads, for clients with tasks of their own."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fedjax_mtl.core.model import Model
from fedjax_mtl.models.linen import from_flax

PyTree = Any


class Body(nn.Module):
    """Dense layers ``dense_0``, ``dense_1``, ... with ReLU.

    Weights start as N(0, gain^2 / fan_in), biases as 0.

    Attributes:
        hidden: widths of the layers.
        gain: of the initial weights.
    """

    hidden: Sequence[int]
    gain: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.initializers.variance_scaling(self.gain**2, "fan_in", "normal")
        for index, width in enumerate(self.hidden):
            x = nn.relu(nn.Dense(width, kernel_init=init, name=f"dense_{index}")(x))
        return x


class BodyAndHead(nn.Module):
    """A body ``encoder`` and a linear head ``decoder``.

    Attributes:
        hidden: widths of the body's layers.
        outputs: of the head.
        gain: of the body's initial weights.
        head_scale: standard deviation of the head's initial weights.
    """

    hidden: Sequence[int]
    outputs: int
    gain: float
    head_scale: float

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        del train
        x = Body(self.hidden, self.gain, name="encoder")(x)
        return nn.Dense(
            self.outputs, kernel_init=nn.initializers.normal(self.head_scale), name="decoder"
        )(x)


def body_and_head(
    features: int,
    outputs: int,
    hidden: Sequence[int] = (64, 32),
    *,
    gain: float = 1.4,
    head_scale: float = 0.1,
) -> Model:
    """Returns a body and a linear head, ``[batch, features] -> [batch, outputs]``.

    Its parameters are ``encoder/dense_<i>`` and ``decoder``.

    Args:
        features: values of an example.
        outputs: of the head.
        hidden: widths of the body's layers.
        gain: the body's weights start as N(0, gain^2 / fan_in).
        head_scale: the head's weights start as N(0, head_scale^2).
    """
    return from_flax(BodyAndHead(tuple(hidden), outputs, gain, head_scale), (features,))


def many_heads(
    features: int, outputs: int, num_heads: int, hidden: Sequence[int] = (64, 48)
) -> Model:
    """Returns one model with a linear head for each task, of which an example picks its own.

    Inputs are ``{"features": [batch, features], "head": int [batch]}``. Parameters are ``encoder``
    and ``heads`` (kernel ``[heads, width, outputs]``). All heads are in every client's parameters;
    the gradient of those it does not use is zero.

    Args:
        features: values of an example.
        outputs: of every head.
        num_heads: how many heads.
        hidden: widths of the body's layers.
    """
    body = Body(tuple(hidden), 2**0.5)

    def init(key: jax.Array) -> PyTree:
        body_key, head_key = jax.random.split(key)
        width = hidden[-1]
        kernel = jax.random.normal(head_key, (num_heads, width, outputs)) / width**0.5
        return {
            "encoder": body.init(body_key, jnp.zeros((1, features)))["params"],
            "heads": {"kernel": kernel, "bias": jnp.zeros((num_heads, outputs))},
        }

    def apply(params: PyTree, inputs: PyTree, key: jax.Array | None = None) -> jax.Array:
        del key
        hidden_values = body.apply({"params": params["encoder"]}, inputs["features"])
        own = jax.tree.map(lambda leaf: leaf[inputs["head"]], params["heads"])
        return jnp.einsum("bw,bwo->bo", hidden_values, own["kernel"]) + own["bias"]

    return Model(init, apply)
