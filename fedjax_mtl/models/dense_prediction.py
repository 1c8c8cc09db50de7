"""Encoders and decoders of dense prediction: a decoder for each task, or one that knows the task.

These are the models of FMTL-Bench (arXiv 2402.12876, released code) at the sizes that train on a
CPU. Parameters are ``encoder`` and ``decoders/<task>``, or ``encoder``, ``decoder`` and
``task_embedding``, so that a path predicate says what is shared.
"""

from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fedjax_mtl.core.checks import InputError
from fedjax_mtl.core.model import Model
from fedjax_mtl.models.convolution import PatchConv
from fedjax_mtl.models.linen import from_flax


class DenseSize(NamedTuple):
    """The size of a model of dense prediction.

    Attributes:
        encoder: channels of the encoder's maps, at strides 2, 4, 8, ...
        decoder: channels of the decoder at the same strides.
        embedding_layers: how many layers the task embedding has.
        embedding_width: how wide the task embedding is.
    """

    encoder: tuple[int, ...]
    decoder: tuple[int, ...]
    embedding_layers: int
    embedding_width: int


SIZES = {
    "tiny": DenseSize((8, 16, 32), (8, 16, 32), 2, 20),
    "small": DenseSize((8, 8, 16, 32, 64), (8, 16, 32, 32, 64), 4, 40),
}


def _norm(groups: int, name: str) -> nn.GroupNorm:
    return nn.GroupNorm(num_groups=groups, epsilon=1e-5, name=name)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with a projected shortcut, at half the resolution.

    The shapes are ``[batch, h, w, c] -> [batch, h / 2, w / 2, features]``.

    Attributes:
        features: output channels.
    """

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def conv(size: int, stride: int, name: str) -> PatchConv:
            return PatchConv(self.features, (size, size), stride, use_bias=False, name=name)

        groups = min(8, self.features)
        shortcut = _norm(groups, "norm_shortcut")(conv(1, 2, "shortcut")(x))
        y = nn.relu(_norm(groups, "norm_0")(conv(3, 2, "conv_0")(x)))
        y = _norm(groups, "norm_1")(conv(3, 1, "conv_1")(y))
        return nn.relu(y + shortcut)


class ConvEncoder(nn.Module):
    """A stem and residual blocks, which give maps at strides 2, 4, 8, ...

    Map i of ``[batch, h, w, 3]`` has the shape ``[batch, h / 2^i, w / 2^i, channels_i]``, with i
    from 1.

    Attributes:
        channels: of the maps.
    """

    channels: Sequence[int]

    @nn.compact
    def __call__(self, images: jax.Array) -> list[jax.Array]:
        x = PatchConv(self.channels[0], (3, 3), 2, use_bias=False, name="stem")(images)
        maps = [nn.relu(_norm(min(8, self.channels[0]), "norm")(x))]
        for index, features in enumerate(self.channels[1:]):
            maps.append(ResidualBlock(features, name=f"block_{index}")(maps[-1]))
        return maps


def _interpolation(size: int, target: int) -> np.ndarray:
    """Returns linear interpolation with aligned corners as a matrix, ``[target, size]``."""
    place = np.linspace(0, size - 1, target)
    low = np.minimum(np.floor(place).astype(int), max(size - 2, 0))
    share = place - low
    matrix = np.zeros((target, size), np.float32)
    matrix[np.arange(target), low] += 1 - share
    matrix[np.arange(target), np.minimum(low + 1, size - 1)] += share
    return matrix


def resize_bilinear(x: jax.Array, height: int, width: int) -> jax.Array:
    """Resizes bilinearly with aligned corners, ``[batch, h, w, c] -> [batch, height, width, c]``.

    It does so by two matrix products.
    """
    rows, columns = _interpolation(x.shape[1], height), _interpolation(x.shape[2], width)
    x = jnp.einsum("Hh,bhwc->bHwc", rows.astype(x.dtype), x)
    return jnp.einsum("Ww,bhwc->bhWc", columns.astype(x.dtype), x)


def instance_norm(x: jax.Array, epsilon: float = 1e-5) -> jax.Array:
    """Scales every channel of every image to mean 0 and (biased) variance 1."""
    mean = jnp.mean(x, axis=(1, 2), keepdims=True)
    variance = jnp.mean(jnp.square(x - mean), axis=(1, 2), keepdims=True)
    return (x - mean) * jax.lax.rsqrt(variance + epsilon)


class ConvBlock(nn.Module):
    """Convolution, instance norm, scale and shift, activation.

    With a task embedding ``[width]``, scale and shift are linear in it, and the activation is
    leaky.

    Attributes:
        features: output channels.
        kernel: height and width of the convolution.
    """

    features: int
    kernel: int

    @nn.compact
    def __call__(self, x: jax.Array, embedding: jax.Array | None) -> jax.Array:
        x = instance_norm(PatchConv(self.features, (self.kernel, self.kernel), name="conv")(x))
        if embedding is None:
            scale = self.param("scale", nn.initializers.ones_init(), (self.features,))
            shift = self.param("shift", nn.initializers.zeros_init(), (self.features,))
            return nn.relu(x * scale + shift)
        scale = nn.Dense(self.features, bias_init=nn.initializers.ones_init(), name="scale")(
            embedding
        )
        shift = nn.Dense(self.features, name="shift")(embedding)
        return nn.leaky_relu(x * scale + shift, 0.01)


class Decoder(nn.Module):
    """A U-Net-like decoder, from maps at strides 2, 4, ... to full resolution.

    The outputs are ``[batch, h, w, outputs]``.

    Attributes:
        channels: of the decoder at each stride.
        outputs: channels of the outputs.
    """

    channels: Sequence[int]
    outputs: int

    @nn.compact
    def __call__(self, maps: list[jax.Array], embedding: jax.Array | None = None) -> jax.Array:
        skips = [
            ConvBlock(m.shape[-1], 1, name=f"skip_{i}")(m, embedding) for i, m in enumerate(maps)
        ]
        x = skips[-1]
        for index in reversed(range(len(maps))):
            x = resize_bilinear(x, 2 * x.shape[1], 2 * x.shape[2])
            if index:
                x = jnp.concatenate([x, skips[index - 1]], axis=-1)
            x = ConvBlock(self.channels[index], 3, name=f"block_{index}")(x, embedding)
        return PatchConv(self.outputs, (1, 1), name="last")(x)


def unit_vectors(x: jax.Array) -> jax.Array:
    """Scales vectors along the last axis to length 1."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), 1e-24))


