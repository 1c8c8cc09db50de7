"""Clients of several tasks in lock step around one trunk: a split step of all, and three schedules.

In every step each client draws a batch and gets its gradients; what the server does with those of
the trunk, and when, is the schedule.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedjax_mtl.clients.split import StepGradients, apply_gradient, split_step
from fedjax_mtl.core import trees
from fedjax_mtl.core.batching import Batch, draw_batch
from fedjax_mtl.core.federation import Cohort
from fedjax_mtl.core.model import Part
from fedjax_mtl.core.task import Task
from fedjax_mtl.rounds.engine import (
    ClientInputs,
    check_step,
    client_key,
    client_view,
    cohort_inputs,
    is_finite,
)
from fedjax_mtl.rounds.groups import client_offsets
from fedjax_mtl.server.reports import reported

PyTree = Any
Cohorts = dict[str, Cohort]


class SplitGroup(NamedTuple):
    """Clients with the same task.

    Attributes:
        upper: their upper part, adaptation and head.
        task: what they are trained on.
        num_clients: how many they are.
    """

    upper: Part
    task: Task
    num_clients: int


class SplitClientState(NamedTuple):
    """What the clients of a group own, leaves ``[clients, ...]``."""

    lower: PyTree
    upper: PyTree
    optimizer: optax.OptState


Clients = dict[str, SplitClientState]


class SplitTraining(NamedTuple):
    """How a step of all clients goes.

    Attributes:
        lower: the clients' part below the trunk.
        trunk: the server's part.
        groups: the clients, by name.
        optimizer: of each client's lower and upper part.
        batch_size: of a client in a step.
        train_lower: False leaves the lower parts as they are, weight decay included.
        wire_dtype: type of the messages; None leaves them as computed.
    """

    lower: Part
    trunk: Part
    groups: dict[str, SplitGroup]
    optimizer: optax.GradientTransformation
    batch_size: int
    train_lower: bool
    wire_dtype: Any | None


class TrunkServer(NamedTuple):
    """What the server does with the clients' gradients of the trunk.

    Attributes:
        transformation: a chain over gradients ``[all clients, ...]`` that ends in a step.
        offsets: the number of each group's first client in the population.
        weighting: ``uniform`` or ``samples``.
    """

    transformation: optax.GradientTransformationExtraArgs
    offsets: dict[str, int]
    weighting: str


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


class LockStep(NamedTuple):
    """One step of all clients; the client axis runs over the groups by name.

    Attributes:
        clients: their states after it, by group.
        gradients: of the trunk, leaves ``[all clients, ...]``.
        losses: ``[all clients]``.
        counts: bool ``[all clients]``; present, and nothing of it diverged.
    """

    clients: Clients
    gradients: PyTree
    losses: jax.Array
    counts: jax.Array


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


# --- The axis of all clients.


def slot_offsets(cohorts: Cohorts) -> dict[str, int]:
    """Where each group's cohort begins on the axis of all clients."""
    return client_offsets({name: cohort.present.shape[0] for name, cohort in cohorts.items()})


def _num_slots(cohorts: Cohorts) -> int:
    return sum(cohort.present.shape[0] for cohort in cohorts.values())


def _join(parts: list[PyTree]) -> PyTree:
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


def _by_group(tree: PyTree, cohorts: Cohorts) -> dict[str, PyTree]:
    """Each group's slots of ``[all clients, ...]``."""
    starts = slot_offsets(cohorts)
    ends = {name: start + cohorts[name].present.shape[0] for name, start in starts.items()}
    return {n: jax.tree.map(lambda x, n=n: x[starts[n] : ends[n]], tree) for n in starts}


# --- A step of the clients.


def _draw_batches(cohort: Cohort, batch_size: int, key: jax.Array) -> Batch:
    """A fresh batch of every client of a cohort, leaves ``[clients, batch, ...]``.

    A client's batch does not depend on its slot.
    """

    def draw(own: ClientInputs) -> Batch:
        me = client_view(cohort.federation.examples, own, jnp.zeros((), jnp.int32), key)
        return draw_batch(me, batch_size, client_key(key, me.client_id))

    return jax.vmap(draw)(cohort_inputs(cohort))


