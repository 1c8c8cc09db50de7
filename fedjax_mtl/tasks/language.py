"""Language modelling where some positions count: the loss masks out prompts and padding."""

import jax
import jax.numpy as jnp
import optax

from fedjax_mtl.core.task import SHARE, Metric, Task
from fedjax_mtl.tasks._classification import mix_classes

IGNORED = -1
"""The label of a position that the loss does not count."""


def _token_losses(outputs: jax.Array, labels: jax.Array) -> jax.Array:
    """Cross entropy in nats of every position, 0 where ignored.

    ``[batch, length, vocabulary], [batch, length] -> [batch, length]``.
    """
    counted = labels != IGNORED
    # Any token will do where the label is ignored; -1 itself would read the last one's logit.
    target = jnp.where(counted, labels, 0)
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(outputs, target)
    return jnp.where(counted, losses, 0)


def _share(values: jax.Array, labels: jax.Array) -> jax.Array:
    """Sum of ``values [batch, length]`` over the number of counted positions, ``[batch]``.

    It is 0 where none counts.
    """
    return jnp.sum(values, axis=-1) / jnp.maximum(jnp.sum(labels != IGNORED, axis=-1), 1)


def _mean_token_loss(sums: dict[str, jax.Array]) -> jax.Array:
    return sums["loss"] / jnp.maximum(sums["tokens"], 1)


def _perplexity(sums: dict[str, jax.Array]) -> jax.Array:
    return jnp.exp(_mean_token_loss(sums))


def language_modelling(name: str = "language") -> Task:
    """Next-token prediction: outputs ``[batch, length, vocabulary]`` logits.

    Labels are int ``[batch, length]``, the token that should follow each position, or ``IGNORED``.
    The loss of an example is the mean over its counted positions, in nats, and ``accuracy`` the
    share of them whose largest logit is right; both are 0 for an example without any.
    ``token_loss`` and ``perplexity``, its exponential, pool all counted positions of the
    evaluation set, so that a long answer weighs more there than a short one.
    """

    def loss(outputs, labels):
        return _share(_token_losses(outputs, labels), labels)

    def right(outputs, labels):
        # No class has the number IGNORED, so an ignored position is never a hit.
        return _share(jnp.argmax(outputs, axis=-1) == labels, labels)

    def by_token(outputs, labels):
        return {
            "loss": jnp.sum(_token_losses(outputs, labels), axis=-1),
            "tokens": jnp.sum(labels != IGNORED, axis=-1),
        }

    metrics = {
        "accuracy": Metric(right, higher_is_better=True, unit=SHARE, primary=True),
        "token_loss": Metric(
            by_token, higher_is_better=False, unit="nats", finish=_mean_token_loss
        ),
        "perplexity": Metric(by_token, higher_is_better=False, finish=_perplexity),
    }
    return Task(name, loss, metrics, mix_classes)
