"""A convolution that stays fast when every client has its own weights."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp


def patches(inputs: jax.Array, kernel_size: tuple[int, int], strides: tuple[int, int]) -> jax.Array:
    """The windows of a convolution as shifted slices, ``[batch, h, w, c] -> [batch, h', w', kh * kw * c]``, without padding."""
    (kh, kw), (sh, sw) = kernel_size, strides
    height = (inputs.shape[1] - kh) // sh + 1
    width = (inputs.shape[2] - kw) // sw + 1
    slices = [
        inputs[:, i : i + sh * (height - 1) + 1 : sh, j : j + sw * (width - 1) + 1 : sw]
        for i in range(kh)
        for j in range(kw)
    ]
    return jnp.concatenate(slices, axis=-1)


class PatchConv(nn.Module):
    """A 2-d convolution as shifted slices and one matrix product; a drop-in for ``flax.linen.Conv``, with the same parameters.

    Under ``vmap`` over weights a stock convolution becomes a grouped one, and its weight gradient inside a loop is 100 times too slow on XLA's CPU
    backend (jax-ml/jax issue 12868); this one becomes a batched matrix product.

    Attributes:
        features: output channels. kernel_size: two ints. strides: an int or two. padding: ``SAME`` or ``VALID``. use_bias: add a bias.
    """

    features: int
    kernel_size: Sequence[int]
    strides: int | Sequence[int] = 1
    padding: str = "SAME"
    use_bias: bool = True
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
    bias_init: nn.initializers.Initializer = nn.initializers.zeros_init()

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """``[batch, h, w, c] -> [batch, h', w', features]``."""
        size = tuple(self.kernel_size)
        if len(size) != 2:
            raise ValueError(f"PatchConv is two-dimensional, got kernel_size {size}")
        if self.padding not in ("SAME", "VALID"):
            raise ValueError(f"padding must be 'SAME' or 'VALID', got {self.padding!r}")
        strides = (self.strides,) * 2 if isinstance(self.strides, int) else tuple(self.strides)
        channels = inputs.shape[-1]
        kernel = self.param("kernel", self.kernel_init, (*size, channels, self.features))
        if self.padding == "SAME":
            pads = jax.lax.padtype_to_pads(inputs.shape[1:3], size, strides, "SAME")
            inputs = jnp.pad(inputs, ((0, 0), *pads, (0, 0)))
        windows = patches(inputs, size, strides)
        outputs = windows @ kernel.reshape(-1, self.features)
        if self.use_bias:
            outputs = outputs + self.param("bias", self.bias_init, (self.features,))
        return outputs


def max_pool(inputs: jax.Array, size: int) -> jax.Array:
    """Non-overlapping max pooling by reshape, ``[batch, h, w, c] -> [batch, h // size, w // size, c]``; a remainder is dropped.

    A reduction over reshaped axes is several times faster than ``reduce_window`` on CPUs, forward and backward.
    """
    batch, height, width, channels = inputs.shape
    height, width = height // size, width // size
    cropped = inputs[:, : height * size, : width * size]
    return jnp.max(cropped.reshape(batch, height, size, width, size, channels), axis=(2, 4))
