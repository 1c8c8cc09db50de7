"""What the factories of algorithms compose."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from experiments.problems.base import Problem
from experiments.settings import choose
from fedjax_mtl import Execution, models
from fedjax_mtl.core import batching


def make_optimizer(
    *,
    learning_rate: float,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    max_norm: float = 0.0,
    name: str = "sgd",
) -> optax.GradientTransformation:
    """SGD or Adam on gradients cut to ``max_norm`` (0: as they are), with L2 regularisation in the gradient, as PyTorch's weight decay."""
    table = {
        "sgd": lambda: optax.sgd(learning_rate, momentum=momentum or None),
        "adam": lambda: optax.adam(learning_rate),
    }
    steps = [choose(table, name, "optimizer")()]
    if weight_decay:
        steps.insert(0, optax.add_decayed_weights(weight_decay))
    if max_norm:
        steps.insert(0, optax.clip_by_global_norm(max_norm))
    return optax.chain(*steps) if len(steps) > 1 else steps[0]


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
        return make_optimizer(
            **{**self.optimizer_settings, "learning_rate": learning_rate, **changes}
        )

    def refuse_client_settings(self, why: str) -> None:
        """Raises ValueError, naming the field, if the optimiser, its state or the schedule were set: for methods that would ignore them."""
        plain = make_optimizer.__kwdefaults__
        changed = [name for name, value in plain.items() if self.optimizer_settings[name] != value]
        changed += ["keep_optimizer"] * self.keep_optimizer + ["schedule"] * (
            not self.constant_rate
        )
        if changed:
            raise ValueError(f"{why}; leave config.client.{changed[0]} as it is")

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
