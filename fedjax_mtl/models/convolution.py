"""A convolution that stays fast when every client has its own weights."""

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fedjax_mtl.core.checks import InputError


def patches(inputs: jax.Array, kernel_size: tuple[int, int], strides: tuple[int, int]) -> jax.Array:
    """Returns the windows of a convolution without padding, as shifted slices.

    Args:
        inputs: ``[batch, h, w, c]``.
        kernel_size: height and width of the kernel, kh and kw.
        strides: of the height and of the width.

    Returns:
        The windows, ``[batch, h', w', kh * kw * c]``.
    """
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
    """Returns ``windows @ kernel``, ``[..., k], [k, features] -> [..., features]``.

    The gradient of the kernel is computed in the order that is fast on CPUs: of the two ways to
    contract over the (many) windows, XLA's CPU backend is nearly twice as fast with the few
    features on the left.
    """
    return windows @ kernel


@patch_product.defjvp
def _patch_product_jvp(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    windows, kernel = primals
    windows_dot, kernel_dot = tangents
    # The transpose of this, which is what reverse mode runs, contracts (features, windows) with
    # (windows, k).
    flat = windows.reshape(-1, windows.shape[-1])
    by_feature = jax.lax.dot_general(kernel_dot.T, flat, (((1,), (1,)), ((), ())))
    outputs_dot = by_feature.T.reshape(*windows.shape[:-1], -1)
    return windows @ kernel, windows_dot @ kernel + outputs_dot


# Winograd's minimal filtering F(4, 3): four outputs of a three-tap filter, from six inputs, with
# six products in place of twelve.
# outputs = _OUTPUTS @ ((_INPUTS @ six inputs) * (_TAPS @ three taps)); Lavin and Gray,
# arXiv 1509.09308, section 4.2.
_INPUTS = np.array(
    [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ]
)
_TAPS = np.array([[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]]) / 24
_OUTPUTS = np.array(
    [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]
)


def _combine(coefficients: np.ndarray, terms: Sequence[jax.Array]) -> jax.Array:
    """Returns the weighted sum of the terms, without those of weight 0.

    These are a few elementwise operations, which fuse.
    """
    pairs = zip(coefficients.tolist(), terms, strict=True)
    return functools.reduce(jnp.add, (t if c == 1 else c * t for c, t in pairs if c != 0))


def minimal_filtering(inputs: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolves with a 3 x 3 kernel by F(4, 3) over the height, without padding and strides.

    It takes half the products of the direct form, and half the memory of its patches. Over the
    width it is shifted slices still: there a transformation would be strided. Rounding errors are
    about three times those of the direct form.

    Args:
        inputs: ``[batch, h, w, c]``.
        kernel: ``[3, 3, c, features]``.

    Returns:
        The outputs, ``[batch, h - 2, w - 2, features]``.
    """
    height, width = inputs.shape[1] - 2, inputs.shape[2] - 2
    channels, features = kernel.shape[2:]
    tiles = -(-height // 4)
    inputs = jnp.pad(inputs, ((0, 0), (0, 4 * tiles - height), (0, 0), (0, 0)))
    rows = [inputs[:, i : i + 4 * tiles - 3 : 4] for i in range(6)]
    taps = list(kernel.reshape(3, 3 * channels, features))
    products = [
        patch_product(patches(_combine(of_inputs, rows), (1, 3), (1, 1)), _combine(of_taps, taps))
        for of_inputs, of_taps in zip(_INPUTS, _TAPS, strict=True)
    ]
    outputs = jnp.stack([_combine(of_products, products) for of_products in _OUTPUTS], axis=2)
    return outputs.reshape(inputs.shape[0], 4 * tiles, width, features)[:, :height]


# With fewer input channels the products are too small to be worth transforming for.
_MINIMAL_FILTERING_CHANNELS = 16


def _filters_minimally(size: tuple[int, int], strides: tuple[int, int], inputs: jax.Array) -> bool:
    return (
        size == (3, 3)
        and strides == (1, 1)
        and inputs.shape[-1] >= _MINIMAL_FILTERING_CHANNELS
        and inputs.dtype in (jnp.float32, jnp.float64)
        and jax.default_backend() == "cpu"
    )


class PatchConv(nn.Module):
    """A 2-d convolution as shifted slices and one matrix product.

    It is a drop-in for ``flax.linen.Conv``, with the same parameters. Under ``vmap`` over weights a
    stock convolution becomes a grouped one, and its weight gradient inside a loop is 100 times too
    slow on XLA's CPU backend (jax-ml/jax issue 12868); this one becomes a batched matrix product.
    On CPUs 3 x 3 kernels without strides are :func:`minimal_filtering`.

    Attributes:
        features: output channels.
        kernel_size: height and width of the kernel.
        strides: one int, or one for the height and one for the width.
        padding: ``SAME`` or ``VALID``.
        use_bias: add a bias.
        kernel_init: initialiser of the kernel.
        bias_init: initialiser of the bias.
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
        """Convolves, ``[batch, h, w, c] -> [batch, h', w', features]``."""
        if len(self.kernel_size) != 2:
            raise InputError(
                f"PatchConv is two-dimensional, got kernel_size {tuple(self.kernel_size)}"
            )
        size = self.kernel_size[0], self.kernel_size[1]
        if self.padding not in ("SAME", "VALID"):
            raise InputError(f"padding must be 'SAME' or 'VALID', got {self.padding!r}")
        down, right = (self.strides,) * 2 if isinstance(self.strides, int) else self.strides
        strides = down, right
        channels = inputs.shape[-1]
        kernel = self.param("kernel", self.kernel_init, (*size, channels, self.features))
        if self.padding == "SAME":
            pads = jax.lax.padtype_to_pads(inputs.shape[1:3], size, strides, "SAME")
            inputs = jnp.pad(inputs, ((0, 0), *pads, (0, 0)))
        if _filters_minimally(size, strides, inputs):
            outputs = minimal_filtering(inputs, kernel)
        else:
            windows = patches(inputs, size, strides)
            outputs = patch_product(windows, kernel.reshape(-1, self.features))
        if self.use_bias:
            outputs = outputs + self.param("bias", self.bias_init, (self.features,))
        return outputs


def max_pool(inputs: jax.Array, size: int) -> jax.Array:
    """Pools non-overlapping windows by their maximum; a remainder is dropped.

    It takes maxima of strided slices, which are several times faster than ``reduce_window`` on
    CPUs, forward and backward. Among equal maxima the gradient is shared.

    Args:
        inputs: ``[batch, h, w, c]``.
        size: height and width of a window.

    Returns:
        The maxima, ``[batch, h // size, w // size, c]``.
    """
    height, width = inputs.shape[1] // size * size, inputs.shape[2] // size * size
    slices = [inputs[:, i:height:size, j:width:size] for i in range(size) for j in range(size)]
    return functools.reduce(jnp.maximum, slices)
