"""Regression with Gaussian noise of unit variance."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from fedjax_mtl.core.checks import check_choice
from fedjax_mtl.core.task import Metric, Task

PerExample = Callable[[jax.Array, jax.Array], jax.Array]


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

    metric = Metric(squared_error, higher_is_better=False, primary=True)
    return Task(name, loss, {"squared_error": metric}, mix)


def root_mean_square(
    squares: PerExample,
    counts: PerExample | None = None,
    *,
    unit: str = "",
    primary: bool = True,
) -> Metric:
    """The root of a mean that is taken over the whole evaluation set.

    Args:
        squares: ``(outputs, labels) -> [batch]``, the sum of the squared errors of each example.
        counts: ``(outputs, labels) -> [batch]``, how many errors that sum has; default 1.
        unit: of an error.
        primary: whether the task is compared by it.
    """

    def measure(outputs, labels):
        total = squares(outputs, labels)
        return {
            "sum": total,
            "count": jnp.ones_like(total) if counts is None else counts(outputs, labels),
        }

    def finish(sums):
        return jnp.sqrt(sums["sum"] / jnp.maximum(sums["count"], 1))

    return Metric(measure, higher_is_better=False, unit=unit, primary=primary, finish=finish)


def mean_squared_error(name: str = "regression", primary: str = "normalised_error") -> Task:
    """Mean squared error over the targets, for tasks that may differ in scale.

    Outputs are ``[batch, targets]``, labels ``{"target": [batch, targets], "variance": [batch]}``.
    The variance is that of the client's test labels; ``normalised_error`` is the squared error
    divided by it, so that tasks of different scale can be compared: 1 is what predicting the mean
    reaches. ``rmse`` is the root of the mean squared error of the client's examples.

    Args:
        name: names the task.
        primary: the metric by which the task is compared, ``normalised_error`` or ``rmse``.

    Raises:
        InputError: another primary metric.
    """
    check_choice("primary metric", primary, ("normalised_error", "rmse"))

    def loss(outputs, labels):
        return jnp.mean(jnp.square(outputs - labels["target"]), axis=-1)

    def normalised_error(outputs, labels):
        return loss(outputs, labels) / labels["variance"]

    def mix(outputs, weights):
        return jnp.tensordot(weights, outputs, 1)

    metrics = {
        "normalised_error": Metric(
            normalised_error, higher_is_better=False, primary=primary == "normalised_error"
        ),
        "rmse": root_mean_square(loss, primary=primary == "rmse"),
    }
    return Task(name, loss, metrics, mix)
