"""The networks of the federated benchmarks; parameters are split into ``encoder`` and ``decoder``.

They start as PyTorch's do, from U(-1/sqrt(fan_in), 1/sqrt(fan_in)) for weights and biases, as the
papers' released code does.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fedjax_mtl.core.model import Model
from fedjax_mtl.models.convolution import PatchConv, max_pool
from fedjax_mtl.models.dense_layer import Dense
from fedjax_mtl.models.linen import from_flax


def _uniform_fan_in(fan_in: int) -> nn.initializers.Initializer:
    bound = 1.0 / max(fan_in, 1) ** 0.5
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(
        key, shape, dtype, -bound, bound
    )


def _torch_kwargs(fan_in: int) -> dict[str, Any]:
    """Returns the initialisers that PyTorch uses for dense and convolution layers."""
    return {"kernel_init": _uniform_fan_in(fan_in), "bias_init": _uniform_fan_in(fan_in)}


class _Body(nn.Module):
    """The hidden dense layers of an MLP, each followed by a ReLU."""

    hidden: Sequence[int]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for width in self.hidden:
            x = nn.relu(Dense(width, **_torch_kwargs(x.shape[-1]))(x))
        return x


class Linear(nn.Module):
    """One dense layer; FedEM's model for its synthetic data (one logit).

    Attributes:
        outputs: of the layer.
    """

    outputs: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        del train
        x = x.reshape(x.shape[0], -1)
        return Dense(self.outputs, name="decoder", **_torch_kwargs(x.shape[-1]))(x)


class MLP(nn.Module):
    """Dense layers with ReLU.

    Attributes:
        hidden: widths of the hidden layers.
        outputs: of the last layer.
    """

    hidden: Sequence[int]
    outputs: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        del train
        x = _Body(self.hidden, name="encoder")(x.reshape(x.shape[0], -1))
        return Dense(self.outputs, name="decoder", **_torch_kwargs(x.shape[-1]))(x)


class _ConvBody(nn.Module):
    """Two convolutions with ReLU and max pooling, then a dense layer."""

    channels: Sequence[int]
    kernel: int
    pools: Sequence[bool]
    hidden: int
    conv: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for features, pool in zip(self.channels, self.pools, strict=True):
            layer = self.conv(
                features,
                (self.kernel, self.kernel),
                padding="VALID",
                **_torch_kwargs(self.kernel**2 * x.shape[-1]),
            )
            x = layer(x)
            # ReLU and max commute; on the pooled map it is a quarter of the work.
            x = nn.relu(max_pool(x, 2) if pool else x)
        x = x.reshape(x.shape[0], -1)
        return nn.relu(Dense(self.hidden, **_torch_kwargs(x.shape[-1]))(x))


class TwoLayerCNN(nn.Module):
    """Two valid convolutions, pooling, a dense layer and a decoder.

    The defaults are FedEM's FemnistCNN: 5x5 convolutions of 32 and 64 channels, each pooled, and a
    dense layer of 2048 (2,278,334 parameters on 28x28x1 inputs and 62 classes).

    Attributes:
        outputs: of the decoder.
        channels: of the two convolutions.
        kernel: height and width of the convolutions.
        pools: whether each convolution is pooled.
        hidden: width of the dense layer.
        conv: the class of the convolutions. It can be ``flax.linen.Conv``: parameters are the same.
    """

    outputs: int
    channels: Sequence[int] = (32, 64)
    kernel: int = 5
    pools: Sequence[bool] = (True, True)
    hidden: int = 2048
    conv: Any = PatchConv

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        del train
        body = _ConvBody(
            self.channels, self.kernel, self.pools, self.hidden, self.conv, name="encoder"
        )
        x = body(x)
        return Dense(self.outputs, name="decoder", **_torch_kwargs(x.shape[-1]))(x)


class _RecurrentBody(nn.Module):
    """An embedding of characters, then LSTM layers."""

    vocabulary: int
    embedding: int
    hidden: int
    layers: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        embed = nn.Embed(
            self.vocabulary, self.embedding, embedding_init=nn.initializers.normal(1.0)
        )
        values: Any = embed(x.astype(jnp.int32))
        for _ in range(self.layers):
            # PyTorch draws all LSTM weights, those of the inputs too, from U(+-1/sqrt(hidden)).
            weights = _uniform_fan_in(self.hidden)
            cell = nn.OptimizedLSTMCell(
                self.hidden, kernel_init=weights, recurrent_kernel_init=weights, bias_init=weights
            )
            values = nn.RNN(cell)(values)
        return values


class CharLSTM(nn.Module):
    """A next-character model: embedding, LSTM layers, a dense layer at every position.

    This is FedEM's Shakespeare model. It has one bias a gate where PyTorch has two that add up:
    823,172 parameters against 825,220, the same functions.

    Attributes:
        vocabulary: how many different characters there are.
        embedding: width of a character's embedding.
        hidden: width of an LSTM layer.
        layers: how many LSTM layers.
    """

    vocabulary: int = 100
    embedding: int = 8
    hidden: int = 256
    layers: int = 2

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Returns next-character logits, int ``[batch, length] -> [batch, length, vocabulary]``."""
        del train
        body = _RecurrentBody(
            self.vocabulary, self.embedding, self.hidden, self.layers, name="encoder"
        )
        x = body(x)
        return Dense(self.vocabulary, name="decoder", **_torch_kwargs(x.shape[-1]))(x)


def linear(input_shape: tuple[int, ...], outputs: int) -> Model:
    """Returns a linear model of flattened inputs."""
    return from_flax(Linear(outputs), input_shape)


def mlp(input_shape: tuple[int, ...], outputs: int, hidden: Sequence[int] = (64,)) -> Model:
    """Returns a multi-layer perceptron of flattened inputs.

    Args:
        input_shape: shape of one example.
        outputs: of the last layer.
        hidden: widths of the hidden layers.
    """
    return from_flax(MLP(tuple(hidden), outputs), input_shape)


def cnn(
    input_shape: tuple[int, ...],
    outputs: int,
    *,
    channels: Sequence[int] = (32, 64),
    kernel: int = 5,
    pools: Sequence[bool] = (True, True),
    hidden: int = 2048,
    conv: Any = PatchConv,
) -> Model:
    """Returns a :class:`TwoLayerCNN`.

    Args:
        input_shape: height, width, channels.
        outputs: of the decoder.
        channels: of the two convolutions.
        kernel: height and width of the convolutions.
        pools: whether each convolution is pooled.
        hidden: width of the dense layer.
        conv: the class of the convolutions, ``PatchConv`` or ``flax.linen.Conv``.
    """
    return from_flax(TwoLayerCNN(outputs, channels, kernel, pools, hidden, conv), input_shape)


def lstm(
    length: int,
    vocabulary: int = 100,
    *,
    embedding: int = 8,
    hidden: int = 256,
    layers: int = 2,
) -> Model:
    """Returns a :class:`CharLSTM`.

    Args:
        length: characters in a sequence.
        vocabulary: how many different characters there are.
        embedding: width of a character's embedding.
        hidden: width of an LSTM layer.
        layers: how many LSTM layers.
    """
    return from_flax(CharLSTM(vocabulary, embedding, hidden, layers), (length,), jnp.int32)
