"""The parts of a split model for dense prediction: patch embedding, trunks, task adaptation.

Shapes follow FedBone's description (arXiv 2306.17465) with the decoder of DeMT (arXiv 2301.03461)
reduced to one task. BatchNorm is replaced by GroupNorm.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fedjax_mtl.core.model import Part
from fedjax_mtl.models.convolution import PatchConv
from fedjax_mtl.models.dense_prediction import resize_bilinear

PyTree = Any


def part_from_flax(module: nn.Module) -> Part:
    """Returns a part whose module takes its inputs alone."""

    def init(key: jax.Array, inputs: PyTree) -> PyTree:
        zeros = jax.tree.map(lambda x: jnp.zeros((1, *x.shape[1:]), x.dtype), inputs)
        return module.init(key, zeros)["params"]

    return Part(init, lambda params, inputs: module.apply({"params": params}, inputs))


class PatchEmbedding(nn.Module):
    """Non-overlapping patches, projected and normalised.

    The shapes are ``[batch, h, w, c] -> [batch, h / patch, w / patch, width]``.

    Attributes:
        patch: height and width of a patch.
        width: of the embedding.
    """

    patch: int
    width: int

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        size = (self.patch, self.patch)
        x = PatchConv(self.width, size, self.patch, padding="VALID", name="projection")(images)
        return nn.LayerNorm(name="norm")(x)


class AttentionBlock(nn.Module):
    """Pre-norm self-attention and MLP over tokens, ``[batch, tokens, width]``.

    Attributes:
        heads: of the attention.
        mlp_ratio: hidden units of the MLP for each channel.
    """

    heads: int
    mlp_ratio: int = 2

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = nn.LayerNorm(name="norm_0")(tokens)
        tokens = tokens + nn.MultiHeadDotProductAttention(self.heads, name="attention")(x, x)
        x = nn.LayerNorm(name="norm_1")(tokens)
        x = nn.gelu(nn.Dense(self.mlp_ratio * tokens.shape[-1], name="up")(x))
        return tokens + nn.Dense(tokens.shape[-1], name="down")(x)


class ViTTrunk(nn.Module):
    """A vision transformer without its embedding: learned positions and blocks.

    The shape is ``[batch, h, w, width]``, in and out.

    Attributes:
        depth: how many blocks.
        heads: of the attention.
    """

    depth: int
    heads: int

    @nn.compact
    def __call__(self, embeddings: jax.Array) -> jax.Array:
        batch, height, width, channels = embeddings.shape
        tokens = embeddings.reshape(batch, height * width, channels)
        positions = self.param(
            "positions", nn.initializers.normal(0.02), (height * width, channels)
        )
        tokens = tokens + positions
        for index in range(self.depth):
            tokens = AttentionBlock(self.heads, name=f"block_{index}")(tokens)
        return nn.LayerNorm(name="norm")(tokens).reshape(embeddings.shape)


class ConvTrunk(nn.Module):
    """A hierarchical trunk: stages of residual convolutions, each at half the resolution.

    It maps ``[batch, h, w, c]`` to the list of all stages' maps, as a Swin transformer gives its
    four. The first stage keeps the resolution.

    Attributes:
        channels: of each stage.
    """

    channels: Sequence[int]

    @nn.compact
    def __call__(self, embeddings: jax.Array) -> list[jax.Array]:
        x, maps = embeddings, []
        for index, features in enumerate(self.channels):
            if index:
                x = PatchConv(features, (2, 2), 2, padding="VALID", name=f"merge_{index}")(x)
            elif features != x.shape[-1]:
                x = PatchConv(features, (1, 1), name="widen")(x)
            y = nn.gelu(
                nn.GroupNorm(8, name=f"norm_{index}_0")(
                    PatchConv(features, (3, 3), name=f"conv_{index}_0")(x)
                )
            )
            y = nn.GroupNorm(8, name=f"norm_{index}_1")(
                PatchConv(features, (3, 3), name=f"conv_{index}_1")(y)
            )
            x = nn.gelu(x + y)
            maps.append(x)
        return maps


def deformable_convolution(
    images: jax.Array, kernel: jax.Array, bias: jax.Array, offsets: jax.Array
) -> jax.Array:
    """Convolves 3x3, stride 1, to the same size, with taps that are displaced.

    It samples bilinearly; outside the image is 0 (Dai et al., arXiv 1703.06211, equation 2).

    Args:
        images: ``[batch, h, w, c]``.
        kernel: ``[3, 3, c, features]``.
        bias: ``[features]``.
        offsets: ``[batch, h, w, 9, 2]``, ``(dy, dx)`` in pixels, for tap ``3 * row + column`` of
            the kernel.

    Returns:
        The outputs, ``[batch, h, w, features]``.
    """
    batch, height, width, channels = images.shape
    taps = jnp.stack(
        jnp.meshgrid(jnp.arange(-1, 2), jnp.arange(-1, 2), indexing="ij"), axis=-1
    ).reshape(9, 2)
    pixels = jnp.stack(jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij"), axis=-1)
    places = (pixels[:, :, None] + taps).astype(images.dtype) + offsets
    low = jnp.floor(places)
    share = places - low
    # One ring of zeros; whatever lies farther out is clipped into it.
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0))).reshape(batch, -1, channels)
    limit = jnp.array([height + 1, width + 1])

    def corner(y: int, x: int) -> jax.Array:
        at = jnp.clip(low.astype(jnp.int32) + jnp.array([y, x]) + 1, 0, limit)
        flat = (at[..., 0] * (width + 2) + at[..., 1]).reshape(batch, -1)
        values = jnp.take_along_axis(padded, flat[..., None], axis=1).reshape(
            *at.shape[:-1], channels
        )
        weight = jnp.abs(1 - y - share[..., 0]) * jnp.abs(1 - x - share[..., 1])
        return weight[..., None] * values

    sampled = corner(0, 0) + corner(0, 1) + corner(1, 0) + corner(1, 1)
    return (
        sampled.reshape(batch, height, width, 9 * channels) @ kernel.reshape(9 * channels, -1)
        + bias
    )


class DeformableConv(nn.Module):
    """A :func:`deformable_convolution` whose offsets come from a 3x3 convolution.

    That convolution starts at zero, so the layer starts as an ordinary convolution.

    Attributes:
        features: output channels.
    """

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        kernel = self.param(
            "kernel", nn.initializers.lecun_normal(), (3, 3, channels, self.features)
        )
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
        zero = nn.initializers.zeros_init()
        offsets = PatchConv(18, (3, 3), kernel_init=zero, bias_init=zero, name="offsets")(x)
        return deformable_convolution(x, kernel, bias, offsets.reshape(*x.shape[:3], 9, 2))


class TaskAdaptation(nn.Module):
    """The client's upper part, to full resolution.

    It is a channel reduction, point-wise and deformable convolutions, self-attention and a head. It
    maps ``[batch, h, w, c]``, or a list of such maps of falling resolution, to
    ``[batch, height, width, outputs]``.

    Attributes:
        width: channels after the reduction.
        outputs: of the head.
        image_size: height and width of the outputs.
        depth: how many pairs of a point-wise and a deformable convolution.
        heads: of the attention.
        head_width: channels inside the dense head.
        classify: in place of the dense head take the mean over tokens and a linear layer, which
            gives ``[batch, outputs]``.
    """

    width: int
    outputs: int
    image_size: tuple[int, int]
    depth: int = 1
    heads: int = 4
    head_width: int = 16
    classify: bool = False

    @nn.compact
    def __call__(self, features: jax.Array | list[jax.Array]) -> jax.Array:
        maps = features if isinstance(features, list) else [features]
        height, width = maps[0].shape[1:3]
        x = jnp.concatenate([resize_bilinear(m, height, width) for m in maps], axis=-1)
        x = nn.LayerNorm(name="reduce_norm")(nn.Dense(self.width, name="reduce")(x))
        groups = min(8, self.width)
        for index in range(self.depth):
            x = nn.GroupNorm(groups, name=f"point_norm_{index}")(
                nn.gelu(nn.Dense(self.width, name=f"point_{index}")(x))
            )
            y = nn.gelu(DeformableConv(self.width, name=f"deformable_{index}")(x))
            x = x + nn.GroupNorm(groups, name=f"deformable_norm_{index}")(y)
        x = self.interact(x)
        if self.classify:
            return nn.Dense(self.outputs, name="head")(jnp.mean(x, axis=(1, 2)))
        y = PatchConv(self.head_width, (3, 3), name="head_conv")(x)
        y = nn.relu(nn.GroupNorm(min(8, self.head_width), name="head_norm")(y))
        y = PatchConv(self.outputs, (1, 1), name="head")(y)
        return resize_bilinear(y, *self.image_size)

    def interact(self, x: jax.Array) -> jax.Array:
        """Applies self-attention over tokens, then attention of the tokens to its result."""
        batch, height, width, channels = x.shape
        tokens = x.reshape(batch, height * width, channels)

        def attend(name: str) -> nn.MultiHeadDotProductAttention:
            return nn.MultiHeadDotProductAttention(self.heads, name=name)

        told = nn.LayerNorm(name="self_norm")(
            nn.Dense(channels, name="self_out")(attend("self")(tokens, tokens))
        )
        asked = attend("query")(tokens, told)
        tokens = tokens + nn.LayerNorm(name="query_norm")(
            nn.Dense(channels, name="query_out")(asked)
        )
        return tokens.reshape(x.shape)


def patch_embedding(patch: int, width: int) -> Part:
    """Returns the clients' lower part, a :class:`PatchEmbedding`."""
    return part_from_flax(PatchEmbedding(patch, width))


def vit_trunk(depth: int, heads: int) -> Part:
    """Returns a transformer trunk, a :class:`ViTTrunk`; it keeps the shape of the embeddings."""
    return part_from_flax(ViTTrunk(depth, heads))


def conv_trunk(channels: Sequence[int]) -> Part:
    """Returns a hierarchical convolutional trunk, a :class:`ConvTrunk`; channels divisible by 8."""
    return part_from_flax(ConvTrunk(tuple(channels)))


def task_adaptation(
    width: int,
    outputs: int,
    image_size: tuple[int, int],
    *,
    depth: int = 1,
    heads: int = 4,
    head_width: int = 16,
    classify: bool = False,
) -> Part:
    """Returns the clients' upper part, a :class:`TaskAdaptation`.

    Args:
        width: channels after the reduction.
        outputs: of the head.
        image_size: height and width of the outputs.
        depth: how many pairs of a point-wise and a deformable convolution.
        heads: of the attention.
        head_width: channels inside the dense head.
        classify: one output an image in place of one a pixel.
    """
    module = TaskAdaptation(width, outputs, image_size, depth, heads, head_width, classify=classify)
    return part_from_flax(module)
