"""Regression with Gaussian noise of unit variance."""

import jax.numpy as jnp
import optax

from fedjax_mtl.tasks.base import Task


def regression(name: str = "regression") -> Task:
    """Half the squared error: outputs ``[batch, targets]``, labels ``[batch, targets]``.

    The mixture's output is its mean; its loss is that of the mean, not the mixture's likelihood.
    """

    def loss(outputs, labels):
        return jnp.sum(optax.losses.l2_loss(outputs, labels), axis=-1)

    def squared_error(outputs, labels):
        return jnp.mean(jnp.square(outputs - labels), axis=-1)

    def mix(outputs, weights):
        return jnp.tensordot(weights, outputs, 1)

    return Task(name, loss, {"squared_error": squared_error}, mix)
