"""What the factories of algorithms compose."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from experiments.datasets import Problem
from experiments.settings import choose
from fedjax_mtl import Execution, batching, models


def make_optimizer(
    *, learning_rate: float, momentum: float = 0.0, weight_decay: float = 0.0, name: str = "sgd"
) -> optax.GradientTransformation:
    """SGD or Adam with L2 regularisation in the gradient, as PyTorch's weight decay."""
    table = {
        "sgd": lambda: optax.sgd(learning_rate, momentum=momentum or None),
        "adam": lambda: optax.adam(learning_rate),
    }
    optimizer = choose(table, name, "optimizer")()
    if weight_decay:
        return optax.chain(optax.add_decayed_weights(weight_decay), optimizer)
    return optimizer


def make_schedule(name: str, num_rounds: int) -> Callable[[jax.Array], jax.Array]:
    """The factor on the local learning rate by round: ``constant``, ``multi_step``, ``cosine``, ``sqrt`` or ``linear``, FedEM's five."""
    half, later = num_rounds // 2, 3 * (num_rounds // 4)
    table = {
        "constant": lambda r: jnp.ones(()),
        "multi_step": lambda r: jnp.where(r < half, 1.0, jnp.where(r < later, 0.1, 0.01)),
        "cosine": optax.cosine_decay_schedule(1.0, max(num_rounds, 1)),
        "sqrt": lambda r: jax.lax.rsqrt(r + 1.0),
        "linear": lambda r: 1.0 / (r + 1.0),
    }
    return choose(table, name, "config.client.schedule")


class Parts(NamedTuple):
    """What the factories compose; ``finish`` changes a model that has got its adapters (to one that generates answers)."""

    problem: Problem
    model: models.Model
    execution: Execution
    plan: batching.BatchPlan
    schedule: Callable[[jax.Array], jax.Array]
    constant_rate: bool
    optimizer_settings: dict[str, Any]
    keep_optimizer: bool
    finish: Callable[[Any], Any] = lambda model: model

    @property
    def num_clients(self) -> int:
        return self.problem.splits.train.num_clients

    def optimizer(self, learning_rate: float, **changes: Any) -> optax.GradientTransformation:
        return make_optimizer(**{**self.optimizer_settings, "learning_rate": learning_rate, **changes})

    def common(self) -> dict[str, Any]:
        """Arguments of every algorithm around a server."""
        return {
            "model": self.model,
            "task": self.problem.task,
            "num_clients": self.num_clients,
            "execution": self.execution,
        }

    def training(self, learning_rate: float) -> dict[str, Any]:
        """Arguments of every algorithm that trains locally by ``client``."""
        return {
            **self.common(),
            "plan": self.plan,
            "schedule": self.schedule,
            "optimizer": self.optimizer(learning_rate),
        }
