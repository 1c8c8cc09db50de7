"""Solvers from plain values: the optimiser, the plan and the schedule of local training."""

import jax
import jax.numpy as jnp
import optax

from fedjax_mtl.clients.training import Schedule, Solver
from fedjax_mtl.core import batching
from fedjax_mtl.core.batching import BatchPlan
from fedjax_mtl.core.checks import InputError, check_choice

OPTIMIZERS = ("sgd", "adam")
SCHEDULES = ("constant", "multi_step", "cosine", "sqrt", "linear")


def make_optimizer(
    *,
    learning_rate: float,
    name: str = "sgd",
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    max_norm: float | None = None,
) -> optax.GradientTransformation:
    """Returns an optimiser of local steps.

    Args:
        learning_rate: step size, at a schedule's factor of 1.
        name: ``sgd`` or ``adam``.
        momentum: of SGD.
        weight_decay: L2 regularisation in the gradient, as PyTorch's weight decay.
        max_norm: gradients are cut to this length before anything else; None leaves them as they
            are.

    Raises:
        InputError: an unknown name, momentum for Adam, or a length that is not positive.
    """
    check_choice("optimizer", name, OPTIMIZERS)
    if name == "adam" and momentum:
        raise InputError(f"momentum is {momentum}, but adam has its own; leave it at 0")
    if max_norm is not None and max_norm <= 0:
        raise InputError(f"max_norm is {max_norm}; give a positive length, or None for no limit")
    steps = {
        "sgd": lambda: optax.sgd(learning_rate, momentum=momentum or None),
        "adam": lambda: optax.adam(learning_rate),
    }
    parts = [] if max_norm is None else [optax.clip_by_global_norm(max_norm)]
    parts += [optax.add_decayed_weights(weight_decay)] if weight_decay else []
    parts.append(steps[name]())
    return optax.chain(*parts) if len(parts) > 1 else parts[0]


def make_schedule(name: str, num_rounds: int) -> Schedule | None:
    """Returns the factor on the local learning rate by round, one of FedEM's five.

    Args:
        name: ``constant``; ``multi_step``, a tenth from half of the rounds on and a hundredth from
            three quarters on; ``cosine``; ``sqrt``, ``1 / sqrt(round + 1)``; or ``linear``,
            ``1 / (round + 1)``.
        num_rounds: of the whole run.

    Returns:
        A function of the round number; None for the constant 1.
    """
    check_choice("config.client.schedule", name, SCHEDULES)
    half, later = num_rounds // 2, 3 * (num_rounds // 4)

    def multi_step(round_index: jax.Array) -> jax.Array:
        return jnp.where(round_index < half, 1.0, jnp.where(round_index < later, 0.1, 0.01))

    return {
        "constant": None,
        "multi_step": multi_step,
        "cosine": optax.cosine_decay_schedule(1.0, max(num_rounds, 1)),
        "sqrt": lambda round_index: jax.lax.rsqrt(round_index + 1.0),
        "linear": lambda round_index: 1.0 / (round_index + 1.0),
    }[name]


def make_plan(
    *, batch_size: int | None = None, epochs: int | None = None, steps: int | None = None
) -> BatchPlan:
    """Returns how far local training goes in a round.

    Args:
        batch_size: examples of a batch; None takes the whole local set.
        epochs: passes over the local set. One, if no steps are given either.
        steps: local steps, however many passes they make.

    Raises:
        InputError: both epochs and steps, or less than 1 of them.
    """
    for name, count in (("epochs", epochs), ("steps", steps)):
        if count is not None and count < 1:
            raise InputError(f"the client has {name}={count}; give at least 1, or None")
    if epochs is not None and steps is not None:
        raise InputError(
            f"the client has epochs={epochs} and steps={steps}; give one of them and leave the "
            "other None"
        )
    if steps is not None:
        return batching.steps(steps, batch_size)
    return batching.epochs(1 if epochs is None else epochs, batch_size)


def make_solver(
    *,
    learning_rate: float,
    num_rounds: int,
    batch_size: int | None = 128,
    epochs: int | None = None,
    steps: int | None = None,
    name: str = "sgd",
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    max_norm: float | None = None,
    schedule: str = "constant",
    keep_optimizer: bool | None = None,
) -> Solver:
    """Returns how a client solves its local problem.

    Args:
        learning_rate: as for :func:`make_optimizer`.
        num_rounds: as for :func:`make_schedule`.
        batch_size: as for :func:`make_plan`.
        epochs: as for :func:`make_plan`.
        steps: as for :func:`make_plan`.
        name: as for :func:`make_optimizer`.
        momentum: as for :func:`make_optimizer`.
        weight_decay: as for :func:`make_optimizer`.
        max_norm: as for :func:`make_optimizer`.
        schedule: as for :func:`make_schedule`.
        keep_optimizer: whether momenta are kept from round to round; None leaves it to the
            algorithm, see :class:`fedjax_mtl.clients.training.Solver`.
    """
    optimizer = make_optimizer(
        learning_rate=learning_rate,
        name=name,
        momentum=momentum,
        weight_decay=weight_decay,
        max_norm=max_norm,
    )
    plan = make_plan(batch_size=batch_size, epochs=epochs, steps=steps)
    return Solver(optimizer, plan, make_schedule(schedule, num_rounds), keep_optimizer)
