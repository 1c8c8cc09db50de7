"""Regression with Gaussian noise of unit variance."""

import jax.numpy as jnp
import optax

from fedjax_mtl.core.task import PooledMetric, Task


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


def root_mean_square(squares, counts=None) -> PooledMetric:
    """Pooled root of a mean: ``squares`` and ``counts`` are ``(outputs, labels) -> [batch]`` (counts default 1)."""

    def statistics(outputs, labels):
        total = squares(outputs, labels)
        return {
            "sum": total,
            "count": jnp.ones_like(total) if counts is None else counts(outputs, labels),
        }

    return PooledMetric(statistics, lambda t: jnp.sqrt(t["sum"] / jnp.maximum(t["count"], 1)))


def mean_squared_error(name: str = "regression") -> Task:
    """Mean squared error over the targets: outputs ``[batch, targets]``, labels ``{"target": [batch, targets], "variance": [batch]}``.

    The variance is that of the client's test labels; ``normalised_error`` is the squared error divided by it, so that tasks of
    different scale can be compared: 1 is what predicting the mean reaches.
    """

    def loss(outputs, labels):
        return jnp.mean(jnp.square(outputs - labels["target"]), axis=-1)

    def normalised_error(outputs, labels):
        return loss(outputs, labels) / labels["variance"]

    def mix(outputs, weights):
        return jnp.tensordot(weights, outputs, 1)

    return Task(
        name, loss, {"normalised_error": normalised_error, "rmse": root_mean_square(loss)}, mix
    )
