"""Split learning: a model cut between client and server, as pure functions that send messages.

A client owns the lower part (inputs to embeddings) and the upper part (features to outputs and
loss); the server owns the trunk between them. One step is

    client   embeddings = lower(x)                                      up
    server   features = trunk(embeddings)                               down
    client   loss, gradient of the features                             up
    server   gradient of the trunk (stays), of the embeddings           down
    client   gradients of its own parts

Raw inputs, labels and predictions never leave the client.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedjax_mtl.core.batching import Batch
from fedjax_mtl.core.model import Part
from fedjax_mtl.core.task import Task

PyTree = Any


class Messages(NamedTuple):
    """What crossed the wire in one step of one client, in this order: up, down, up, down."""

    embeddings: PyTree
    features: PyTree
    feature_gradients: PyTree
    embedding_gradients: PyTree


class StepGradients(NamedTuple):
    """One client's loss and gradients of one step; the trunk's never leaves the server."""

    loss: jax.Array
    lower: PyTree
    trunk: PyTree
    upper: PyTree
    messages: Messages


def batch_loss(
    upper: Part, task: Task, params: PyTree, features: PyTree, batch: Batch
) -> jax.Array:
    """The mean loss of a batch's real examples, from the features on."""
    values = task.loss(upper.apply(params, features), batch.examples["labels"]) * batch.weights
    return jnp.sum(jnp.where(batch.mask, values, 0)) / jnp.maximum(jnp.sum(batch.mask), 1)


def on_the_wire(message: PyTree, dtype: Any | None) -> PyTree:
    """A message as it arrives: rounded to the wire's type, used in its own."""
    if dtype is None:
        return message
    return jax.tree.map(lambda x: x.astype(dtype).astype(x.dtype), message)


def client_lower(
    lower: Part, params: PyTree, inputs: PyTree
) -> tuple[PyTree, Callable[[PyTree], tuple[PyTree]]]:
    """Client: embeddings, and the pull-back that waits for their gradient."""
    return jax.vjp(lambda p: lower.apply(p, inputs), params)


def server_forward(
    trunk: Part, params: PyTree, embeddings: PyTree
) -> tuple[PyTree, Callable[[PyTree], tuple[PyTree, PyTree]]]:
    """Server: features, and the pull-back to trunk and embeddings that waits for their gradient."""
    return jax.vjp(trunk.apply, params, embeddings)


def client_upper(
    upper: Part, task: Task, params: PyTree, features: PyTree, batch: Batch
) -> tuple[jax.Array, PyTree, PyTree]:
    """Client: loss, gradient of its upper part, gradient of the features."""
    loss, gradients = jax.value_and_grad(batch_loss, argnums=(2, 3))(
        upper, task, params, features, batch
    )
    return loss, *gradients


def split_step(
    lower: Part,
    trunk: Part,
    upper: Part,
    task: Task,
    lower_params: PyTree,
    trunk_params: PyTree,
    upper_params: PyTree,
    batch: Batch,
    wire_dtype: Any | None = None,
) -> StepGradients:
    """One step of one client, message by message; equals ``jax.grad`` of the composed model.

    Args:
        lower: the client's part below the trunk.
        trunk: the server's part.
        upper: the client's part above the trunk.
        task: whose loss it is.
        lower_params: of ``lower``.
        trunk_params: of ``trunk``.
        upper_params: of ``upper``.
        batch: the client's.
        wire_dtype: type of the messages; None leaves them as computed.
    """
    embeddings, pull_lower = client_lower(lower, lower_params, batch.examples["inputs"])
    embeddings = on_the_wire(embeddings, wire_dtype)
    features, pull_trunk = server_forward(trunk, trunk_params, embeddings)
    features = on_the_wire(features, wire_dtype)
    loss, upper_gradient, feature_gradients = client_upper(
        upper, task, upper_params, features, batch
    )
    feature_gradients = on_the_wire(feature_gradients, wire_dtype)
    trunk_gradient, embedding_gradients = pull_trunk(feature_gradients)
    embedding_gradients = on_the_wire(embedding_gradients, wire_dtype)
    (lower_gradient,) = pull_lower(embedding_gradients)
    messages = Messages(embeddings, features, feature_gradients, embedding_gradients)
    return StepGradients(loss, lower_gradient, trunk_gradient, upper_gradient, messages)


def apply_gradient(
    optimizer: optax.GradientTransformation, gradient: PyTree, state: optax.OptState, params: PyTree
) -> tuple[PyTree, optax.OptState]:
    """One optimiser step: ``(params, state)``."""
    updates, state = optimizer.update(gradient, state, params)
    return optax.apply_updates(params, updates), state