def _train_one(
    training: SplitTraining,
    group: SplitGroup,
    own: SplitClientState,
    trunk_params: PyTree,
    batch: Batch,
) -> tuple[SplitClientState, StepGradients]:
    """One client's step: its own parts move, the trunk's gradient is for the server."""
    result = split_step(
        training.lower,
        training.trunk,
        group.upper,
        group.task,
        own.lower,
        trunk_params,
        own.upper,
        batch,
        training.wire_dtype,
    )
    below = result.lower if training.train_lower else optax.tree.zeros_like(result.lower)
    (lower, upper), optimizer_state = apply_gradient(
        training.optimizer, (below, result.upper), own.optimizer, (own.lower, own.upper)
    )
    lower = lower if training.train_lower else own.lower
    return SplitClientState(lower, upper, optimizer_state), result


def lock_step(
    training: SplitTraining,
    trunk_params: PyTree,
    clients: Clients,
    cohorts: Cohorts,
    key: jax.Array,
    *,
    trunks_apart: bool = False,
) -> LockStep:
    """One split step of all clients.

    A client whose loss, trunk gradient or own parts are not finite keeps what it had and does not
    count.

    Args:
        training: how the step goes.
        trunk_params: of the trunk.
        clients: the states of the cohorts' clients, by group.
        cohorts: who takes part, by group.
        key: of the batches.
        trunks_apart: the trunk has a client axis, ``[all clients, ...]``: every client
            differentiates at its own.
    """
    trunks = _by_group(trunk_params, cohorts) if trunks_apart else None
    moved, gradients, losses, counts = {}, [], [], []
    for index, (name, group) in enumerate(sorted(training.groups.items())):
        batches = _draw_batches(cohorts[name], training.batch_size, jax.random.fold_in(key, index))
        step = jax.vmap(
            lambda own, params, batch, group=group: _train_one(training, group, own, params, batch),
            (0, 0 if trunks_apart else None, 0),
        )
        own_trunk = trunk_params if trunks is None else trunks[name]
        new, result = step(clients[name], own_trunk, batches)
        finite = jax.vmap(is_finite)((result.trunk, result.loss, new.lower, new.upper))
        counting = cohorts[name].present & finite
        moved[name] = trees.where_clients(counting, new, clients[name])
        gradients.append(result.trunk)
        losses.append(result.loss)
        counts.append(counting)
    return LockStep(moved, _join(gradients), jnp.concatenate(losses), jnp.concatenate(counts))


# --- A step of the server.


def serve(
    server: TrunkServer,
    params: PyTree,
    state: optax.OptState,
    gradients: PyTree,
    losses: jax.Array,
    there: jax.Array,
    cohorts: Cohorts,
    key: jax.Array,
) -> tuple[PyTree, optax.OptState]:
    """The server's step over the trunk gradients of all clients.

    Gradients and losses of those who are not there are masked; where nobody is, nothing moves,
    momentum included.

    Args:
        server: how the step goes.
        params: of the trunk.
        state: the server's.
        gradients: leaves ``[all clients, ...]``.
        losses: ``[all clients]``.
        there: bool ``[all clients]``; who counts.
        cohorts: who took part, by group.
        key: of the server's randomness.

    Returns:
        The trunk and the server's state.

    Raises:
        ValueError: (when traced) a step that has not the shapes of the parameters.
    """
    names = sorted(cohorts)
    shares = jnp.concatenate([cohorts[name].shares for name in names])
    weights = jnp.where(there, shares if server.weighting == "samples" else 1.0, 0)
    steps, new_state = server.transformation.update(
        trees.mask_clients(gradients, there),
        state,
        params,
        weights=weights / jnp.maximum(jnp.sum(weights), 1e-30),
        losses=jnp.where(there, losses, 0),
        client_ids=jnp.concatenate(
            [server.offsets[name] + cohorts[name].client_ids for name in names]
        ),
        present=there,
        key=key,
    )
    check_step(steps, params)
    attended = jnp.any(weights != 0)
    steps = jax.tree.map(lambda x: jnp.where(attended, x, 0), steps)
    return optax.apply_updates(params, steps), trees.where(attended, new_state, state)


# --- The schedules of a round.


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
