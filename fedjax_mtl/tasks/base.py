"""What a task is."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

PyTree = Any


class Task(NamedTuple):
    """What is to be predicted, and how a prediction is judged.

    Attributes:
        name: names the task in metrics and in ``decoders/<name>``.
        loss: ``(outputs [batch, ...], labels [batch, ...]) -> [batch]``, the negative log-likelihood of each example (up to
            a constant) wherever an algorithm weighs models by likelihood, as FedEM does.
        metrics: named functions of the same form; their mean over examples is reported.
        mix: ``(outputs [models, batch, ...], weights [models]) -> [batch, ...]``, the outputs of the mixture of several
            models: predictions are mixed as distributions, never as logits or parameters.
    """

    name: str
    loss: Callable[[jax.Array, jax.Array], jax.Array]
    metrics: dict[str, Callable[[jax.Array, jax.Array], jax.Array]]
    mix: Callable[[jax.Array, jax.Array], jax.Array]


def example_losses(model: Any, task: Task) -> Callable[[PyTree, PyTree, jax.Array | None], jax.Array]:
    """The loss of each example as a function of parameters: ``(params, examples, key) -> [batch]``.

    ``examples`` has ``inputs`` and ``labels``; the key is for models with dropout, None evaluates.
    """

    def losses(params: PyTree, examples: PyTree, key: jax.Array | None = None) -> jax.Array:
        return task.loss(model.apply(params, examples["inputs"], key), examples["labels"])

    return losses
