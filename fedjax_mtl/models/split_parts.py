"""The parts of a split model for dense prediction: patch embedding, trunks, task adaptation with head.

Shapes follow FedBone's description (arXiv 2306.17465) with the decoder of DeMT (arXiv 2301.03461) reduced to one task; BatchNorm is replaced by GroupNorm.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from fedjax_mtl.core.model import Part
from fedjax_mtl.models.convolution import PatchConv
from fedjax_mtl.models.dense_prediction import resize_bilinear


def part_from_flax(module: nn.Module) -> Part:
    """A part whose module takes its inputs alone."""

    def init(key, inputs):
        zeros = jax.tree.map(lambda x: jnp.zeros((1, *x.shape[1:]), x.dtype), inputs)
        return module.init(key, zeros)["params"]

    return Part(init, lambda params, inputs: module.apply({"params": params}, inputs))


class PatchEmbedding(nn.Module):
    """Non-overlapping patches, projected and normalised: ``[batch, h, w, c] -> [batch, h / patch, w / patch, width]``."""

    patch: int
    width: int

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        size = (self.patch, self.patch)
        x = PatchConv(self.width, size, self.patch, padding="VALID", name="projection")(images)
        return nn.LayerNorm(name="norm")(x)


class AttentionBlock(nn.Module):
    """Pre-norm self-attention and MLP over tokens, ``[batch, tokens, width]``."""

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
    """A vision transformer without its embedding: learned positions and ``depth`` blocks; ``[batch, h, w, width]`` in and out."""

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
    """A hierarchical trunk: a stage of residual convolutions for each of ``channels``, each at half the resolution of the one before.

    ``[batch, h, w, c]`` to the list of all stages' maps, as a Swin transformer gives its four.
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
    """A 3x3 convolution, stride 1, same size, whose taps are displaced (Dai et al., arXiv 1703.06211, equation 2).

    Args:
        images: ``[batch, h, w, c]``. kernel: ``[3, 3, c, features]``. bias: ``[features]``.
        offsets: ``[batch, h, w, 9, 2]``, ``(dy, dx)`` in pixels; tap ``3 * row + column`` of the kernel.

    Sampled bilinearly; outside the image is 0. Returns ``[batch, h, w, features]``.
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

    def corner(y, x):
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
    """:func:`deformable_convolution` with offsets from a 3x3 convolution that starts at zero, so it starts as an ordinary convolution."""

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
    """The client's upper part: channel reduction, point-wise and deformable convolution, self-attention, head; to full resolution.

    ``[batch, h, w, c]`` or a list of such maps of falling resolution to ``[batch, height, width, outputs]``. With ``classify`` the mean over tokens and a linear
    layer instead of the dense head, ``[batch, outputs]``.
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
        """Self-attention over tokens, then attention of the tokens to its result."""
        batch, height, width, channels = x.shape
        tokens = x.reshape(batch, height * width, channels)
        attend = lambda name: nn.MultiHeadDotProductAttention(self.heads, name=name)  # noqa: E731
        told = nn.LayerNorm(name="self_norm")(
            nn.Dense(channels, name="self_out")(attend("self")(tokens, tokens))
        )
        asked = attend("query")(tokens, told)
        tokens = tokens + nn.LayerNorm(name="query_norm")(
            nn.Dense(channels, name="query_out")(asked)
        )
        return tokens.reshape(x.shape)


def patch_embedding(patch: int, width: int) -> Part:
    """The clients' lower part."""
    return part_from_flax(PatchEmbedding(patch, width))


def vit_trunk(depth: int, heads: int) -> Part:
    """A transformer trunk; it keeps the shape of the embeddings."""
    return part_from_flax(ViTTrunk(depth, heads))


def conv_trunk(channels: Sequence[int]) -> Part:
    """A hierarchical convolutional trunk; channels divisible by 8."""
    return part_from_flax(ConvTrunk(tuple(channels)))


def task_adaptation(width: int, outputs: int, image_size: tuple[int, int], **settings) -> Part:
    """The clients' upper part; see :class:`TaskAdaptation`."""
    return part_from_flax(TaskAdaptation(width, outputs, image_size, **settings))
