"""GPAggregation, the server of FedBone (Chen et al., arXiv 2306.17465).

It attends to its own history, projects conflicting updates, and averages.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedjax_mtl.core import trees
from fedjax_mtl.core.checks import InputError, check_choice
from fedjax_mtl.server.facts import mean_weights, num_rows, numbers_of, who_is_there
from fedjax_mtl.server.gram import (
    CONFLICTS,
    GRANULARITIES,
    Statistics,
    conflicts,
    full_precision,
    over_parts,
)
from fedjax_mtl.server.projection import ORDERS, partner_orders, projection_coefficients
from fedjax_mtl.server.reports import Report, no_scalars, scalars

PyTree = Any

ATTENTIONS = ("softmax_cosine", "softmax_dot", "none")


class GPAggregationState(NamedTuple):
    """What GPAggregation remembers.

    Attributes:
        history: the previous aggregate, a pytree like the parameters.
        started: bool ``[]``; whether there is one.
        report: scalars of the last aggregation: ``conflict_fraction`` (share of the pairs with a
            negative cosine), ``mean_cosine``, ``attention_spread`` (largest minus smallest), and
            ``norm_ratio`` (of the aggregate to the plain weighted mean).
    """

    history: PyTree
    started: jax.Array
    report: Report


class Merged(NamedTuple):
    """A cohort in which every group is one client; without groups it is the cohort itself.

    Attributes:
        gather: ``[clients, clients]``; rows that average each group into its first present member.
        present: bool ``[clients]``; who stands for somebody.
        weights: ``[clients]``.
    """

    gather: jax.Array
    present: jax.Array
    weights: jax.Array


def _merge_groups(
    groups: jax.Array | None, client_ids: jax.Array, present: jax.Array, weights: jax.Array
) -> Merged:
    count = client_ids.shape[0]
    if groups is None:
        return Merged(jnp.eye(count), present, weights)
    own = jnp.asarray(groups)[client_ids]
    together = (own[:, None] == own[None, :]) & present[:, None] & present[None, :]
    first = present & (jnp.argmax(together, axis=1) == jnp.arange(count))
    members = jnp.where(first[:, None] & together, weights, 0)
    total = jnp.sum(members, axis=1)
    return Merged(members / jnp.where(total > 0, total, 1)[:, None], first, total)


class Products(NamedTuple):
    """Inner products of a merged cohort's updates.

    Attributes:
        gram: with each other, ``[clients, clients]``.
        history: with the history, ``[clients]``.
        history_squared: of the history with itself, ``[]``.
    """

    gram: jax.Array
    history: jax.Array
    history_squared: jax.Array


@full_precision
def _products(merged: Merged, part: PyTree, history: PyTree) -> Products:
    one = jax.tree.map(lambda leaf: leaf[None], history)
    return Products(
        merged.gather @ trees.inner_products(part, part) @ merged.gather.T,
        merged.gather @ trees.inner_products(part, one)[:, 0],
        trees.inner_products(one, one)[0, 0],
    )


def attention_to_history(
    kind: str,
    temperature: float,
    products: jax.Array,
    squared: jax.Array,
    history_squared: jax.Array,
    size: int,
) -> jax.Array:
    """Unnormalised attention scores of each update to the history, ``[clients]``.

    Args:
        kind: ``softmax_cosine`` or ``softmax_dot``; see :func:`gp_aggregation`.
        temperature: of the softmax that follows.
        products: of the updates with the history, ``[clients]``.
        squared: squared norms of the updates, ``[clients]``.
        history_squared: squared norm of the history, ``[]``.
        size: the number of parameters.
    """
    if kind == "softmax_cosine":
        norms = jnp.maximum(jnp.sqrt(squared), 1e-12) * jnp.maximum(
            jnp.sqrt(history_squared), 1e-12
        )
        return products / norms / temperature
    return products / jnp.sqrt(size) / temperature


def _attention(
    kind: str,
    temperature: float,
    products: Products,
    size: int,
    present: jax.Array,
    started: jax.Array,
) -> jax.Array:
    """The factors of the updates, ``[clients]``, whose mean over those present is 1."""
    count = present.shape[0]
    if kind == "none":
        return jnp.ones(count)
    scores = attention_to_history(
        kind,
        temperature,
        products.history,
        jnp.diagonal(products.gram),
        products.history_squared,
        size,
    )
    rescaled = jnp.sum(present) * jax.nn.softmax(scores, where=present)
    known = started & (products.history_squared > 1e-24)
    return jnp.where(known, rescaled, 1.0)


@full_precision
def _aggregation_statistics(
    gram: jax.Array, merged: Merged, attention: jax.Array, row: jax.Array
) -> Statistics:
    """What :class:`GPAggregationState` reports; ``row`` are the coefficients of the aggregate."""
    there, weights = merged.present, merged.weights
    length, plain = jnp.maximum(row @ gram @ row, 0), jnp.maximum(weights @ gram @ weights, 0)
    smallest = jnp.min(attention, where=there, initial=jnp.inf) * jnp.any(there)
    return {
        **conflicts(gram, there),
        "attention_spread": jnp.max(attention, where=there, initial=0) - smallest,
        "norm_ratio": jnp.sqrt(length / jnp.maximum(plain, 1e-30)),
    }


@full_precision
def _aggregate(
    attention: str,
    temperature: float,
    project: bool,
    merged: Merged,
    orders: jax.Array,
    started: jax.Array,
    part: PyTree,
    history: PyTree,
) -> tuple[PyTree, Statistics]:
    """The aggregate of a part of the updates, ``[clients, ...] -> [...]``."""
    products = _products(merged, part, history)
    size = sum(leaf.size for leaf in jax.tree.leaves(history))
    attend = _attention(attention, temperature, products, size, merged.present, started)
    count = merged.present.shape[0]
    coefficients = projection_coefficients(products.gram, orders) if project else jnp.eye(count)
    row = (merged.weights * attend) @ coefficients
    statistics = _aggregation_statistics(products.gram, merged, attend, row)
    return trees.weighted_sum(row @ merged.gather, part), statistics


def _remember(
    state: GPAggregationState, aggregate: PyTree, decay: float, anybody: jax.Array
) -> PyTree:
    """The next history: the aggregate, or its running mean; the old one if nobody was there."""
    kept = jnp.where(state.started, decay, 0.0)
    return jax.tree.map(
        lambda h, r: jnp.where(anybody, (kept * h + (1 - kept) * r).astype(h.dtype), h),
        state.history,
        aggregate,
    )


def gp_aggregation(
    *,
    attention: str = "softmax_cosine",
    project: bool = True,
    temperature: float = 1.0,
    order: str = "index",
    granularity: str = "global",
    history_decay: float = 0.0,
    groups: jax.Array | None = None,
) -> optax.GradientTransformationExtraArgs:
    """FedBone's GPAggregation (arXiv 2306.17465, algorithm 2), ``[clients, ...] -> [...]``.

    Attention to the history, then projection, then the average:

        g_i <- a_i g_i,  a = clients * softmax(s / temperature),  s_i = cos(g_i, history)
        v_i <- g_i projected onto the normal planes of the g_j it conflicts with
        result = sum_i weights_i v_i,  history <- result

    The conflict test, the projection and the average are the paper's (as others report them). The
    attention formula could not be verified and is a reconstruction, as are order, weights and what
    the history holds. Positive scalars change no projection, so attention only re-weights PCGrad's
    result.

    Args:
        attention: ``softmax_cosine``, ``softmax_dot`` (``s_i = g_i . history / sqrt(parameters)``)
            or ``none``. All factors are 1 while there is no history.
        project: False leaves conflicts alone (for ablation).
        temperature: of the softmax.
        order: of the partners, ``index`` or ``random``, as for :func:`project_conflicts`.
        granularity: ``global`` or ``per_leaf``, as for :func:`project_conflicts`.
        history_decay: 0 keeps the last aggregate, d > 0 the running mean
            ``d * history + (1 - d) * aggregate``.
        groups: int ``[population]``; updates of clients of one group (e.g. one task) are averaged
            by their weights first, and the group weighs their sum.

    Extra arguments used: ``weights`` (default uniform), ``client_ids``, ``present``, ``key``
    (random order). Reports what :class:`GPAggregationState` says.

    Raises:
        InputError: an unknown choice, a decay outside [0, 1), or (when traced) no key for random
            order.
    """
    check_choice("attention", attention, ATTENTIONS)
    check_choice("order", order, ORDERS)
    check_choice("granularity", granularity, GRANULARITIES)
    if not 0 <= history_decay < 1:
        raise InputError(f"history_decay is {history_decay}; give 0 <= history_decay < 1")

    def init(params: PyTree) -> GPAggregationState:
        names = (*CONFLICTS, "attention_spread", "norm_ratio")
        zeros = optax.tree.zeros_like(params)
        return GPAggregationState(zeros, jnp.zeros((), bool), no_scalars(names))

    def update(
        updates,
        state,
        params=None,
        *,
        weights=None,
        client_ids=None,
        present=None,
        key=None,
        **extra_args,
    ):
        del params, extra_args
        updates = trees.mask_clients(updates, present)
        there = who_is_there(updates, present)
        orders = partner_orders(order, num_rows(updates), client_ids, key)
        ids = numbers_of(updates, client_ids)
        merged = _merge_groups(groups, ids, there, mean_weights(there, weights))
        aggregate = functools.partial(
            _aggregate, attention, temperature, project, merged, orders, state.started
        )
        result, statistics = over_parts(granularity, aggregate, updates, state.history)
        anybody = jnp.any(merged.present)
        history = _remember(state, result, history_decay, anybody)
        return result, GPAggregationState(history, state.started | anybody, scalars(statistics))

    return optax.GradientTransformationExtraArgs(init, update)
