"""FedBone (Chen et al., arXiv 2306.17465): clients with small models around one large trunk on the server.

The split, the conflict test, the projection and the final average are the paper's; attention formula, schedule, embedding synchronisation and all values are reconstructed, and every
one of them is an argument. Clients go in lock step; per-client gradients of the trunk are pull-backs at one set of parameters.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedjax_mtl import costs, trees
from fedjax_mtl.algorithm import Algorithm, check_step, cohort_inputs, is_finite, view
from fedjax_mtl.batching import Batch, draw_batch
from fedjax_mtl.federation import Cohort
from fedjax_mtl.population import client_offsets
from fedjax_mtl.server.projection import GPAggregationState, check_choice
from fedjax_mtl.split import Part, apply_gradient, init_parts, split_step
from fedjax_mtl.tasks import Task

PyTree = Any

SCHEDULES = ("step", "round", "drift")
SYNCHRONISATIONS = ("fedavg", "frozen", "local")


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


class FedBoneState(NamedTuple):
    """The state of FedBone: ``params`` is the trunk, which only the server has."""

    round: jax.Array
    params: PyTree
    server: optax.OptState
    clients: dict[str, SplitClientState]


def fedbone(
    lower: Part,
    trunk: Part,
    groups: dict[str, SplitGroup],
    example: PyTree,
    *,
    num_steps: int,
    batch_size: int,
    client_optimizer: optax.GradientTransformation,
    server: optax.GradientTransformation,
    schedule: str = "step",
    trunk_learning_rate: float | jax.Array = 0.01,
    embedding_sync: str = "fedavg",
    weighting: str = "uniform",
    wire_dtype: Any | None = None,
) -> Algorithm:
    """FedBone, section 3: split learning with gradient projection, for groups of clients with different tasks.

    Args:
        lower: the clients' patch embedding, of one architecture everywhere. trunk: the server's general model.
        groups: by name; ``round`` takes ``dict[str, Cohort]`` of the same names.
        example: a batch of inputs (arrays or shapes, any batch size), to size the parameters.
        num_steps: lock-step steps a round; each client draws a fresh batch of ``batch_size`` every step, uniformly without replacement.
        client_optimizer: of embedding, adaptation and head; its state stays with the client.
        server: over the clients' trunk gradients ``[clients, ...]``, e.g. ``optax.chain(gp_aggregation(), optax.sgd(0.1))``; groups follow each other by name.
        schedule: ``step``, one server step for every step of the clients; ``round``, the trunk is frozen in a round and each client's gradients are averaged; ``drift``, each
            client's copy of the trunk takes SGD steps of ``trunk_learning_rate`` and the server sees (start - end) / (rate * steps).
        embedding_sync: after each round ``fedavg`` (mean by examples over those present, sent to all clients), ``local`` (each keeps its own), or ``frozen`` (never trained).
        weighting: of the trunk gradients, ``uniform`` or ``samples``.
        wire_dtype: type of the messages, e.g. ``jnp.bfloat16``; default as computed.

    A client whose loss, trunk gradient or own parts are not finite counts as absent in that step (``diverged`` counts them). Newcomers (``adapt``) get the mean embedding and an untrained upper part.
    All clients of a group run at once, whatever the execution mode, and local step budgets have no effect: in lock step nobody goes ahead.

    Raises:
        ValueError: no group, a group without clients, an unknown choice.
    """
    check_choice("schedule", schedule, SCHEDULES)
    check_choice("embedding_sync", embedding_sync, SYNCHRONISATIONS)
    check_choice("weighting", weighting, ("uniform", "samples"))
    if not groups:
        raise ValueError("fedbone needs at least one group of clients; groups is empty")
    for name, group in groups.items():
        if group.num_clients < 1:
            raise ValueError(
                f"group {name!r} has {group.num_clients} clients; a task without clients cannot be learned, drop it"
            )
    if not batch_size or num_steps < 1 or batch_size < 1:
        raise ValueError(f"num_steps is {num_steps} and batch_size {batch_size}; give at least 1 of each")
    server = optax.with_extra_args_support(server)
    names = sorted(groups)
    sizes = {name: groups[name].num_clients for name in names}
    offsets = client_offsets(sizes)

    def init(key):
        trunk_key, lower_key, upper_key = jax.random.split(key, 3)
        params, clients = None, {}
        for index, name in enumerate(names):
            keys = (lower_key, trunk_key, jax.random.fold_in(upper_key, index))
            parts = init_parts(lower, trunk, groups[name].upper, example, keys)
            params = parts["trunk"]
            own = (parts["lower"], parts["upper"])
            state = SplitClientState(*own, client_optimizer.init(own))
            clients[name] = trees.broadcast_clients(state, sizes[name])
        return FedBoneState(jnp.zeros((), jnp.int32), params, server.init(params), clients)

    def one_group_step(name, trunk_params, state: SplitClientState, batches: Batch, copies: bool):
        """Every client's gradients at the trunk (or its copy of it), and its own parts after the step."""
        group = groups[name]

        def one(own, trunk_params, batch):
            result = split_step(
                lower, trunk, group.upper, group.task, own.lower, trunk_params, own.upper, batch, wire_dtype
            )
            below = result.lower if embedding_sync != "frozen" else optax.tree.zeros_like(result.lower)
            (new_lower, new_upper), optimizer = apply_gradient(
                client_optimizer, (below, result.upper), own.optimizer, (own.lower, own.upper)
            )
            if embedding_sync == "frozen":
                new_lower = own.lower  # weight decay would move it
            return SplitClientState(new_lower, new_upper, optimizer), result.trunk, result.loss

        return jax.vmap(one, (0, 0 if copies else None, 0))(state, trunk_params, batches)

    def all_clients_step(trunk_params, clients, cohorts, key, copies):
        """One lock-step step: new client states, trunk gradients and losses ``[all clients]``, who counts."""
        moved, gradients, losses, there = {}, [], [], []
        for index, name in enumerate(names):
            cohort, own_key = cohorts[name], jax.random.fold_in(key, index)

            def draw(inputs, cohort=cohort, own_key=own_key):
                me = view(cohort.federation.examples, inputs, jnp.zeros((), jnp.int32), own_key)
                return draw_batch(me, batch_size, jax.random.fold_in(own_key, inputs.client_ids))

            batches = jax.vmap(draw)(cohort_inputs(cohort))
            own_trunk = trunk_params[name] if copies else trunk_params
            new, gradient, loss = one_group_step(name, own_trunk, clients[name], batches, copies)
            finite = jax.vmap(is_finite)((gradient, loss, new.lower, new.upper))
            counts = cohort.present & finite
            moved[name] = _where_clients(counts, new, clients[name])
            gradients.append(gradient)
            losses.append(loss)
            there.append(counts)
        join = lambda parts: jax.tree.map(lambda *x: jnp.concatenate(x), *parts)  # noqa: E731
        return moved, join(gradients), jnp.concatenate(losses), jnp.concatenate(there)

    def server_step(params, server_state, gradients, losses, there, cohorts, key):
        shares = jnp.concatenate([cohorts[name].shares for name in names])
        weights = jnp.where(there, shares if weighting == "samples" else 1.0, 0)
        weights = weights / jnp.maximum(jnp.sum(weights), 1e-30)
        steps, server_state = server.update(
            gradients,
            server_state,
            params,
            weights=weights,
            losses=losses,
            client_ids=jnp.concatenate([offsets[name] + cohorts[name].client_ids for name in names]),
            present=there,
            key=key,
        )
        check_step(steps, params)
        return optax.apply_updates(params, steps), server_state

    def one_round(state, cohorts, key):
        if set(cohorts) != set(names):
            raise ValueError(
                f"the cohorts are of groups {sorted(cohorts)}, the algorithm is for {names}; use sampling.by_group"
            )
        clients = {n: trees.take_clients(state.clients[n], cohorts[n].client_ids) for n in names}
        run = {"step": step_round, "round": frozen_round, "drift": drifting_round}[schedule]
        params, server_state, clients, losses, there, statistics = run(state, clients, cohorts, key)
        kept = {
            n: trees.put_clients(state.clients[n], cohorts[n].client_ids, clients[n], cohorts[n].present)
            for n in names
        }
        if embedding_sync == "fedavg":
            kept = synchronise(kept, clients, cohorts)
        present = jnp.concatenate([cohorts[name].present for name in names])
        metrics = _mean_losses(losses, there, names, cohorts) | statistics
        metrics["diverged"] = jnp.sum(present & ~jnp.all(there, axis=0)).astype(jnp.float32)
        return FedBoneState(state.round + 1, params, server_state, kept), metrics

    def step_round(state, clients, cohorts, key):
        def body(carry, step_key):
            params, server_state, clients = carry
            data_key, server_key = jax.random.split(step_key)
            clients, gradients, losses, there = all_clients_step(params, clients, cohorts, data_key, False)
            params, server_state = server_step(
                params, server_state, gradients, losses, there, cohorts, server_key
            )
            return (params, server_state, clients), (losses, there, aggregation_statistics(server_state))

        carry = (state.params, state.server, clients)
        carry, (losses, there, statistics) = jax.lax.scan(body, carry, jax.random.split(key, num_steps))
        return *carry, losses, there, jax.tree.map(jnp.mean, statistics)

    def frozen_round(state, clients, cohorts, key):
        keys = jax.random.split(key, num_steps + 1)

        def body(carry, step_key):
            clients, total, number = carry
            clients, gradients, losses, there = all_clients_step(
                state.params, clients, cohorts, step_key, False
            )
            total = optax.tree.add(total, trees.mask_clients(gradients, there))
            return (clients, total, number + there), (losses, there)

        zero = trees.broadcast_clients(optax.tree.zeros_like(state.params), _slots(cohorts))
        (clients, total, number), (losses, there) = jax.lax.scan(
            body, (clients, zero, jnp.zeros(_slots(cohorts))), keys[1:]
        )
        mean = trees.scale_clients(1 / jnp.maximum(number, 1), total)
        last = jnp.mean(losses, axis=0, where=there)
        params, server_state = server_step(
            state.params, state.server, mean, last, number > 0, cohorts, keys[0]
        )
        return params, server_state, clients, losses, there, aggregation_statistics(server_state)

    def drifting_round(state, clients, cohorts, key):
        keys = jax.random.split(key, num_steps + 1)
        start = trees.broadcast_clients(state.params, _slots(cohorts))
        ends = {
            n: (offset, cohorts[n].present.shape[0]) for n, offset in _slot_offsets(names, cohorts).items()
        }

        def body(carry, step_key):
            clients, copies = carry
            by_group = {
                n: jax.tree.map(lambda x, a=a, k=k: x[a : a + k], copies) for n, (a, k) in ends.items()
            }
            clients, gradients, losses, there = all_clients_step(by_group, clients, cohorts, step_key, True)
            moved = jax.tree.map(lambda c, g: c - trunk_learning_rate * g, copies, gradients)
            return (clients, _where_clients(there, moved, copies)), (losses, there)

        (clients, copies), (losses, there) = jax.lax.scan(body, (clients, start), keys[1:])
        moved = optax.tree.scale(1 / (trunk_learning_rate * num_steps), optax.tree.sub(start, copies))
        last = jnp.mean(losses, axis=0, where=there)
        anything = jnp.any(there, axis=0)
        params, server_state = server_step(
            state.params, state.server, moved, last, anything, cohorts, keys[0]
        )
        return params, server_state, clients, losses, there, aggregation_statistics(server_state)

    def synchronise(population, clients, cohorts):
        """The mean embedding of those present, by examples, sent to everybody; optimiser moments stay local."""
        weights = {name: jnp.where(cohorts[name].present, cohorts[name].shares, 0) for name in names}
        total = sum(jnp.sum(w) for w in weights.values())
        shares = {name: w / jnp.maximum(total, 1e-30) for name, w in weights.items()}
        parts = [trees.weighted_sum(shares[name], clients[name].lower) for name in names]
        mean = jax.tree.map(lambda *x: sum(x[1:], x[0]), *parts)

        def receive(state):
            everybody = trees.broadcast_clients(mean, clients_in(state))
            return state._replace(lower=trees.where(total > 0, everybody, state.lower))

        return {name: receive(population[name]) for name in names}

    def predict(state, client_ids, inputs):
        def one(own, x, name):
            features = trunk.apply(state.params, lower.apply(own.lower, x))
            return groups[name].upper.apply(own.upper, features)

        return {
            name: jax.vmap(lambda own, x, name=name: one(own, x, name))(
                trees.take_clients(state.clients[name], ids), inputs[name]
            )
            for name, ids in client_ids.items()
        }

    def adapt(state, newcomers, key):
        clients = dict(state.clients)
        for index, (name, federation) in enumerate(sorted(newcomers.items())):
            mean = jax.tree.map(lambda x: jnp.mean(x, axis=0), state.clients[name].lower)
            keys = (key, key, jax.random.fold_in(key, index))
            fresh = init_parts(lower, trunk, groups[name].upper, example, keys)["upper"]
            own = SplitClientState(mean, fresh, client_optimizer.init((mean, fresh)))
            clients[name] = trees.broadcast_clients(own, federation.num_clients)
        return state._replace(clients=clients)

    def traffic(state):
        shapes = state.clients[names[0]].lower
        first = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), shapes)
        one = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), example)
        embeddings = jax.eval_shape(lower.apply, first, one)
        features = jax.eval_shape(trunk.apply, state.params, embeddings)
        values = sum(x.size for x in jax.tree.leaves((embeddings, features)))
        width = 4 if wire_dtype is None else jnp.dtype(wire_dtype).itemsize
        size = width * num_steps * batch_size * values
        size += costs.tree_bytes(first) if embedding_sync == "fedavg" else 0
        return size, size

    return Algorithm(init, one_round, predict, adapt, traffic, sizes)


