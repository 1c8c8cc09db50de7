"""Classification, binary (one logit), over classes, and of every position of a sequence."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedjax_mtl.core.task import SHARE, Metric, Task


def _mix_log_probabilities(log_probabilities: jax.Array, weights: jax.Array) -> jax.Array:
    """log sum_m weights[m] p_m, ``[models, ...], [models] -> [...]``, without leaving log space."""
    shape = (-1,) + (1,) * (log_probabilities.ndim - 1)
    # A weight can reach 0 in float32; its logarithm, -inf, would poison gradients but not this sum.
    return jax.nn.logsumexp(jnp.log(weights).reshape(shape) + log_probabilities, axis=0)


def _accuracy(right: Callable[[jax.Array, jax.Array], jax.Array]) -> dict[str, Metric]:
    """The one metric of classifiers, from ``(outputs, labels) -> [batch]``, 1 where right."""
    return {"accuracy": Metric(right, higher_is_better=True, unit=SHARE, primary=True)}


def mix_classes(outputs: jax.Array, weights: jax.Array) -> jax.Array:
    """Logits of the mixture of distributions, ``[models, ..., classes] -> [..., classes]``."""
    return _mix_log_probabilities(jax.nn.log_softmax(outputs), weights)


def mix_binary(outputs: jax.Array, weights: jax.Array) -> jax.Array:
    """The logit of the mixture of Bernoulli distributions, ``[models, ..., 1] -> [..., 1]``."""
    positive = _mix_log_probabilities(jax.nn.log_sigmoid(outputs), weights)
    negative = _mix_log_probabilities(jax.nn.log_sigmoid(-outputs), weights)
    return positive - negative


def classification(name: str = "classification") -> Task:
    """Cross entropy over classes: outputs ``[batch, classes]`` logits, labels int ``[batch]``."""

    def right(outputs, labels):
        return (jnp.argmax(outputs, axis=-1) == labels).astype(jnp.float32)

    loss = optax.losses.softmax_cross_entropy_with_integer_labels
    return Task(name, loss, _accuracy(right), mix_classes)


def binary_classification(name: str = "binary") -> Task:
    """Logistic loss: outputs ``[batch, 1]``, one logit; labels ``[batch]`` in {0, 1}.

    A tie counts as class 0.
    """

    def loss(outputs, labels):
        return optax.losses.sigmoid_binary_cross_entropy(outputs[..., 0], labels)

    def right(outputs, labels):
        return ((outputs[..., 0] > 0) == (labels > 0)).astype(jnp.float32)

    return Task(name, loss, _accuracy(right), mix_binary)


def sequence_classification(
    name: str = "sequence", class_weights: jax.Array | np.ndarray | None = None
) -> Task:
    """Next-token prediction: outputs ``[batch, length, classes]``, labels int ``[batch, length]``.

    The loss of an example is the mean over its positions. FedEM's E-step depends on that: a sum
    would make responsibilities of 80-character samples all but hard. ``accuracy`` is the share of
    all positions whose largest logit is right.

    Args:
        name: names the task.
        class_weights: ``[classes]``, multiply the loss of the positions whose label is that class,
            without renormalisation, as FedEM's released Shakespeare code does.
    """

    scale = None if class_weights is None else jnp.asarray(class_weights)

    def loss(outputs, labels):
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(outputs, labels)
        if scale is not None:
            losses = losses * scale[labels]
        return jnp.mean(losses, axis=-1)

    def right(outputs, labels):
        return jnp.mean((jnp.argmax(outputs, axis=-1) == labels).astype(jnp.float32), axis=-1)

    return Task(name, loss, _accuracy(right), mix_classes)
