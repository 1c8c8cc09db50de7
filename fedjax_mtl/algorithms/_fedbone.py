"""FedBone: clients with small models around one large trunk on the server.

Chen et al., arXiv 2306.17465. The split, the conflict test, the projection and the final average
are the paper's; attention formula, schedule, embedding synchronisation and all values are
reconstructed, and every one of them is an argument. Clients go in lock step; per-client gradients
of the trunk are pull-backs at one set of parameters.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedjax_mtl import costs
from fedjax_mtl.clients.training import Solver
from fedjax_mtl.core import trees
from fedjax_mtl.core.algorithm import Algorithm, Info
from fedjax_mtl.core.checks import InputError, check_choice
from fedjax_mtl.models.cut import CutModel, init_parts
from fedjax_mtl.rounds.groups import Counts, Server, Tasks, check_group_sizes, client_offsets
from fedjax_mtl.rounds.lock_step import (
    Clients,
    Cohorts,
    SplitClientState,
    SplitGroup,
    SplitTraining,
    TrunkServer,
    slot_offsets,
)
from fedjax_mtl.rounds.lock_step_schedules import SCHEDULES, LockStepRound, RoundOutcome
from fedjax_mtl.server import gp_aggregation

PyTree = Any

SYNCHRONISATIONS = ("fedavg", "frozen", "local")


class FedBoneState(NamedTuple):
    """The state of FedBone.

    Attributes:
        round: int32 ``[]``; rounds done.
        params: the trunk, which only the server has.
        server: the state of the server's transformations.
        clients: what each client owns, by group if clients come in groups.
    """

    round: jax.Array
    params: PyTree
    server: optax.OptState
    clients: Any


class FedBone(NamedTuple):
    """What :func:`fedbone` was asked for; its arguments explain each.

    Attributes:
        parts: the steps of clients and server.
        schedule: a name in :data:`fedjax_mtl.rounds.lock_step_schedules.SCHEDULES`.
        embedding_sync: one of :data:`SYNCHRONISATIONS`.
        example: the shapes of a batch of inputs.
        grouped: whether clients come in groups; one group that comes alone is called ``""``.
    """

    parts: LockStepRound
    schedule: str
    embedding_sync: str
    example: PyTree
    grouped: bool

    @property
    def groups(self) -> dict[str, SplitGroup]:
        """The clients, by name."""
        return self.parts.training.groups

    def by_group(self, values: Any) -> dict[str, Any]:
        """Values that the outside gives by group, or bare where clients do not come in groups."""
        return values if self.grouped else {"": values}

    def outside(self, values: dict[str, Any]) -> Any:
        """The inverse of :meth:`by_group`."""
        return values if self.grouped else values[""]


def fedbone(
    model: CutModel,
    task: Tasks,
    *,
    num_clients: Counts,
    solver: Solver,
    server: Server | None = None,
    schedule: str = "step",
    drift_learning_rate: float | jax.Array = 0.01,
    embedding_sync: str = "fedavg",
    weighting: str = "uniform",
    wire_dtype: Any | None = None,
) -> Algorithm:
    """FedBone, section 3: split learning with gradient projection, for clients of different tasks.

    A client whose loss, trunk gradient or own parts are not finite counts as absent in that step
    (``diverged`` counts them). Newcomers (``adapt``) get the mean embedding and an untrained upper
    part. All clients of a group run at once, and local step budgets have no effect: in lock step
    nobody goes ahead.

    Args:
        model: the clients' patch embedding, of one architecture everywhere, the server's general
            model (the trunk), and each group's adaptation and head.
        task: what the clients are trained on; of clients that come in groups, by group.
        num_clients: clients in the population; by group if they come in groups.
        solver: of embedding, adaptation and head; the optimiser's state stays with the client. Its
            plan, ``batching.steps``, counts the lock-step steps of a round, for each of which a
            client draws a fresh batch, uniformly without replacement.
        server: a chain over the clients' trunk gradients ``[clients, ...]``, in which groups follow
            each other by name; default GPAggregation and Adam at 0.001.
        schedule: ``step``, one server step for every step of the clients; ``round``, the trunk is
            frozen in a round and each client's gradients are averaged; ``drift``, each client's
            copy of the trunk takes SGD steps and the server sees (start - end) / (rate * steps).
        drift_learning_rate: of the clients' copies in the schedule ``drift``.
        embedding_sync: after each round ``fedavg`` (mean by examples over those who took part, sent
            to all clients), ``local`` (each keeps its own), or ``frozen`` (never trained).
        weighting: of the trunk gradients, ``uniform`` or ``samples``.
        wire_dtype: type of the messages, e.g. ``jnp.bfloat16``; default as computed.

    Raises:
        InputError: no group, a group without clients, an unknown choice, or a solver that does not
            go in lock step.
    """
    check_choice("schedule", schedule, SCHEDULES)
    check_choice("embedding_sync", embedding_sync, SYNCHRONISATIONS)
    check_choice("weighting", weighting, ("uniform", "samples"))
    groups = _split_groups(model, task, num_clients)
    num_steps, batch_size = _lock_step_plan(solver)
    if server is None:
        server = optax.chain(gp_aggregation(), optax.adam(1e-3))
    counts = {name: group.num_clients for name, group in groups.items()}
    training = SplitTraining(
        lower=model.lower,
        trunk=model.trunk,
        groups=groups,
        optimizer=solver.optimizer,
        batch_size=batch_size,
        train_lower=embedding_sync != "frozen",
        wire_dtype=wire_dtype,
    )
    trunk_server = TrunkServer(
        optax.with_extra_args_support(server), client_offsets(counts), weighting
    )
    parts = LockStepRound(training, trunk_server, num_steps, drift_learning_rate)
    grouped = isinstance(num_clients, dict)
    bone = FedBone(parts, schedule, embedding_sync, model.example, grouped)
    return Algorithm(
        init=functools.partial(init, bone),
        round=functools.partial(one_round, bone),
        predict=functools.partial(predict, bone),
        adapt=functools.partial(adapt, bone),
        traffic=functools.partial(traffic, bone),
        num_clients=num_clients,
    )


def _split_groups(model: CutModel, task: Tasks, num_clients: Counts) -> dict[str, SplitGroup]:
    counts = num_clients if isinstance(num_clients, dict) else {"": num_clients}
    tasks = task if isinstance(task, dict) else dict.fromkeys(counts, task)
    for name in counts:
        if name not in model.uppers or name not in tasks:
            lacking = "part of the model" if name not in model.uppers else "task"
            raise InputError(f"group {name!r} has no {lacking}; give one for each group")
    groups = {
        name: SplitGroup(model.uppers[name], tasks[name], counts[name]) for name in sorted(counts)
    }
    check_group_sizes({name or "clients": group for name, group in groups.items()})
    return groups


def _lock_step_plan(solver: Solver) -> tuple[int, int]:
    """The steps of a round and the examples of a step, of a solver that goes in lock step."""
    steps, batch_size = solver.plan.num_steps, solver.plan.batch_size
    if not steps or not batch_size:
        raise InputError(
            f"clients go in lock step, but the plan has num_steps {steps} and batch_size "
            f"{batch_size}; give at least 1 of each, see batching.steps"
        )
    if solver.schedule is not None or solver.keep_optimizer is False:
        raise InputError(
            "clients go in lock step at a constant learning rate and keep their optimisers; leave "
            "schedule and keep_optimizer None"
        )
    return int(steps), batch_size


# --- The algorithm's functions.


def init(bone: FedBone, key: jax.Array) -> FedBoneState:
    """The trunk, and clients that start alike but for their groups' upper parts."""
    training = bone.parts.training
    trunk_key, lower_key, upper_key = jax.random.split(key, 3)
    params, clients = None, {}
    for index, (name, group) in enumerate(bone.groups.items()):
        keys = (lower_key, trunk_key, jax.random.fold_in(upper_key, index))
        made = init_parts(training.lower, training.trunk, group.upper, bone.example, keys)
        params = made["trunk"]
        own = (made["lower"], made["upper"])
        state = SplitClientState(*own, training.optimizer.init(own))
        clients[name] = trees.broadcast_clients(state, group.num_clients)
    server = bone.parts.server.transformation.init(params)
    return FedBoneState(jnp.zeros((), jnp.int32), params, server, bone.outside(clients))


