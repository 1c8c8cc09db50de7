"""The general composition of systems in which every client keeps a model of its own and the server relates them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedjax_mtl import costs
from fedjax_mtl.clients.updates import ClientUpdate
from fedjax_mtl.core import trees
from fedjax_mtl.execution import Execution, default_execution, map_clients
from fedjax_mtl.rounds.federated import (
    Algorithm,
    Weighting,
    adapt_clients,
    check_full_participation,
    client_key,
    cohort_inputs,
    cohort_weights,
    is_finite,
    mean_metrics,
    view,
    without_diverged,
)

PyTree = Any


class RelationalState(NamedTuple):
    """The state of a :func:`relational` algorithm.

    Attributes:
        round: int32 ``[]``; rounds done.
        params: leaves that travel ``[population, ...]``, what the server holds for each client; all others once, as initialised.
        server: the state of the server's transformations. clients: what each client keeps, leaves ``[population, ...]``.
    """

    round: jax.Array
    params: PyTree
    server: optax.OptState
    clients: PyTree


def relational(
    init_params: Callable[[jax.Array], PyTree],
    client: ClientUpdate,
    server: optax.GradientTransformation,
    *,
    num_clients: int,
    weighting: Weighting = "uniform",
    execution: Execution | None = None,
    full_participation: bool = False,
) -> Algorithm:
    """Clients update, each from its own parameters, and the server mixes what comes back: there is no global model.

        params[cohort] <- optax.apply_updates(params[cohort], server.update(pseudo-gradients [cohort, ...], ...))

    The server's transformations keep the client axis (:mod:`fedjax_mtl.server.mixing`), and any others that keep it may stand before or between them: projections, clipping,
    compression. They see by name what :func:`fedjax_mtl.rounds.federated.federated` passes, as ``params`` the cohort's ``[cohort, ...]``, and ``population_params`` ``[population, ...]``. Clients
    that were not sampled keep theirs.

    Leaves that neither travel nor belong to a client's state are held once for everybody, e.g. frozen base weights under adapters. All clients start alike.
    A client whose update, loss or state is not finite counts as absent (metric ``diverged``). A newcomer is sent the mean of all clients' parameters.

    Args:
        init_params, client, num_clients, weighting, execution, full_participation: as for :func:`fedjax_mtl.rounds.federated.federated`.
        server: usually an ``optax.chain``; its end must be a step, e.g. ``optax.sgd(1.0)``.

    Raises:
        ValueError: (when traced) the server lost the client axis, or a cohort that full participation forbids.
    """
    server = optax.with_extra_args_support(server)

    def split(params):
        return trees.partition(params, client.shared)

    def how(params):
        one = jax.eval_shape(lambda p: _of_one(p, client), params)
        return default_execution(one) if execution is None else execution

    def init(key):
        params = init_params(key)
        shared, kept = split(params)
        copies = trees.broadcast_clients(shared, num_clients)
        clients = trees.broadcast_clients(client.init(params), num_clients)
        return RelationalState(
            jnp.zeros((), jnp.int32), trees.combine(copies, kept), server.init(copies), clients
        )

    def one_round(state, cohort, key):
        if full_participation:
            check_full_participation(cohort, num_clients)
        population, kept = split(state.params)
        starts = trees.take_clients(population, cohort.client_ids)
        client_round_key, server_key = jax.random.split(key)

        def one_client(common, own, start, own_state):
            kept, examples, round_index, round_key = common
            me = view(examples, own, round_index, round_key)
            params = trees.combine(start, kept)
            result = client.update(params, own_state, me, client_key(round_key, me.client_id))
            sound = is_finite((result.pseudo_gradient, result.metrics["loss"], result.state))
            return result, sound | (me.size == 0)

        results, finite = map_clients(one_client, how(state.params), cohort.federation.sizes)(
            (kept, cohort.federation.examples, state.round, client_round_key),
            cohort_inputs(cohort),
            starts,
            trees.take_clients(state.clients, cohort.client_ids),
        )
        diverged = jnp.sum(cohort.present & ~finite)
        cohort = without_diverged(cohort, finite)
        steps, server_state = server.update(
            results.pseudo_gradient,
            state.server,
            starts,
            population_params=population,
            weights=cohort_weights(weighting, cohort),
            losses=results.metrics["loss"],
            reports=results.metrics,
            client_ids=cohort.client_ids,
            present=cohort.present,
            key=server_key,
        )
        check_client_axis(steps, starts)
        moved = optax.apply_updates(starts, steps)
        state = RelationalState(
            state.round + 1,
            trees.combine(
                trees.put_clients(population, cohort.client_ids, moved, cohort.present), kept
            ),
            server_state,
            trees.put_clients(state.clients, cohort.client_ids, results.state, cohort.present),
        )
        metrics = mean_metrics(results.metrics, cohort_weights("samples", cohort))
        return state, metrics | {"diverged": diverged.astype(jnp.float32)}

    def predict(state, client_ids, inputs):
        shared, kept = split(state.params)

        def one(own, own_state, x):
            return client.predict(trees.combine(own, kept), own_state, x)

        own = trees.take_clients(shared, client_ids)
        return jax.vmap(one)(own, trees.take_clients(state.clients, client_ids), inputs)

    def adapt(state, newcomers, key):
        shared, kept = split(state.params)
        mean = jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), shared)
        start = trees.combine(mean, kept)
        clients = adapt_clients(client, how(state.params), start, state.round, newcomers, key)
        copies = trees.broadcast_clients(mean, newcomers.num_clients)
        return state._replace(params=trees.combine(copies, kept), clients=clients)

    def traffic(state):
        size = costs.tree_bytes(split(state.params)[0]) // num_clients
        return size, size

    return Algorithm(init, one_round, predict, adapt, traffic, num_clients)


def _of_one(params: PyTree, client: ClientUpdate) -> PyTree:
    """One client's parameters out of a state's: what decides how many fit into a chunk. Leaves held once do not count."""
    return jax.tree.map(lambda leaf: leaf[0], trees.partition(params, client.shared)[0])


def check_client_axis(steps: PyTree, starts: PyTree) -> None:
    """Raises ValueError if the server's step has lost the client axis."""
    for step, start in zip(jax.tree.leaves(steps), jax.tree.leaves(starts), strict=True):
        if step.shape != start.shape:
            raise ValueError(
                f"the server turned updates into a step of shape {step.shape} for the cohort's parameters of shape "
                f"{start.shape}; average_clients() and its kin remove the client axis: use them in federated(...), or a transformation that keeps it"
            )