def clients_in(state: PyTree) -> int:
    """The length of the client axis."""
    return jax.tree.leaves(state)[0].shape[0]


def _slots(cohorts: dict[str, Cohort]) -> int:
    return sum(cohort.present.shape[0] for cohort in cohorts.values())


def _slot_offsets(names: list[str], cohorts: dict[str, Cohort]) -> dict[str, int]:
    return client_offsets({name: cohorts[name].present.shape[0] for name in names})


def _where_clients(condition: jax.Array, if_true: PyTree, if_false: PyTree) -> PyTree:
    return jax.tree.map(
        lambda a, b: jnp.where(condition.reshape((-1,) + (1,) * (a.ndim - 1)), a, b), if_true, if_false
    )


def aggregation_statistics(server_state: PyTree) -> dict[str, jax.Array]:
    """What GPAggregation reported last, wherever it stands in the server's chain; nothing if it is not there."""
    states = jax.tree.leaves(server_state, is_leaf=lambda s: isinstance(s, GPAggregationState))
    found = [s.statistics for s in states if isinstance(s, GPAggregationState)]
    return found[0] if found else {}


def _mean_losses(losses, there, names, cohorts) -> dict[str, jax.Array]:
    """Mean loss over steps and clients, of all and by group; ``losses`` ``[steps, clients]``."""
    total = jnp.sum(jnp.where(there, losses, 0), axis=0)
    counts = jnp.sum(there, axis=0)
    metrics = {"loss": jnp.sum(total) / jnp.maximum(jnp.sum(counts), 1)}
    for name, offset in _slot_offsets(names, cohorts).items():
        own = slice(offset, offset + cohorts[name].present.shape[0])
        metrics[f"loss/{name}"] = jnp.sum(total[own]) / jnp.maximum(jnp.sum(counts[own]), 1)
    return metrics
