"""What a task is."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

PyTree = Any


class PooledMetric(NamedTuple):
    """A metric that is no mean over examples: statistics are summed over the whole evaluation set, then turned into the value once.

    Attributes:
        statistics: ``(outputs [batch, ...], labels [batch, ...]) -> pytree``, leaves ``[batch, ...]``.
        finish: ``totals -> scalar``, of the same pytree without the batch axis.
    """

    statistics: Callable[[PyTree, PyTree], PyTree]
    finish: Callable[[PyTree], jax.Array]


def lower_is_better(metric: str) -> bool:
    """Whether a metric's name says that less is better: losses, errors, perplexities, and spreads over clients."""
    return any(
        word in metric for word in ("loss", "error", "rmse", "perplexity")
    ) or metric.endswith("_std")


class Task(NamedTuple):
    """What is to be predicted, and how a prediction is judged.

    Attributes:
        name: names the task in metrics and in ``decoders/<name>``.
        loss: ``(outputs [batch, ...], labels [batch, ...]) -> [batch]``, the negative log-likelihood of each example (up to
            a constant) wherever an algorithm weighs models by likelihood, as FedEM does.
        metrics: named functions of the same form, whose mean over examples is reported, or :class:`PooledMetric`. Names with ``loss``, ``error``, ``perplexity`` or
            ``rmse`` are better when lower.
        mix: ``(outputs [models, batch, ...], weights [models]) -> [batch, ...]``, the outputs of the mixture of several
            models: predictions are mixed as distributions, never as logits or parameters.
    """

    name: str
    loss: Callable[[jax.Array, jax.Array], jax.Array]
    metrics: dict[str, Callable[[jax.Array, jax.Array], jax.Array] | PooledMetric]
    mix: Callable[[jax.Array, jax.Array], jax.Array]


def example_losses(
    model: Any, task: Task
) -> Callable[[PyTree, PyTree, jax.Array | None], jax.Array]:
    """The loss of each example as a function of parameters: ``(params, examples, key) -> [batch]``.

    ``examples`` has ``inputs`` and ``labels``; the key is for models with dropout, None evaluates.
    """

    def losses(params: PyTree, examples: PyTree, key: jax.Array | None = None) -> jax.Array:
        return task.loss(model.apply(params, examples["inputs"], key), examples["labels"])

    return losses
