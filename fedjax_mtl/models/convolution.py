"""A convolution that stays fast when every client has its own weights."""

import functools
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


@jax.custom_jvp
def patch_product(windows: jax.Array, kernel: jax.Array) -> jax.Array:
    """``windows @ kernel``, ``[..., k], [k, features] -> [..., features]``, with the kernel's gradient in the order that is fast on CPUs.

    Of the two ways to contract over the (many) windows, XLA's CPU backend is nearly twice as fast with the few features on the left.
    """
    return windows @ kernel


@patch_product.defjvp
def _patch_product_jvp(primals, tangents):
    windows, kernel = primals
    windows_dot, kernel_dot = tangents
    # The transpose of this, which is what reverse mode runs, contracts (features, windows) with (windows, k).
    flat = windows.reshape(-1, windows.shape[-1])
    by_feature = jax.lax.dot_general(kernel_dot.T, flat, (((1,), (1,)), ((), ())))
    outputs_dot = by_feature.T.reshape(*windows.shape[:-1], -1)
    return windows @ kernel, windows_dot @ kernel + outputs_dot


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
        outputs = patch_product(windows, kernel.reshape(-1, self.features))
        if self.use_bias:
            outputs = outputs + self.param("bias", self.bias_init, (self.features,))
        return outputs


def max_pool(inputs: jax.Array, size: int) -> jax.Array:
    """Non-overlapping max pooling, ``[batch, h, w, c] -> [batch, h // size, w // size, c]``; a remainder is dropped.

    As maxima of strided slices, which are several times faster than ``reduce_window`` on CPUs, forward and backward. Among equal maxima the
    gradient is shared.
    """
    height, width = inputs.shape[1] // size * size, inputs.shape[2] // size * size
    slices = [inputs[:, i:height:size, j:width:size] for i in range(size) for j in range(size)]
    return functools.reduce(jnp.maximum, slices)
