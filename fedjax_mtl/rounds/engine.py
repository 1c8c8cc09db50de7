"""The engine: what happens to a cohort in a round, whatever is then made of its results.

Here, and nowhere else, a client gets its view and its key, its result is tested for being finite,
clients that are absent or diverged are masked, and the metrics of a cohort become means. On it
stands the composition :func:`fedjax_mtl.rounds.federated.federated`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_mtl.clients.updates import ClientResult, ClientUpdate
from fedjax_mtl.core import trees
from fedjax_mtl.core.checks import InputError
from fedjax_mtl.core.federation import NO_BUDGET, ClientView, Cohort, Federation
from fedjax_mtl.execution import Execution, map_clients, sum_and_map_clients

PyTree = Any
Metrics = dict[str, jax.Array]
Weighting = str | Callable[[Cohort], jax.Array]


def cohort_weights(weighting: Weighting, cohort: Cohort) -> jax.Array:
    """The clients' aggregation weights, float ``[cohort]``; absent clients weigh 0.

    Args:
        weighting: ``samples``, n_t over the cohort's examples; ``uniform``, 1 over the clients
            present; ``population``, n_t / N of the whole population, so that clients who stayed
            away count with the model they were sent (Li et al., arXiv 1907.02189, table 1; FedEM's
            server); or a function of the cohort.
        cohort: who takes part.

    Raises:
        InputError: an unknown name.
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
    raise InputError(
        f"unknown weighting {weighting!r}; expected 'samples', 'uniform', 'population' or a "
        "function of the cohort"
    )


def is_finite(tree: PyTree) -> jax.Array:
    """Whether every entry of every leaf is a number, bool ``[]``."""
    finite = jax.tree.map(lambda leaf: jnp.all(jnp.isfinite(leaf)), tree)
    return jax.tree.reduce(jnp.logical_and, finite, jnp.array(True))


class ClientInputs(NamedTuple):
    """What the client map hands to each client beside its state; leaves ``[cohort, ...]``."""

    client_ids: jax.Array
    rows: jax.Array
    sizes: jax.Array
    budgets: jax.Array
    work: jax.Array


def cohort_inputs(cohort: Cohort) -> ClientInputs:
    """The mapped inputs of a cohort."""
    data = cohort.federation
    return ClientInputs(cohort.client_ids, data.indices, data.sizes, cohort.budgets, cohort.work)


def newcomer_inputs(newcomers: Federation) -> ClientInputs:
    """The mapped inputs of clients that take part in no round."""
    ids = jnp.arange(newcomers.num_clients, dtype=jnp.int32)
    unlimited = jnp.full_like(ids, NO_BUDGET)
    everything = jnp.ones(ids.shape, jnp.float32)
    return ClientInputs(ids, newcomers.indices, newcomers.sizes, unlimited, everything)


def client_view(
    examples: PyTree, own: ClientInputs, round_index: jax.Array, round_key: jax.Array
) -> ClientView:
    """The view of one client, whose inputs have no client axis any more."""
    return ClientView(
        examples,
        own.rows,
        own.sizes,
        own.client_ids,
        own.budgets,
        round_index,
        round_key,
        own.work,
    )


def client_key(key: jax.Array, client_id: jax.Array) -> jax.Array:
    """A client's key of the round depends on its number alone, not on the cohort or its order."""
    return jax.random.fold_in(key, client_id)


class Sent(NamedTuple):
    """What a cohort sent, ready for the server.

    Attributes:
        results: leaves ``[cohort, ...]``. Pseudo-gradients and metrics of clients that are absent
            or diverged are 0. ``()`` stands for pseudo-gradients that were summed as they came.
        cohort: without the clients that diverged, who count as absent.
        diverged: bool ``[cohort]``; present, but update, state or loss were not finite.
        total: the weighted sum of the pseudo-gradients, leaves ``[...]``, where only that was asked
            for; else ``()``.
        summed: float ``[cohort]``; the weights that went into ``total``.
    """

    results: ClientResult
    cohort: Cohort
    diverged: jax.Array
    total: PyTree
    summed: jax.Array


def _has_loss_or_no_step(metrics: Metrics) -> jax.Array:
    """A client that made no step has no loss to report (NaN); every other one must have one."""
    made_none = metrics["num_steps"] == 0 if "num_steps" in metrics else False
    return jnp.isfinite(metrics["loss"]) | made_none


def without(cohort: Cohort, leaving: jax.Array) -> Cohort:
    """The cohort in which the clients ``leaving`` (bool ``[cohort]``) count as absent."""
    present = cohort.present & ~leaving
    return cohort._replace(present=present, shares=jnp.where(present, cohort.shares, 0))


def _masked(results: ClientResult, present: jax.Array) -> ClientResult:
    """The results with the rows of everybody who is not ``present`` set to 0, except for states."""
    return results._replace(
        pseudo_gradient=trees.mask_clients(results.pseudo_gradient, present),
        metrics=trees.mask_clients(results.metrics, present),
    )


def receive(results: ClientResult, cohort: Cohort) -> Sent:
    """Tests what a cohort's clients sent, and masks those who are absent or diverged.

    Args:
        results: leaves ``[cohort, ...]``, from :func:`run_cohort`'s client map or from any other
            driver, e.g. clients of a real deployment.
        cohort: who was asked.
    """

    def sound(result):
        finite = is_finite((result.pseudo_gradient, result.state))
        return finite & _has_loss_or_no_step(result.metrics)

    return _received(results, cohort, jax.vmap(sound)(results), (), jnp.zeros(()))


