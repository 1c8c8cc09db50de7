"""Training in one place, before anything is federated.

Base models for adapters and encoders for features come from here.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from fedjax_mtl.clients.training import Solver, Trained, loss_gradient, train
from fedjax_mtl.core import batching
from fedjax_mtl.core.federation import NO_BUDGET, ClientView
from fedjax_mtl.core.model import Model
from fedjax_mtl.core.task import Task, example_losses

PyTree = Any


def train_centrally(
    model: Model, task: Task, examples: PyTree, *, solver: Solver, key: jax.Array
) -> Trained:
    """Trains one client that owns all examples, for one round; compiled.

    Args:
        model: what is trained.
        task: what it is trained on.
        examples: leaves ``[n, ...]``.
        solver: the training; its schedule does not apply.
        key: of the first parameters and of the batches.
    """
    count = len(jax.tree.leaves(examples)[0])
    examples = jax.tree.map(jnp.asarray, examples)
    gradient = loss_gradient(example_losses(model, task))

    @jax.jit
    def run(examples: PyTree, key: jax.Array) -> Trained:
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
        start = solver.optimizer.init(params)
        return train(gradient, solver.optimizer, solver.plan, params, start, everything, train_key)

    return run(examples, key)


def pretrain(
    model: Model,
    task: Task,
    examples: PyTree,
    *,
    steps: int,
    learning_rate: float = 0.001,
    batch_size: int = 64,
    seed: int = 0,
) -> PyTree:
    """Returns the weights of a model that Adam has trained on examples of nobody in particular.

    Args:
        model: what is trained, from its initial parameters.
        task: what it is trained on.
        examples: leaves ``[n, ...]``.
        steps: of Adam.
        learning_rate: of Adam.
        batch_size: examples of a batch.
        seed: of the parameters and of the batches.
    """
    solver = Solver(optax.adam(learning_rate), batching.steps(steps, batch_size))
    key = jax.random.key(seed)
    return train_centrally(model, task, examples, solver=solver, key=key).params
