"""Layers of networks in plain numpy, written from their definitions.

Models are compared with them value by value.
"""

import jax
import numpy as np
from scipy.special import erf


def random_params(init, seed=0, scale=0.5):
    """Parameters of a model's shapes, all of them drawn, so that no bias is 0 and no scale is 1.

    Nothing is compiled.
    """
    shapes = jax.eval_shape(init, jax.random.key(0))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: scale * rng.normal(size=leaf.shape).astype(np.float32), shapes)


def draw(*shape, seed=1):
    """Standard normal inputs."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def relu(x):
    return np.maximum(x, 0)


def leaky_relu(x, slope):
    return np.where(x > 0, x, slope * x)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def gelu(x):
    """The exact GELU."""
    return x * (1 + erf(x / np.sqrt(2))) / 2


def gelu_tanh(x):
    """The usual approximation of the GELU (Hendrycks and Gimpel, arXiv 1606.08415)."""
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def softmax(x):
    powers = np.exp(x - x.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def dense(p, x):
    """``x k + b``, or ``x k`` where there is no bias."""
    return x @ np.asarray(p["kernel"]) + np.asarray(p.get("bias", 0))


def _same_pads(size, kernel, stride):
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def convolution(p, x, stride=1, padding="SAME"):
    """A 2-d convolution window by window, ``[batch, h, w, c] -> [batch, h', w', features]``."""
    kernel = np.asarray(p["kernel"], np.float64)
    high, wide = kernel.shape[:2]
    if padding == "SAME":
        pads = _same_pads(x.shape[1], high, stride), _same_pads(x.shape[2], wide, stride)
        x = np.pad(x, ((0, 0), *pads, (0, 0)))
    rows = range(0, x.shape[1] - high + 1, stride)
    columns = range(0, x.shape[2] - wide + 1, stride)
    windows = np.stack([[x[:, i : i + high, j : j + wide] for j in columns] for i in rows])
    outputs = np.einsum("ijbhwc,hwcf->bijf", windows, kernel)
    return outputs + np.asarray(p.get("bias", 0))


def max_pool(x, size):
    height, width = x.shape[1] // size, x.shape[2] // size
    blocks = x[:, : height * size, : width * size].reshape(
        x.shape[0], height, size, width, size, x.shape[3]
    )
    return blocks.max(axis=(2, 4))


def _standardised(x, axes, epsilon):
    mean = x.mean(axis=axes, keepdims=True)
    return (x - mean) / np.sqrt(np.square(x - mean).mean(axis=axes, keepdims=True) + epsilon)


def layer_norm(p, x, epsilon=1e-6):
    """Layer norm: mean 0 and variance 1 over the channels, then scale and bias.

    The epsilon is flax's.
    """
    return _standardised(x, (-1,), epsilon) * p["scale"] + np.asarray(p.get("bias", 0))


def group_norm(p, x, groups, epsilon=1e-6):
    """Group norm of ``[batch, h, w, c]``.

    It is layer norm over all pixels of each group of neighbouring channels.
    """
    batch, height, width, channels = x.shape
    grouped = x.reshape(batch, height, width, groups, channels // groups)
    return _standardised(grouped, (1, 2, 4), epsilon).reshape(x.shape) * p["scale"] + p["bias"]


def instance_norm(x, epsilon=1e-5):
    return _standardised(x, (1, 2), epsilon)


def resize(x, height, width):
    """Bilinear resizing with aligned corners, pixel by pixel."""
    outputs = np.zeros((x.shape[0], height, width, x.shape[3]))
    rows, columns = (
        np.linspace(0, size - 1, target)
        for size, target in ((x.shape[1], height), (x.shape[2], width))
    )
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            top, left = int(np.floor(row)), int(np.floor(column))
            bottom, right = min(top + 1, x.shape[1] - 1), min(left + 1, x.shape[2] - 1)
            down, over = row - top, column - left
            above = (1 - over) * x[:, top, left] + over * x[:, top, right]
            below = (1 - over) * x[:, bottom, left] + over * x[:, bottom, right]
            outputs[:, i, j] = (1 - down) * above + down * below
    return outputs


def attention(p, asking, told):
    """Dot-product attention with flax's parameters, ``[batch, tokens, width]``."""

    def heads(name, x):
        return np.einsum("btw,whc->bthc", x, p[name]["kernel"]) + p[name]["bias"]

    query, key, value = heads("query", asking), heads("key", told), heads("value", told)
    scores = np.einsum("bqhc,bkhc->bhqk", query, key) / np.sqrt(query.shape[-1])
    mixed = np.einsum("bhqk,bkhc->bqhc", softmax(scores), value)
    return np.einsum("bqhc,hcw->bqw", mixed, p["out"]["kernel"]) + p["out"]["bias"]