def _received(
    results: ClientResult, cohort: Cohort, sound: jax.Array, total: PyTree, weights: jax.Array
) -> Sent:
    diverged = cohort.present & ~sound
    rest = without(cohort, diverged)
    summed = jnp.where(rest.present, weights, 0)
    return Sent(_masked(results, rest.present), rest, diverged, total, summed)


def run_cohort(
    client: ClientUpdate,
    execution: Execution,
    starts: PyTree | None,
    states: PyTree,
    cohort: Cohort,
    round_index: jax.Array,
    key: jax.Array,
    *,
    shared_start: PyTree | None = None,
    weights: jax.Array | None = None,
    round_key: jax.Array | None = None,
) -> Sent:
    """Runs one client update over a cohort and makes what came back safe for a server.

    Args:
        client: what one client does.
        execution: how clients are mapped.
        starts: the leaves that each client starts from alone, ``[cohort, ...]``, None in the other
            places; or None if all start alike.
        states: what the clients keep between rounds, ``[cohort, ...]``.
        cohort: who takes part, and their data.
        round_index: int32 ``[]``.
        key: of the round's client half; each client's is folded from it by its number.
        shared_start: the leaves that all start from alike, None in the other places.
        weights: float ``[cohort]``. With them only the weighted sum of the pseudo-gradients is
            kept, carried from chunk to chunk, so that memory does not grow with the cohort. Clients
            that diverged are then found by loss and state alone, because another pass over every
            update costs small models a twentieth of a round. An update that overflows after its
            last loss voids the round for all.
        round_key: the key of coins that all clients have in common, where several cohorts with keys
            of their own make up a round; default ``key``.
    """
    keys = (key, key if round_key is None else round_key)
    common = (shared_start, cohort.federation.examples, round_index, keys)
    if weights is None:
        return _run_apart(client, execution, common, starts, states, cohort)
    return _run_summed(client, execution, common, starts, states, cohort, weights)


def _start(own: PyTree | None, shared: PyTree | None) -> PyTree:
    """One client's parameters from the leaves that are its own and those that all have alike."""
    if own is None or shared is None:
        return shared if own is None else own
    return trees.combine(own, shared)


def _update_one(
    client: ClientUpdate, common: PyTree, inputs: ClientInputs, start: PyTree, state: PyTree
) -> ClientResult:
    shared_start, examples, round_index, (key, round_key) = common
    me = client_view(examples, inputs, round_index, round_key)
    params = _start(start, shared_start)
    return client.update(params, state, me, client_key(key, me.client_id))


def _sound(result: ClientResult, update: PyTree) -> jax.Array:
    return is_finite((update, result.state)) & _has_loss_or_no_step(result.metrics)


def _run_apart(
    client: ClientUpdate,
    execution: Execution,
    common: PyTree,
    starts: PyTree | None,
    states: PyTree,
    cohort: Cohort,
) -> Sent:
    def one_client(common, inputs, start, state):
        result = _update_one(client, common, inputs, start, state)
        return result, _sound(result, result.pseudo_gradient)

    results, sound = map_clients(one_client, execution, cohort.federation.sizes)(
        common, cohort_inputs(cohort), starts, states
    )
    return _received(results, cohort, sound, (), jnp.zeros(()))


def _run_summed(
    client: ClientUpdate,
    execution: Execution,
    common: PyTree,
    starts: PyTree | None,
    states: PyTree,
    cohort: Cohort,
    weights: jax.Array,
) -> Sent:
    def one_client(common, inputs, start, state, weight):
        result = _update_one(client, common, inputs, start, state)
        sound = _sound(result, ())
        term = jax.tree.map(
            lambda x: jnp.where(sound, weight * x, 0).astype(x.dtype), result.pseudo_gradient
        )
        return term, (result._replace(pseudo_gradient=()), sound)

    total, (results, sound) = sum_and_map_clients(one_client, execution, cohort.federation.sizes)(
        common, cohort_inputs(cohort), starts, states, weights
    )
    sound = sound & is_finite(total)
    return _received(results, cohort, sound, total, weights)


def check_step(steps: PyTree, params: PyTree) -> None:
    """Raises InputError unless a server's step has the shapes of the parameters that it moves."""
    for step, leaf in zip(jax.tree.leaves(steps), jax.tree.leaves(params), strict=True):
        if step.shape != leaf.shape:
            raise InputError(
                f"the server turned updates into a step of shape {step.shape} for parameters of "
                f"shape {leaf.shape}; put average_clients() (or another transformation that "
                "removes the client axis) into its chain"
            )


def mean_metrics(metrics: Metrics, weights: jax.Array) -> Metrics:
    """Weighted means over a cohort, ``[cohort] -> []``.

    A value that is not finite belongs to a client that has none (no step, no loss) and enters no
    mean; the mean of nobody is NaN.
    """

    def mean(values):
        counts = (weights > 0) & jnp.isfinite(values)
        share = jnp.where(counts, weights, 0)
        total = jnp.sum(share)
        share = share / jnp.maximum(total, 1e-30)
        summed = jnp.sum(jnp.where(counts, share * values, 0))
        return jnp.where(total > 0, summed, jnp.nan)

    return {name: mean(values) for name, values in metrics.items()}


def adapt_clients(
    client: ClientUpdate,
    execution: Execution,
    params: PyTree,
    round_index: jax.Array,
    newcomers: Federation,
    key: jax.Array,
) -> PyTree:
    """The states of clients that were never trained with, leaves ``[newcomers, ...]``."""

    def one(common, inputs):
        params, examples, round_index, key = common
        me = client_view(examples, inputs, round_index, key)
        return client.adapt(params, me, client_key(key, me.client_id))

    return map_clients(one, execution, newcomers.sizes)(
        (params, newcomers.examples, round_index, key), newcomer_inputs(newcomers)
    )