def _finish(task: str, x: jax.Array) -> jax.Array:
    return unit_vectors(x) if task == "normals" else x


class Decoders(nn.Module):
    """One decoder for each task.

    Attributes:
        channels: of every decoder at each stride.
        tasks: pairs of a task and its output channels.
    """

    channels: Sequence[int]
    tasks: tuple[tuple[str, int], ...]

    @nn.compact
    def __call__(self, maps: list[jax.Array]) -> dict[str, jax.Array]:
        return {
            task: _finish(task, Decoder(self.channels, n, name=task)(maps))
            for task, n in self.tasks
        }


class MultiDecoder(nn.Module):
    """An encoder, and a decoder for each task.

    The shapes are ``[batch, h, w, 3] -> {task: [batch, h, w, channels]}``.

    Attributes:
        size: of encoder and decoders.
        tasks: pairs of a task and its output channels.
    """

    size: DenseSize
    tasks: tuple[tuple[str, int], ...]

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> dict[str, jax.Array]:
        del train
        maps = ConvEncoder(self.size.encoder, name="encoder")(images)
        return Decoders(self.size.decoder, self.tasks, name="decoders")(maps)


def pool_channels(x: jax.Array, bins: int) -> jax.Array:
    """Takes means over ``bins`` ranges of channels, ``[..., n] -> [..., bins]``.

    The ranges overlap unless ``bins`` divides the number of channels.
    """
    n = x.shape[-1]
    ranges = [(i * n // bins, -(-(i + 1) * n // bins)) for i in range(bins)]
    return jnp.stack([jnp.mean(x[..., a:b], axis=-1) for a, b in ranges], axis=-1)


def pixel_norm(x: jax.Array) -> jax.Array:
    """Divides by the root mean square over the last axis."""
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-8)


class TaskEmbedding(nn.Module):
    """The embedding of a task's fixed code, ``[width] -> [width]``: pixel norm and an MLP.

    Attributes:
        layers: of the MLP.
    """

    layers: int

    @nn.compact
    def __call__(self, code: jax.Array) -> jax.Array:
        x = pixel_norm(code)
        for index in range(self.layers):
            x = nn.leaky_relu(nn.Dense(code.shape[-1], name=f"dense_{index}")(x), 0.2)
        return x


class TaskConditioned(nn.Module):
    """An encoder and one decoder for all tasks, conditioned on the task by scale and shift.

    The shapes are ``[batch, h, w, 3] -> {task: [batch, h, w, channels]}``. A task's code is a block
    of ones among zeros.

    Attributes:
        size: of encoder, decoder and task embedding.
        tasks: pairs of a task and its output channels.
        outputs: maps of the decoder, which are pooled to a task's channels.
        code_blocks: the tasks among which the code is divided.
    """

    size: DenseSize
    tasks: tuple[tuple[str, int], ...]
    outputs: int
    code_blocks: tuple[str, ...]

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> dict[str, jax.Array]:
        del train
        maps = ConvEncoder(self.size.encoder, name="encoder")(images)
        embed = TaskEmbedding(self.size.embedding_layers, name="task_embedding")
        decode = Decoder(self.size.decoder, self.outputs, name="decoder")
        unit = self.size.embedding_width // len(self.code_blocks)
        results = {}
        for task, channels in self.tasks:
            first = unit * self.code_blocks.index(task)
            code = np.zeros(self.size.embedding_width, np.float32)
            code[first : first + unit] = 1
            x = decode(maps, embed(jnp.asarray(code)))
            results[task] = _finish(
                task, pool_channels(x, channels) if channels != self.outputs else x
            )
        return results


def _checked_size(size: str) -> DenseSize:
    if size not in SIZES:
        raise InputError(
            f"unknown size {size!r} of a dense model; expected one of {', '.join(SIZES)}"
        )
    return SIZES[size]


def multi_decoder(
    image_shape: tuple[int, int, int], tasks: dict[str, int], size: str = "small"
) -> Model:
    """Returns one encoder and a decoder for each task.

    Its parameters are ``encoder`` and ``decoders/<task>``.

    Args:
        image_shape: height, width and channels; height and width must be divisible by the deepest
            stride (tiny 8, small 32).
        tasks: output channels by task.
        size: ``tiny`` or ``small``.

    Raises:
        InputError: unknown size.
    """
    return from_flax(MultiDecoder(_checked_size(size), tuple(tasks.items())), image_shape)


def task_conditioned(
    image_shape: tuple[int, int, int],
    tasks: dict[str, int],
    size: str = "small",
    code_blocks: Sequence[str] = (),
) -> Model:
    """Returns one encoder and one decoder conditioned on the task.

    Its parameters are ``encoder``, ``decoder`` and ``task_embedding``.

    Args:
        image_shape: height, width and channels, as for :func:`multi_decoder`.
        tasks: output channels by task.
        size: ``tiny`` or ``small``.
        code_blocks: the tasks among which the code is divided, so that clients with different tasks
            mean the same by a block; default ``tasks``.

    Raises:
        InputError: unknown size, a task without a block, or more blocks than the embedding is wide.
    """
    chosen = _checked_size(size)
    blocks = tuple(code_blocks) or tuple(tasks)
    missing = [task for task in tasks if task not in blocks]
    if missing:
        raise InputError(f"task {missing[0]!r} has no block in code_blocks {blocks}")
    if chosen.embedding_width < len(blocks):
        raise InputError(
            f"{len(blocks)} tasks do not fit an embedding of width {chosen.embedding_width}"
        )
    outputs = {"tiny": 12, "small": 16}[size]
    module = TaskConditioned(chosen, tuple(tasks.items()), max(outputs, *tasks.values()), blocks)
    return from_flax(module, image_shape)
