"""Clients of several tasks in lock step around one trunk: a split step of all at once, and the three schedules of a round.

In every step each client draws a batch and gets its gradients; what the server does with those of the trunk, and when, is the schedule.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedjax_mtl.clients.split import apply_gradient, split_step
from fedjax_mtl.core import trees
from fedjax_mtl.core.batching import Batch, draw_batch
from fedjax_mtl.core.federation import Cohort
from fedjax_mtl.core.model import Part
from fedjax_mtl.rounds.federated import cohort_inputs, is_finite, view
from fedjax_mtl.rounds.population import client_offsets
from fedjax_mtl.server.projection import GPAggregationState
from fedjax_mtl.tasks import Task

PyTree = Any


class SplitGroup(NamedTuple):
    """Clients with the same task: their upper part (adaptation and head), their task, how many they are."""

    upper: Part
    task: Task
    num_clients: int


class SplitClientState(NamedTuple):
    """What the clients of a group own, leaves ``[clients, ...]``."""

    lower: PyTree
    upper: PyTree
    optimizer: optax.OptState


class LockStep(NamedTuple):
    """One step of all clients; the client axis runs over the groups by name.

    Attributes:
        clients: their states after it, by group.
        gradients: of the trunk, leaves ``[all clients, ...]``.
        losses: ``[all clients]``. counts: bool ``[all clients]``; present, and nothing of it diverged.
    """

    clients: dict[str, SplitClientState]
    gradients: PyTree
    losses: jax.Array
    counts: jax.Array


class RoundOutcome(NamedTuple):
    """A round by some schedule: trunk, the server's and the clients' states, ``losses`` and ``counts`` ``[steps, all clients]``, and the server's statistics."""

    params: PyTree
    server: optax.OptState
    clients: dict[str, SplitClientState]
    losses: jax.Array
    counts: jax.Array
    statistics: dict[str, jax.Array]


Advance = Callable[..., LockStep]
Serve = Callable[..., tuple[PyTree, optax.OptState]]
Cohorts = dict[str, Cohort]
Clients = dict[str, SplitClientState]


class RoundParts(NamedTuple):
    """What the schedules make a round of.

    Attributes:
        advance: ``(trunk, clients, cohorts, key) -> LockStep``, see :func:`lock_step`; ``advance_apart`` takes a trunk for every client.
        serve: ``(params, server state, gradients, losses, present, cohorts, key) -> (params, server state)``.
        num_steps: of the clients in a round. trunk_learning_rate: of their own trunks, where they have them.
    """

    advance: Advance
    advance_apart: Advance
    serve: Serve
    num_steps: int
    trunk_learning_rate: float | jax.Array


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


def _draw_batches(cohort: Cohort, batch_size: int, key: jax.Array) -> Batch:
    """A fresh batch of every client of a cohort, leaves ``[clients, batch, ...]``; a client's does not depend on its slot."""

    def draw(inputs):
        me = view(cohort.federation.examples, inputs, jnp.zeros((), jnp.int32), key)
        return draw_batch(me, batch_size, jax.random.fold_in(key, inputs.client_ids))

    return jax.vmap(draw)(cohort_inputs(cohort))


def lock_step(
    lower: Part,
    trunk: Part,
    groups: dict[str, SplitGroup],
    optimizer: optax.GradientTransformation,
    batch_size: int,
    *,
    train_lower: bool = True,
    wire_dtype: Any | None = None,
    trunks_apart: bool = False,
) -> Advance:
    """One split step of all clients, ``(trunk, clients, cohorts, key) -> LockStep``.

    A client whose loss, trunk gradient or own parts are not finite keeps what it had and does not count.

    Args:
        lower, trunk, groups: the parts of the model.
        optimizer: of each client's lower and upper part. batch_size: of a client in a step.
        train_lower: False leaves the lower parts as they are, weight decay included.
        wire_dtype: type of the messages.
        trunks_apart: the trunk has a client axis, ``[all clients, ...]``: every client differentiates at its own.
    """

    def one_client(group, own, trunk_params, batch):
        result = split_step(
            lower,
            trunk,
            group.upper,
            group.task,
            own.lower,
            trunk_params,
            own.upper,
            batch,
            wire_dtype,
        )
        below = result.lower if train_lower else optax.tree.zeros_like(result.lower)
        (new_lower, new_upper), optimizer_state = apply_gradient(
            optimizer, (below, result.upper), own.optimizer, (own.lower, own.upper)
        )
        new = SplitClientState(new_lower if train_lower else own.lower, new_upper, optimizer_state)
        return new, result.trunk, result.loss

    def advance(trunk_params, clients, cohorts, key):
        own_trunks = (
            _by_group(trunk_params, cohorts)
            if trunks_apart
            else dict.fromkeys(groups, trunk_params)
        )
        moved, gradients, losses, counts = {}, [], [], []
        for index, name in enumerate(sorted(groups)):
            batches = _draw_batches(cohorts[name], batch_size, jax.random.fold_in(key, index))
            step = jax.vmap(
                lambda own, params, batch, group=groups[name]: one_client(
                    group, own, params, batch
                ),
                (0, 0 if trunks_apart else None, 0),
            )
            new, gradient, loss = step(clients[name], own_trunks[name], batches)
            counting = cohorts[name].present & jax.vmap(is_finite)(
                (gradient, loss, new.lower, new.upper)
            )
            moved[name] = trees.where_clients(counting, new, clients[name])
            gradients.append(gradient)
            losses.append(loss)
            counts.append(counting)
        return LockStep(moved, _join(gradients), jnp.concatenate(losses), jnp.concatenate(counts))

    return advance


