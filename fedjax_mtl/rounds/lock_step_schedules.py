"""Schedules of a round in lock step: when the server takes a step of the trunk, and on what."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedjax_mtl.core import trees
from fedjax_mtl.rounds.lock_step import (
    Clients,
    Cohorts,
    SplitTraining,
    TrunkServer,
    lock_step,
    serve,
)
from fedjax_mtl.server.reports import reported

PyTree = Any


class LockStepRound(NamedTuple):
    """What the schedules make a round of.

    Attributes:
        training: a step of all clients.
        server: a step of the trunk.
        num_steps: of the clients in a round.
        trunk_learning_rate: of the clients' own trunks, where they have them.
    """

    training: SplitTraining
    server: TrunkServer
    num_steps: int
    trunk_learning_rate: float | jax.Array


class RoundOutcome(NamedTuple):
    """A round by some schedule.

    Attributes:
        params: the trunk.
        server: the server's state.
        clients: the states of the cohorts' clients, by group.
        losses: ``[steps, all clients]``.
        counts: bool ``[steps, all clients]``, see :class:`LockStep`.
        reports: what the server's transformations report, on average over its steps.
    """

    params: PyTree
    server: optax.OptState
    clients: Clients
    losses: jax.Array
    counts: jax.Array
    reports: dict[str, jax.Array]


def _num_slots(cohorts: Cohorts) -> int:
    return sum(cohort.present.shape[0] for cohort in cohorts.values())


def serve_every_step(
    parts: LockStepRound,
    params: PyTree,
    server: optax.OptState,
    clients: Clients,
    cohorts: Cohorts,
    key: jax.Array,
) -> RoundOutcome:
    """A server step after each step of the clients."""

    def body(carry, step_key):
        params, server, clients = carry
        data_key, server_key = jax.random.split(step_key)
        step = lock_step(parts.training, params, clients, cohorts, data_key)
        params, server = serve(
            parts.server,
            params,
            server,
            step.gradients,
            step.losses,
            step.counts,
            cohorts,
            server_key,
        )
        seen = (step.losses, step.counts, reported(server))
        return (params, server, step.clients), seen

    (params, server, clients), (losses, counts, reports) = jax.lax.scan(
        body, (params, server, clients), jax.random.split(key, parts.num_steps)
    )
    reports = jax.tree.map(lambda x: jnp.mean(x, axis=0), reports)
    return RoundOutcome(params, server, clients, losses, counts, reports)


def serve_the_mean(
    parts: LockStepRound,
    params: PyTree,
    server: optax.OptState,
    clients: Clients,
    cohorts: Cohorts,
    key: jax.Array,
) -> RoundOutcome:
    """The trunk stands still in a round; the server gets each client's mean gradient."""
    keys = jax.random.split(key, parts.num_steps + 1)  # the server's, and one a step

    def body(carry, step_key):
        clients, total, number = carry
        step = lock_step(parts.training, params, clients, cohorts, step_key)
        total = optax.tree.add(total, trees.mask_clients(step.gradients, step.counts))
        return (step.clients, total, number + step.counts), (step.losses, step.counts)

    zero = trees.broadcast_clients(optax.tree.zeros_like(params), _num_slots(cohorts))
    (clients, total, number), (losses, counts) = jax.lax.scan(
        body, (clients, zero, jnp.zeros(_num_slots(cohorts))), keys[1:]
    )
    mean = trees.scale_clients(1 / jnp.maximum(number, 1), total)
    seen = jnp.mean(losses, axis=0, where=counts)
    params, server = serve(parts.server, params, server, mean, seen, number > 0, cohorts, keys[0])
    return RoundOutcome(params, server, clients, losses, counts, reported(server))


def serve_the_drift(
    parts: LockStepRound,
    params: PyTree,
    server: optax.OptState,
    clients: Clients,
    cohorts: Cohorts,
    key: jax.Array,
) -> RoundOutcome:
    """Each client's copy of the trunk takes SGD steps.

    The server gets (start - end) / (rate * steps).
    """
    keys = jax.random.split(key, parts.num_steps + 1)  # the server's, and one a step
    rate = parts.trunk_learning_rate
    start = trees.broadcast_clients(params, _num_slots(cohorts))

    def body(carry, step_key):
        clients, copies = carry
        step = lock_step(parts.training, copies, clients, cohorts, step_key, trunks_apart=True)
        moved = jax.tree.map(lambda c, g: c - rate * g, copies, step.gradients)
        copies = trees.where_clients(step.counts, moved, copies)
        return (step.clients, copies), (step.losses, step.counts)

    (clients, copies), (losses, counts) = jax.lax.scan(body, (clients, start), keys[1:])
    drift = optax.tree.scale(1 / (rate * parts.num_steps), optax.tree.sub(start, copies))
    seen = jnp.mean(losses, axis=0, where=counts)
    there = jnp.any(counts, axis=0)
    params, server = serve(parts.server, params, server, drift, seen, there, cohorts, keys[0])
    return RoundOutcome(params, server, clients, losses, counts, reported(server))


Schedule = Callable[
    [LockStepRound, PyTree, optax.OptState, Clients, Cohorts, jax.Array], RoundOutcome
]


SCHEDULES: dict[str, Schedule] = {
    "step": serve_every_step,
    "round": serve_the_mean,
    "drift": serve_the_drift,
}
