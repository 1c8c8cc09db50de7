"""FedBone (Chen et al., arXiv 2306.17465): clients with small models around one large trunk on the server.

The split, the conflict test, the projection and the final average are the paper's; attention formula, schedule, embedding synchronisation and all values are reconstructed, and every
one of them is an argument. Clients go in lock step; per-client gradients of the trunk are pull-backs at one set of parameters.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedjax_mtl import costs
from fedjax_mtl.clients.split import init_parts
from fedjax_mtl.core import trees
from fedjax_mtl.core.model import Part
from fedjax_mtl.rounds.federated import Algorithm, check_step
from fedjax_mtl.rounds.lock_step import (
    SCHEDULES,
    Cohorts,
    RoundParts,
    Serve,
    SplitClientState,
    SplitGroup,
    lock_step,
    slot_offsets,
)
from fedjax_mtl.rounds.population import check_group_sizes, client_offsets
from fedjax_mtl.server.projection import check_choice

PyTree = Any

SYNCHRONISATIONS = ("fedavg", "frozen", "local")


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
    check_choice("schedule", schedule, tuple(SCHEDULES))
    check_choice("embedding_sync", embedding_sync, SYNCHRONISATIONS)
    check_choice("weighting", weighting, ("uniform", "samples"))
    check_group_sizes(groups)
    if not batch_size or num_steps < 1 or batch_size < 1:
        raise ValueError(
            f"num_steps is {num_steps} and batch_size {batch_size}; give at least 1 of each"
        )
    names = sorted(groups)
    sizes = {name: groups[name].num_clients for name in names}
    server = optax.with_extra_args_support(server)

    def step_of_all(trunks_apart):
        return lock_step(
            lower,
            trunk,
            groups,
            client_optimizer,
            batch_size,
            train_lower=embedding_sync != "frozen",
            wire_dtype=wire_dtype,
            trunks_apart=trunks_apart,
        )

    serve = _trunk_server(server, client_offsets(sizes), weighting)
    parts = RoundParts(step_of_all(False), step_of_all(True), serve, num_steps, trunk_learning_rate)

    def init(key):
        trunk_key, lower_key, upper_key = jax.random.split(key, 3)
        params, clients = None, {}
        for index, name in enumerate(names):
            keys = (lower_key, trunk_key, jax.random.fold_in(upper_key, index))
            made = init_parts(lower, trunk, groups[name].upper, example, keys)
            params = made["trunk"]
            own = (made["lower"], made["upper"])
            state = SplitClientState(*own, client_optimizer.init(own))
            clients[name] = trees.broadcast_clients(state, sizes[name])
        return FedBoneState(jnp.zeros((), jnp.int32), params, server.init(params), clients)

    def one_round(state, cohorts, key):
        if set(cohorts) != set(names):
            raise ValueError(
                f"the cohorts are of groups {sorted(cohorts)}, the algorithm is for {names}; use sampling.by_group"
            )
        clients = {n: trees.take_clients(state.clients[n], cohorts[n].client_ids) for n in names}
        done = SCHEDULES[schedule](parts, state.params, state.server, clients, cohorts, key)
        kept = {
            n: trees.put_clients(
                state.clients[n], cohorts[n].client_ids, done.clients[n], cohorts[n].present
            )
            for n in names
        }
        if embedding_sync == "fedavg":
            kept = _synchronise(kept, done.clients, cohorts)
        present = jnp.concatenate([cohorts[name].present for name in names])
        metrics = _mean_losses(done.losses, done.counts, cohorts) | done.statistics
        metrics["diverged"] = jnp.sum(present & ~jnp.all(done.counts, axis=0)).astype(jnp.float32)
        return FedBoneState(state.round + 1, done.params, done.server, kept), metrics

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


def _trunk_server(
    server: optax.GradientTransformationExtraArgs, offsets: dict[str, int], weighting: str
) -> Serve:
    """The server's step over the trunk gradients of all clients."""

    def serve(params, server_state, gradients, losses, there, cohorts, key):
        names = sorted(cohorts)
        shares = jnp.concatenate([cohorts[name].shares for name in names])
        weights = jnp.where(there, shares if weighting == "samples" else 1.0, 0)
        steps, server_state = server.update(
            gradients,
            server_state,
            params,
            weights=weights / jnp.maximum(jnp.sum(weights), 1e-30),
            losses=losses,
            client_ids=jnp.concatenate(
                [offsets[name] + cohorts[name].client_ids for name in names]
            ),
            present=there,
            key=key,
        )
        check_step(steps, params)
        return optax.apply_updates(params, steps), server_state

    return serve


def _synchronise(
    population: dict[str, SplitClientState], clients: dict[str, SplitClientState], cohorts: Cohorts
) -> dict[str, SplitClientState]:
    """The mean embedding of those present, by examples, sent to everybody; optimiser moments stay local."""
    weights = {name: jnp.where(c.present, c.shares, 0) for name, c in sorted(cohorts.items())}
    total = sum(jnp.sum(w) for w in weights.values())
    shares = {name: w / jnp.maximum(total, 1e-30) for name, w in weights.items()}
    parts = [trees.weighted_sum(share, clients[name].lower) for name, share in shares.items()]
    mean = jax.tree.map(lambda *x: sum(x[1:], x[0]), *parts)

    def receive(state):
        everybody = jax.tree.map(lambda m, own: jnp.broadcast_to(m, own.shape), mean, state.lower)
        return state._replace(lower=trees.where(total > 0, everybody, state.lower))

    return {name: receive(state) for name, state in population.items()}


def _mean_losses(losses: jax.Array, counts: jax.Array, cohorts: Cohorts) -> dict[str, jax.Array]:
    """Mean loss over steps and clients, of all and by group; ``losses`` ``[steps, clients]``."""
    total = jnp.sum(jnp.where(counts, losses, 0), axis=0)
    steps = jnp.sum(counts, axis=0)
    metrics = {"loss": jnp.sum(total) / jnp.maximum(jnp.sum(steps), 1)}
    for name, offset in slot_offsets(cohorts).items():
        own = slice(offset, offset + cohorts[name].present.shape[0])
        metrics[f"loss/{name}"] = jnp.sum(total[own]) / jnp.maximum(jnp.sum(steps[own]), 1)
    return metrics