def one_round(
    bone: FedBone, state: FedBoneState, cohort: PyTree, key: jax.Array
) -> tuple[FedBoneState, Info]:
    """A round by the schedule, then the embeddings are synchronised."""
    cohorts = _checked_cohorts(bone, cohort)
    population = bone.by_group(state.clients)
    clients = {
        name: trees.take_clients(population[name], own.client_ids) for name, own in cohorts.items()
    }
    run = SCHEDULES[bone.schedule]
    done = run(bone.parts, state.params, state.server, clients, cohorts, key)
    kept = {
        name: trees.put_clients(population[name], own.client_ids, done.clients[name], own.present)
        for name, own in cohorts.items()
    }
    if bone.embedding_sync == "fedavg":
        kept = _synchronise(kept, done, cohorts)
    state = FedBoneState(state.round + 1, done.params, done.server, bone.outside(kept))
    return state, done.reports | _round_info(bone, done, cohorts)


def _checked_cohorts(bone: FedBone, cohort: PyTree) -> Cohorts:
    cohorts = bone.by_group(cohort)
    if set(cohorts) != set(bone.groups):
        raise InputError(
            f"the cohorts are of groups {sorted(cohorts)}, the algorithm is for "
            f"{sorted(bone.groups)}; use sampling.by_group"
        )
    return {name: cohorts[name] for name in sorted(cohorts)}