def serve_every_step(
    parts: RoundParts,
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
        step = parts.advance(params, clients, cohorts, data_key)
        params, server = parts.serve(
            params, server, step.gradients, step.losses, step.counts, cohorts, server_key
        )
        return (params, server, step.clients), (
            step.losses,
            step.counts,
            _aggregation_statistics(server),
        )

    (params, server, clients), (losses, counts, statistics) = jax.lax.scan(
        body, (params, server, clients), jax.random.split(key, parts.num_steps)
    )
    return RoundOutcome(params, server, clients, losses, counts, jax.tree.map(jnp.mean, statistics))


def serve_the_mean(
    parts: RoundParts,
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
        step = parts.advance(params, clients, cohorts, step_key)
        total = optax.tree.add(total, trees.mask_clients(step.gradients, step.counts))
        return (step.clients, total, number + step.counts), (step.losses, step.counts)

    zero = trees.broadcast_clients(optax.tree.zeros_like(params), _num_slots(cohorts))
    (clients, total, number), (losses, counts) = jax.lax.scan(
        body, (clients, zero, jnp.zeros(_num_slots(cohorts))), keys[1:]
    )
    mean = trees.scale_clients(1 / jnp.maximum(number, 1), total)
    seen = jnp.mean(losses, axis=0, where=counts)
    params, server = parts.serve(params, server, mean, seen, number > 0, cohorts, keys[0])
    return RoundOutcome(params, server, clients, losses, counts, _aggregation_statistics(server))


def serve_the_drift(
    parts: RoundParts,
    params: PyTree,
    server: optax.OptState,
    clients: Clients,
    cohorts: Cohorts,
    key: jax.Array,
) -> RoundOutcome:
    """Each client's copy of the trunk takes SGD steps; the server gets (start - end) / (rate * steps)."""
    keys = jax.random.split(key, parts.num_steps + 1)  # the server's, and one a step
    rate = parts.trunk_learning_rate
    start = trees.broadcast_clients(params, _num_slots(cohorts))

    def body(carry, step_key):
        clients, copies = carry
        step = parts.advance_apart(copies, clients, cohorts, step_key)
        moved = jax.tree.map(lambda c, g: c - rate * g, copies, step.gradients)
        return (step.clients, trees.where_clients(step.counts, moved, copies)), (
            step.losses,
            step.counts,
        )

    (clients, copies), (losses, counts) = jax.lax.scan(body, (clients, start), keys[1:])
    drift = optax.tree.scale(1 / (rate * parts.num_steps), optax.tree.sub(start, copies))
    seen = jnp.mean(losses, axis=0, where=counts)
    params, server = parts.serve(
        params, server, drift, seen, jnp.any(counts, axis=0), cohorts, keys[0]
    )
    return RoundOutcome(params, server, clients, losses, counts, _aggregation_statistics(server))


SCHEDULES = {"step": serve_every_step, "round": serve_the_mean, "drift": serve_the_drift}


def _aggregation_statistics(server_state: PyTree) -> dict[str, jax.Array]:
    """What GPAggregation reported last, wherever it stands in the server's chain; nothing if it is not there."""
    states = jax.tree.leaves(server_state, is_leaf=lambda s: isinstance(s, GPAggregationState))
    found = [s.statistics for s in states if isinstance(s, GPAggregationState)]
    return found[0] if found else {}
