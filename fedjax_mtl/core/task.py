"""What a task is: a loss, and metrics that say how they are to be read."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from fedjax_mtl.core.checks import InputError

PyTree = Any

SHARE = "share"
"""The unit of fractions of 1, which tables and figures show in percent."""


class Description(NamedTuple):
    """How a named number is to be read, by whoever compares, prints or draws it.

    Attributes:
        higher_is_better: False where less is better, as for losses and errors.
        unit: the unit for tables and axes, such as ``m`` or ``degrees``; :data:`SHARE` for
            fractions of 1; empty for plain numbers.
        primary: whether it is the one number by which its task is compared.
    """

    higher_is_better: bool
    unit: str = ""
    primary: bool = False


class Metric(NamedTuple):
    """A number that is computed on the outputs for an evaluation set.

    What is measured on each example is summed over the set. The value is the mean over the
    examples, or what ``finish`` makes of the sums, for numbers that are no mean over examples,
    such as a root mean square or an intersection over union.

    Example:
        >>> Metric(lambda outputs, labels: abs(outputs - labels), higher_is_better=False, unit="m")

    Attributes:
        measure: ``(outputs [batch, ...], labels [batch, ...]) -> [batch]``. With ``finish`` it may
            be a pytree with leaves ``[batch, ...]``.
        higher_is_better: as in :class:`Description`.
        unit: as in :class:`Description`.
        primary: as in :class:`Description`; of one metric a task.
        finish: ``sums -> scalar``, where the sums have the form of ``measure`` without the batch
            axis. None takes the mean over the examples.
    """

    measure: Callable[[PyTree, PyTree], PyTree]
    higher_is_better: bool
    unit: str = ""
    primary: bool = False
    finish: Callable[[PyTree], jax.Array] | None = None

    @property
    def description(self) -> Description:
        """How its values are to be read."""
        return Description(self.higher_is_better, self.unit, self.primary)


class Task(NamedTuple):
    """What is to be predicted, and how a prediction is judged.

    Attributes:
        name: names the task in metrics and in ``decoders/<name>``.
        loss: ``(outputs [batch, ...], labels [batch, ...]) -> [batch]``, the negative
            log-likelihood of each example (up to a constant) wherever an algorithm weighs models
            by likelihood, as FedEM does. Lower is always better.
        metrics: further numbers by name; ``loss`` is taken. At most one of them is primary, or
            one for each part in front of a slash: the metrics of joined tasks are called
            ``<task>/<metric>``.
        mix: ``(outputs [models, batch, ...], weights [models]) -> [batch, ...]``, the outputs of
            the mixture of several models: predictions are mixed as distributions, never as logits
            or parameters.
    """

    name: str
    loss: Callable[[jax.Array, jax.Array], jax.Array]
    metrics: dict[str, Metric]
    mix: Callable[[jax.Array, jax.Array], jax.Array]


def measures(task: Task) -> dict[str, Metric]:
    """All that a task is judged by, its loss among it.

    The loss is primary where no metric is.

    Raises:
        InputError: a metric that is a plain function or called ``loss``, or two primary metrics of
            one task.
    """
    for name, metric in task.metrics.items():
        if not isinstance(metric, Metric):
            raise InputError(
                f"metric {name!r} of task {task.name!r} is {metric!r}, which does not say whether "
                "more or less of it is better; give "
                "fedjax_mtl.tasks.Metric(function, higher_is_better=...)"
            )
    if "loss" in task.metrics:
        raise InputError(
            f"task {task.name!r} has a metric called 'loss', the name of its own loss; rename it"
        )
    primary: dict[str, str] = {}
    for name, metric in task.metrics.items():
        part = name.rpartition("/")[0]
        if metric.primary and primary.setdefault(part, name) != name:
            raise InputError(
                f"task {task.name!r} has two primary metrics, {primary[part]!r} and {name!r}; "
                "a task is compared by one, so keep primary=True for that one"
            )
    loss = Metric(task.loss, higher_is_better=False, primary=not primary)
    return {"loss": loss, **task.metrics}


def describe(task: Task) -> dict[str, Description]:
    """How the loss and the metrics of a task are to be read; see :func:`measures`."""
    return {name: metric.description for name, metric in measures(task).items()}


def example_losses(
    model: Any, task: Task
) -> Callable[[PyTree, PyTree, jax.Array | None], jax.Array]:
    """The loss of each example as a function of parameters: ``(params, examples, key) -> [batch]``.

    ``examples`` has ``inputs`` and ``labels``; the key is for models with dropout, None evaluates.
    """

    def losses(params: PyTree, examples: PyTree, key: jax.Array | None = None) -> jax.Array:
        return task.loss(model.apply(params, examples["inputs"], key), examples["labels"])

    return losses
