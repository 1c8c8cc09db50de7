"""A dense layer that is fast for the small batches of federated clients on CPUs."""

import flax.linen as nn
import jax
import jax.numpy as jnp

# Up to this many examples the weight gradient is a fused sum of outer products; beyond, a matrix
# product wins.
_SMALL_BATCH = 20


@jax.custom_jvp
def small_batch_product(inputs: jax.Array, kernel: jax.Array) -> jax.Array:
    """Returns ``inputs @ kernel``, ``[batch, in], [in, out] -> [batch, out]``.

    The gradient of the kernel is a sum of outer products. With weights of its own for every client,
    that gradient is a batched matrix product whose inner dimension is the batch size. XLA's CPU
    backend is slow at those (half the time of a local step of a small network), and writes the
    gradient to memory for the optimiser to read. A sum of ten outer products is elementwise: it
    fuses with the optimiser's update.
    """
    return inputs @ kernel


@small_batch_product.defjvp
def _small_batch_product_jvp(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    inputs, kernel = primals
    inputs_dot, kernel_dot = tangents
    # Written so that its transpose, which is what reverse mode runs, is the sum of outer products.
    rows = [jnp.sum(row[:, None] * kernel_dot, axis=0) for row in inputs]
    return inputs @ kernel, inputs_dot @ kernel + jnp.stack(rows)


class Dense(nn.Module):
    """A dense layer with the parameters of ``flax.linen.Dense``.

    On CPUs it uses :func:`small_batch_product` for small batches.

    Attributes:
        features: outputs.
        kernel_init: initialiser of the kernel.
        bias_init: initialiser of the bias.
    """

    features: int
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
    bias_init: nn.initializers.Initializer = nn.initializers.zeros_init()

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Applies the layer, ``[batch, ..., in] -> [batch, ..., features]``."""
        kernel = self.param("kernel", self.kernel_init, (inputs.shape[-1], self.features))
        bias = self.param("bias", self.bias_init, (self.features,))
        small = inputs.ndim == 2 and inputs.shape[0] <= _SMALL_BATCH
        if small and jax.default_backend() == "cpu":
            return small_batch_product(inputs, kernel) + bias
        return inputs @ kernel + bias
