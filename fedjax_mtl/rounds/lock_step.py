"""Clients of several tasks in lock step around one trunk: a step of all, and one of the server.

In every step each client draws a batch and gets its gradients. What the server does with those of
the trunk, and when, is the schedule (:mod:`fedjax_mtl.rounds.lock_step_schedules`).
"""

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


def slot_offsets(cohorts: Cohorts) -> dict[str, int]:
    """Where each group's cohort begins on the axis of all clients."""
    return client_offsets({name: cohort.present.shape[0] for name, cohort in cohorts.items()})


def _join(parts: list[PyTree]) -> PyTree:
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


def _by_group(tree: PyTree, cohorts: Cohorts) -> dict[str, PyTree]:
    """Each group's slots of ``[all clients, ...]``."""
    starts = slot_offsets(cohorts)
    ends = {name: start + cohorts[name].present.shape[0] for name, start in starts.items()}
    return {n: jax.tree.map(lambda x, n=n: x[starts[n] : ends[n]], tree) for n in starts}


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
