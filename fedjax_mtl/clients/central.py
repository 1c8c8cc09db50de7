"""Training in one place, before anything is federated: base models for adapters, encoders for features."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from fedjax_mtl.clients.training import Trained, loss_gradient, train
from fedjax_mtl.core.batching import BatchPlan
from fedjax_mtl.core.federation import NO_BUDGET, ClientView
from fedjax_mtl.models import Model
from fedjax_mtl.tasks import Task, example_losses

PyTree = Any


def train_centrally(
    model: Model,
    task: Task,
    examples: PyTree,
    *,
    optimizer: optax.GradientTransformation,
    plan: BatchPlan,
    key: jax.Array,
) -> Trained:
    """One client that owns all examples, leaves ``[n, ...]``, trained for one round of ``plan``; compiled."""
    count = len(jax.tree.leaves(examples)[0])
    examples = jax.tree.map(jnp.asarray, examples)

    @jax.jit
    def run(examples, key):
        init_key, train_key = jax.random.split(key)
        params = model.init(init_key)
        zero = jnp.zeros((), jnp.int32)
        everything = ClientView(
            examples,
            jnp.arange(count),
            jnp.int32(count),
            zero,
            jnp.int32(NO_BUDGET),
            zero,
            train_key,
        )
        gradient = loss_gradient(example_losses(model, task))
        return train(
            gradient, optimizer, plan, params, optimizer.init(params), everything, train_key
        )

    return run(examples, key)