def _parts_of(values: jax.Array, cohorts: Cohorts) -> dict[str, jax.Array]:
    """Each group's slots of the last axis, ``[..., all clients]``."""
    return {
        name: values[..., start : start + cohorts[name].present.shape[0]]
        for name, start in slot_offsets(cohorts).items()
    }


def _synchronise(population: Clients, done: RoundOutcome, cohorts: Cohorts) -> Clients:
    """The mean embedding of those who made a step, by examples, sent to everybody.

    Optimiser moments stay local.
    """
    made_one = _parts_of(jnp.any(done.counts, axis=0), cohorts)
    weights = {name: jnp.where(made_one[name], own.shares, 0) for name, own in cohorts.items()}
    total = functools.reduce(jnp.add, [jnp.sum(own) for own in weights.values()])
    parts = [
        trees.weighted_sum(own / jnp.maximum(total, 1e-30), done.clients[name].lower)
        for name, own in weights.items()
    ]
    mean = jax.tree.map(lambda *leaves: sum(leaves[1:], leaves[0]), *parts)

    def receive(state: SplitClientState) -> SplitClientState:
        everybody = jax.tree.map(lambda m, own: jnp.broadcast_to(m, own.shape), mean, state.lower)
        return state._replace(lower=trees.where(total > 0, everybody, state.lower))

    return {name: receive(state) for name, state in population.items()}


def _round_info(bone: FedBone, done: RoundOutcome, cohorts: Cohorts) -> Info:
    """Mean losses over steps and clients, of all and by group, and how many took part."""
    losses, counts = _parts_of(done.losses, cohorts), _parts_of(done.counts, cohorts)
    info = {"loss": _mean_where(done.losses, done.counts)}
    for name in cohorts if bone.grouped else ():
        info[f"loss/{name}"] = _mean_where(losses[name], counts[name])
    present = jnp.concatenate([own.present for own in cohorts.values()])
    finite = jnp.all(done.counts, axis=0)
    numbers = {"diverged": present & ~finite, "participants": present & finite}
    return info | {name: jnp.sum(who).astype(jnp.float32) for name, who in numbers.items()}


def _mean_where(values: jax.Array, counts: jax.Array) -> jax.Array:
    """The mean of the values that count, ``[steps, clients] -> []``; NaN where none does."""
    return jnp.mean(values, where=counts)


def predict(bone: FedBone, state: FedBoneState, client_ids: PyTree, inputs: PyTree) -> PyTree:
    """Each client's own parts around the trunk, by group where clients come in groups."""
    training, population = bone.parts.training, bone.by_group(state.clients)

    def one(group: SplitGroup, own: SplitClientState, x: PyTree) -> PyTree:
        features = training.trunk.apply(state.params, training.lower.apply(own.lower, x))
        return group.upper.apply(own.upper, features)

    inputs = bone.by_group(inputs)
    outputs = {
        name: jax.vmap(functools.partial(one, bone.groups[name]))(
            trees.take_clients(population[name], ids), inputs[name]
        )
        for name, ids in bone.by_group(client_ids).items()
    }
    return bone.outside(outputs)


def adapt(bone: FedBone, state: FedBoneState, newcomers: PyTree, key: jax.Array) -> FedBoneState:
    """The state whose clients are newcomers: the mean embedding and an untrained upper part."""
    training = bone.parts.training
    clients = dict(bone.by_group(state.clients))
    for index, (name, federation) in enumerate(sorted(bone.by_group(newcomers).items())):
        mean = jax.tree.map(lambda x: jnp.mean(x, axis=0), clients[name].lower)
        keys = (key, key, jax.random.fold_in(key, index))
        upper = bone.groups[name].upper
        fresh = init_parts(training.lower, training.trunk, upper, bone.example, keys)["upper"]
        own = SplitClientState(mean, fresh, training.optimizer.init((mean, fresh)))
        clients[name] = trees.broadcast_clients(own, federation.num_clients)
    return state._replace(clients=bone.outside(clients))


def traffic(bone: FedBone, state: FedBoneState) -> tuple[int, int]:
    """The bytes of a round's messages, and of the embedding where that is synchronised."""
    training = bone.parts.training
    shapes = next(iter(bone.by_group(state.clients).values())).lower
    first = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), shapes)
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), bone.example)
    embeddings = jax.eval_shape(training.lower.apply, first, one)
    features = jax.eval_shape(training.trunk.apply, state.params, embeddings)
    values = sum(x.size for x in jax.tree.leaves((embeddings, features)))
    width = 4 if training.wire_dtype is None else jnp.dtype(training.wire_dtype).itemsize
    size = width * bone.parts.num_steps * training.batch_size * values
    size += costs.tree_bytes(first) if bone.embedding_sync == "fedavg" else 0
    return size, size
