"""What an algorithm is, and the two general compositions: around a server, and around a graph."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedjax_mtl import costs
from fedjax_mtl.clients.updates import ClientResult, ClientUpdate
from fedjax_mtl.core import trees
from fedjax_mtl.core.federation import ClientView, Cohort, Federation
from fedjax_mtl.execution import (
    Execution,
    default_execution,
    map_clients,
    sum_and_map_clients,
)
from fedjax_mtl.server.averaging import only_averages

PyTree = Any
Metrics = dict[str, jax.Array]
Weighting = str | Callable[[Cohort], jax.Array]


class Algorithm(NamedTuple):
    """A federated algorithm as pure functions over an explicit state pytree.

    Attributes:
        init: ``key -> state``.
        round: ``(state, cohort, key) -> (state, metrics)``; metrics are scalars, ``loss`` among them.
        predict: ``(state, client_ids [clients], inputs [clients, batch, ...]) -> outputs [clients, batch, ...]``: each client's
            own personalised model.
        adapt: ``(state, newcomers: Federation, key) -> state``, a state whose clients are the newcomers.
        traffic: ``state -> (bytes up, bytes down)``, what one participating client sends and receives in a round.
        num_clients: clients in the population the algorithm was made for; of a heterogeneous one, by group.
        tuned: clients are judged after ``adapt`` on their own training data, trained or not (FedAvg + tuning).
    """

    init: Callable[[jax.Array], PyTree]
    round: Callable[[PyTree, Cohort, jax.Array], tuple[PyTree, Metrics]]
    predict: Callable[[PyTree, jax.Array, PyTree], PyTree]
    adapt: Callable[[PyTree, Federation, jax.Array], PyTree]
    traffic: Callable[[PyTree], tuple[int, int]]
    num_clients: int | dict[str, int]
    tuned: bool = False


def cohort_weights(weighting: Weighting, cohort: Cohort) -> jax.Array:
    """The clients' aggregation weights, float ``[cohort]``; absent clients weigh 0.

    ``samples``: n_t over the cohort's examples. ``uniform``: 1 over the clients present. ``population``: n_t / N of the whole population, so
    that clients who stayed away count with the model they were sent (Li et al., arXiv 1907.02189, table 1; FedEM's server).
    Otherwise a function of the cohort.
    """
    present = cohort.present.astype(cohort.shares.dtype)
    if weighting == "samples":
        return cohort.shares / jnp.maximum(jnp.sum(cohort.shares), 1e-30)
    if weighting == "uniform":
        return present / jnp.maximum(jnp.sum(present), 1)
    if weighting == "population":
        return cohort.shares
    if callable(weighting):
        return jnp.where(cohort.present, weighting(cohort), 0)
    raise ValueError(
        f"unknown weighting {weighting!r}; expected 'samples', 'uniform', 'population' or a function of the cohort"
    )


def without_diverged(cohort: Cohort, finite: jax.Array) -> Cohort:
    """The cohort in which clients whose update or loss is not finite count as absent; ``finite`` bool ``[cohort]``."""
    present = cohort.present & finite
    return cohort._replace(present=present, shares=jnp.where(present, cohort.shares, 0))


def is_finite(tree: PyTree) -> jax.Array:
    """Whether every entry of every leaf is a number, bool ``[]``."""
    finite = jax.tree.map(lambda leaf: jnp.all(jnp.isfinite(leaf)), tree)
    return jax.tree.reduce(jnp.logical_and, finite, jnp.array(True))


class CohortInputs(NamedTuple):
    """What the client map hands to each client beside its state; leaves ``[cohort, ...]``."""

    client_ids: jax.Array
    rows: jax.Array
    sizes: jax.Array
    budgets: jax.Array


def cohort_inputs(cohort: Cohort) -> CohortInputs:
    """The mapped inputs of a cohort."""
    data = cohort.federation
    return CohortInputs(cohort.client_ids, data.indices, data.sizes, cohort.budgets)


def view(
    examples: PyTree, own: CohortInputs, round_index: jax.Array, round_key: jax.Array
) -> ClientView:
    """The view of one client, whose inputs have no client axis any more."""
    return ClientView(
        examples, own.rows, own.sizes, own.client_ids, own.budgets, round_index, round_key
    )


def client_key(key: jax.Array, client_id: jax.Array) -> jax.Array:
    """A client's key of the round depends on its number alone, not on the cohort or its order."""
    return jax.random.fold_in(key, client_id)


def mean_metrics(metrics: Metrics, weights: jax.Array) -> Metrics:
    """Weighted means over the cohort, ``[cohort] -> []``; of nobody, NaN would spread, so 0."""
    share = weights / jnp.maximum(jnp.sum(weights), 1e-30)
    return {name: jnp.sum(jnp.where(weights > 0, share * v, 0)) for name, v in metrics.items()}


class FederatedState(NamedTuple):
    """The state of a :func:`federated` algorithm.

    Attributes:
        round: int32 ``[]``; rounds done.
        params: the whole model; leaves that are not shared stay as initialised.
        server: the state of the server's transformations.
        clients: what each client keeps, leaves ``[population, ...]``.
    """

    round: jax.Array
    params: PyTree
    server: optax.OptState
    clients: PyTree


def federated(
    init_params: Callable[[jax.Array], PyTree],
    client: ClientUpdate,
    server: optax.GradientTransformation,
    *,
    num_clients: int,
    weighting: Weighting = "samples",
    execution: Execution | None = None,
    full_participation: bool = False,
) -> Algorithm:
    """The general composition: clients update, the server transforms their pseudo-gradients and takes the step.

    Every round, the cohort's clients start from the shared parameters, and

        params <- optax.apply_updates(params, server.update(pseudo-gradients [cohort, ...], ...))

    where the server sees by name ``weights``, ``losses``, ``client_ids``, ``present`` (``[cohort]`` each), ``reports`` (all metrics of the clients) and ``key``. A server that begins with
    ``average_clients()`` never holds the cohort's updates: they are summed as they come.

    A client whose update, loss or state is not finite counts as absent in that round, for the server and in what it keeps; the metric ``diverged`` is the number of such clients. (With a fused
    average clients are told apart by their loss; an update that overflows after it voids the round for all.) Weights that sum to zero make no step.

    Args:
        init_params: ``key -> params``, e.g. a model's ``init``.
        client: what one client does.
        server: usually an ``optax.chain``; its end must be a step, e.g. ``optax.sgd(1.0)``, because pseudo-gradients are descended.
        num_clients: clients in the population.
        weighting: see :func:`cohort_weights`.
        execution: how clients are mapped; default by platform and model size.
        full_participation: refuse cohorts that are not the whole population, for algorithms whose server needs everybody's model.

    Raises:
        ValueError: (when traced) the server's result still has a client axis, or a cohort that full participation forbids.
    """
    server = optax.with_extra_args_support(server)

    def init(key):
        params = init_params(key)
        shared, _ = trees.partition(params, client.shared)
        clients = trees.broadcast_clients(client.init(params), num_clients)
        return FederatedState(jnp.zeros((), jnp.int32), params, server.init(shared), clients)

    def one_round(state, cohort, key):
        if full_participation:
            check_full_participation(cohort, num_clients)
        how = default_execution(state.params) if execution is None else execution
        weights = cohort_weights(weighting, cohort)
        fused = only_averages(state.server)

        def one_client(shared, own, own_state, weight):
            params, examples, round_index, round_key = shared
            me = view(examples, own, round_index, round_key)
            result = client.update(params, own_state, me, client_key(round_key, me.client_id))
            if fused:
                # The loss alone: another pass over every client's update costs small models a twentieth of a round.
                finite = is_finite((result.metrics["loss"], result.state)) | (me.size == 0)
                term = jax.tree.map(
                    lambda x: jnp.where(finite, weight * x, 0).astype(x.dtype),
                    result.pseudo_gradient,
                )
                return term, (result._replace(pseudo_gradient=()), finite)
            finite = is_finite((result.pseudo_gradient, result.metrics["loss"], result.state)) | (
                me.size == 0
            )
            return (), (result, finite)

        client_round_key, server_key = jax.random.split(key)
        total, (results, finite) = sum_and_map_clients(one_client, how, cohort.federation.sizes)(
            (state.params, cohort.federation.examples, state.round, client_round_key),
            cohort_inputs(cohort),
            trees.take_clients(state.clients, cohort.client_ids),
            weights,
        )
        if fused:
            # An update that overflowed after its last loss: nobody's sum can be trusted, the round is void.
            finite = finite & (is_finite(total) | ~cohort.present)
        diverged = jnp.sum(cohort.present & ~finite)
        summed = jnp.sum(jnp.where(finite, weights, 0))
        cohort = without_diverged(cohort, finite)
        weights = cohort_weights(weighting, cohort)
        # 1 unless somebody diverged: the sum was taken with the weights of all.
        rescale = jnp.where(summed > 0, jnp.sum(weights) / jnp.where(summed > 0, summed, 1), 0)
        updates = results.pseudo_gradient
        if fused:
            updates = jax.tree.map(
                lambda x: jnp.where(summed > 0, rescale * x, 0).astype(x.dtype), total
            )
        shared, kept = trees.partition(state.params, client.shared)
        steps, server_state = server.update(
            updates,
            state.server,
            shared,
            weights=weights,
            already_averaged=fused,
            losses=results.metrics["loss"],
            reports=results.metrics,
            client_ids=cohort.client_ids,
            present=cohort.present,
            key=server_key,
        )
        check_step(steps, shared)
        clients = trees.put_clients(state.clients, cohort.client_ids, results.state, cohort.present)
        params = trees.combine(optax.apply_updates(shared, steps), kept)
        state = FederatedState(state.round + 1, params, server_state, clients)
        metrics = mean_metrics(results.metrics, cohort_weights("samples", cohort))
        return state, metrics | {"diverged": diverged.astype(jnp.float32)}

    def predict(state, client_ids, inputs):
        states = trees.take_clients(state.clients, client_ids)
        return jax.vmap(client.predict, in_axes=(None, 0, 0))(state.params, states, inputs)

    def adapt(state, newcomers, key):
        how = default_execution(state.params) if execution is None else execution
        clients = adapt_clients(client, how, state.params, state.round, newcomers, key)
        return state._replace(clients=clients)

    def traffic(state):
        size = costs.tree_bytes(trees.partition(state.params, client.shared)[0])
        return size, size

    return Algorithm(init, one_round, predict, adapt, traffic, num_clients)


def check_full_participation(cohort: Cohort, num_clients: int) -> None:
    """Raises ValueError unless the cohort has a slot for every client of the population."""
    if cohort.client_ids.shape[0] != num_clients:
        raise ValueError(
            f"this algorithm needs all {num_clients} clients in every round, the cohort has "
            f"{cohort.client_ids.shape[0]}; use full participation"
        )


def check_step(steps: PyTree, params: PyTree) -> None:
    for step, leaf in zip(jax.tree.leaves(steps), jax.tree.leaves(params), strict=True):
        if step.shape != leaf.shape:
            raise ValueError(
                f"the server turned updates into a step of shape {step.shape} for parameters of shape {leaf.shape}; "
                "put average_clients() (or another transformation that removes the client axis) into its chain"
            )


def newcomer_inputs(newcomers: Federation) -> CohortInputs:
    """Mapped inputs of clients that take part in no round."""
    ids = jnp.arange(newcomers.num_clients, dtype=jnp.int32)
    no_budget = jnp.full_like(ids, jnp.iinfo(jnp.int32).max)
    return CohortInputs(ids, newcomers.indices, newcomers.sizes, no_budget)


def adapt_clients(
    client: ClientUpdate,
    execution: Execution,
    params: PyTree,
    round_index: jax.Array,
    newcomers: Federation,
    key: jax.Array,
) -> PyTree:
    """The states of clients that were never trained with, leaves ``[newcomers, ...]``."""

    def one(shared, own):
        params, examples, round_index, key = shared
        me = view(examples, own, round_index, key)
        return client.adapt(params, me, client_key(key, me.client_id))

    return map_clients(one, execution, newcomers.sizes)(
        (params, newcomers.examples, round_index, key), newcomer_inputs(newcomers)
    )


class DecentralizedState(NamedTuple):
    """Every client's own model, leaves of ``params`` and ``clients`` ``[population, ...]``."""

    round: jax.Array
    params: PyTree
    clients: PyTree


def decentralized(
    init_params: Callable[[jax.Array], PyTree],
    client: ClientUpdate,
    mixing_matrix: jax.Array,
    *,
    execution: Execution | None = None,
) -> Algorithm:
    """The serverless composition: each client updates its own copy, then averages with its neighbours on a graph.

        params_s <- sum_t W[s, t] (params_t - pseudo-gradient_t)

    Works with every client update: D-SGD from ``local_trainer``, D-FedEM from FedEM's. All clients start from the same
    parameters and take part in every round.

    Args:
        init_params, client, execution: as for :func:`federated`.
        mixing_matrix: ``[population, population]``, rows sum to 1; see ``topology``.

    Raises:
        ValueError: the matrix is not square or a row does not sum to 1; (when traced) a cohort that is not the whole population.
    """
    check_mixing_matrix(mixing_matrix)
    num_clients = mixing_matrix.shape[0]

    def init(key):
        params = init_params(key)
        copies = trees.broadcast_clients(params, num_clients)
        states = trees.broadcast_clients(client.init(params), num_clients)
        return DecentralizedState(jnp.zeros((), jnp.int32), copies, states)

    def one_round(state, cohort, key):
        check_full_participation(cohort, num_clients)
        how = _execution_of_copies(state.params, execution)

        def one_client(shared, own, params, own_state) -> tuple[PyTree, ClientResult]:
            examples, round_index, round_key = shared
            me = view(examples, own, round_index, round_key)
            result = client.update(params, own_state, me, client_key(round_key, me.client_id))
            moving, kept = trees.partition(params, client.shared)
            trained = trees.combine(optax.tree.sub(moving, result.pseudo_gradient), kept)
            return trained, result._replace(pseudo_gradient=())

        ids = cohort.client_ids
        trained, results = map_clients(one_client, how, cohort.federation.sizes)(
            (cohort.federation.examples, state.round, key),
            cohort_inputs(cohort),
            trees.take_clients(state.params, ids),
            trees.take_clients(state.clients, ids),
        )
        trained = trees.put_clients(state.params, ids, trained, cohort.present)
        mixed = jax.tree.map(
            lambda leaf: jnp.tensordot(mixing_matrix.astype(leaf.dtype), leaf, 1), trained
        )
        clients = trees.put_clients(state.clients, ids, results.state, cohort.present)
        state = DecentralizedState(state.round + 1, mixed, clients)
        return state, mean_metrics(results.metrics, cohort_weights("samples", cohort))

    def predict(state, client_ids, inputs):
        params = trees.take_clients(state.params, client_ids)
        states = trees.take_clients(state.clients, client_ids)
        return jax.vmap(client.predict)(params, states, inputs)

    def adapt(state, newcomers, key):
        # A newcomer has no neighbours yet; it asks everybody, and starts from the average model.
        mean = jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), state.params)
        how = default_execution(mean) if execution is None else execution
        clients = adapt_clients(client, how, mean, state.round, newcomers, key)
        return DecentralizedState(
            state.round, trees.broadcast_clients(mean, newcomers.num_clients), clients
        )

    def traffic(state):
        moving = trees.partition(state.params, client.shared)[0]
        edges = (np.asarray(mixing_matrix) > 0) & ~np.eye(num_clients, dtype=bool)
        neighbours = np.mean(np.sum(edges, axis=1))
        size = int(round(neighbours * costs.tree_bytes(moving) / num_clients))
        return size, size

    return Algorithm(init, one_round, predict, adapt, traffic, num_clients)


def _execution_of_copies(params: PyTree, execution: Execution | None) -> Execution:
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), params)
    return default_execution(one) if execution is None else execution


def check_mixing_matrix(matrix: jax.Array) -> None:
    """Raises ValueError unless the matrix is square, not negative, and each of its rows sums to 1."""
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(
            f"the mixing matrix has shape {matrix.shape}; it must be [clients, clients]"
        )
    if isinstance(matrix, jax.core.Tracer):
        return  # a mapped hyper-parameter: its values are not known yet
    matrix = np.asarray(matrix)
    sums = matrix.sum(axis=1)
    worst = int(np.argmax(np.abs(sums - 1)))
    if abs(sums[worst] - 1) > 1e-3:
        raise ValueError(
            f"row {worst} of the mixing matrix sums to {sums[worst]:.4f}, not 1; normalise it, "
            "e.g. with topology.metropolis_weights"
        )
    if matrix.min() < -1e-6:
        raise ValueError(f"the mixing matrix has a negative entry ({matrix.min():.3g})")
