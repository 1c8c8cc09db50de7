"""Updates that conflict: projections (PCGrad) and the conflict-averse direction (CAGrad).

Both only ever combine the clients' updates linearly, so they work on the Gram matrix ``[clients,
clients]``: one pass over the parameters for the inner products, one to combine, whatever happens
between. FedBone's aggregation (:mod:`fedjax_mtl.server.aggregation`) does too.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fedjax_mtl.core import trees
from fedjax_mtl.core.checks import InputError, check_choice
from fedjax_mtl.server.facts import mean_weights, num_rows, who_is_there
from fedjax_mtl.server.gram import (
    CONFLICTS,
    GRANULARITIES,
    Statistics,
    conflicts,
    full_precision,
    inverse_norms,
    over_parts,
)
from fedjax_mtl.server.reports import no_scalars, scalars

PyTree = Any

ORDERS = ("index", "random")


def partner_orders(
    order: str, count: int, client_ids: jax.Array | None, key: jax.Array | None
) -> jax.Array:
    """In which order each client visits its partners, int32 ``[clients, clients]`` slots.

    A client is among its own partners; the projection skips it.

    Args:
        order: ``index``, by ascending client number; or ``random``, an order of its own for each
            client, drawn from the key and the two clients' numbers, so that it does not depend on
            the order of the cohort.
        count: clients in the cohort.
        client_ids: their numbers, ``[clients]``; default 0, 1, 2, ...
        key: needed for random orders.

    Raises:
        InputError: random order without a key.
    """
    ids = jnp.arange(count) if client_ids is None else client_ids
    if order == "index":
        return jnp.broadcast_to(jnp.argsort(ids), (count, count))
    if key is None:
        raise InputError(
            "order='random' needs the extra argument key; pass one, or use order='index'"
        )

    def priority(own, other):
        return jax.random.bits(jax.random.fold_in(jax.random.fold_in(key, own), other))

    return jnp.argsort(jax.vmap(jax.vmap(priority, (None, 0)), (0, None))(ids, ids), axis=1)


@full_precision
def projection_coefficients(gram: jax.Array, orders: jax.Array) -> jax.Array:
    """Each client's update after projection, as coefficients of the original updates.

    ``[clients, clients]``. Row i starts as ``e_i`` and visits its partners one after the other:
    where the running vector has a negative product with partner j's original update, it is
    projected onto the normal plane of that update (Yu et al., arXiv 2001.06782, algorithm 1;
    FedBone, arXiv 2306.17465, equation 2).

    Args:
        gram: ``[clients, clients]``.
        orders: int32 ``[clients, partners]``; a client among its own partners is skipped.
    """

    def project(index, partners):
        def visit(m, coefficients):
            j = partners[m]
            product = jnp.dot(coefficients, gram[:, j])
            squared = gram[j, j]
            conflict = (product < 0) & (j != index) & (squared > 0)
            step = jnp.where(conflict, product / jnp.where(squared > 0, squared, 1), 0)
            return coefficients.at[j].add(-step)

        start = jax.nn.one_hot(index, gram.shape[0], dtype=gram.dtype)
        return jax.lax.fori_loop(0, partners.shape[0], visit, start)

    return jax.vmap(project)(jnp.arange(gram.shape[0]), orders)


def _normalised_coefficients(
    normalise: str, gram: jax.Array, orders: jax.Array, present: jax.Array
) -> jax.Array:
    """:func:`projection_coefficients` of the updates, or of the updates at length 1."""
    if normalise == "none":
        return projection_coefficients(gram, orders)
    scale = inverse_norms(gram)
    coefficients = projection_coefficients(scale[:, None] * gram * scale, orders) * scale
    if normalise == "restore":
        number = jnp.maximum(jnp.sum(present), 1)
        coefficients *= jnp.sum(jnp.sqrt(jnp.diagonal(gram))) / number
    return coefficients


def project_conflicts(
    *,
    order: str = "random",
    granularity: str = "global",
    normalise: str = "none",
    average: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """PCGrad (Yu et al., arXiv 2001.06782, algorithm 1) over clients.

    ``[clients, ...] -> [clients, ...]``. Every update is projected onto the normal planes of those
    it conflicts with. Follow it with ``average_clients()``: the original sums, FMTL-Bench (arXiv
    2402.12876) and FedBone average. Absent clients and zero updates conflict with nobody.

    Args:
        order: of the partners, ``random`` (the paper's; needs the extra argument ``key``) or
            ``index``.
        granularity: ``global``, one vector over all leaves, or ``per_leaf``.
        normalise: ``none``; ``unit``, every update scaled to length 1 first, as FMTL-Bench's
            released code does (the step's length is lost); or ``restore``, that times the mean
            length of the updates.
        average: True gives what a following ``average_clients()`` would, ``[clients, ...] ->
            [...]``, from one row of coefficients: the projected updates are never formed, which
            halves the memory of a large cohort. No averaging follows then.

    Extra arguments used: ``key``, ``client_ids``, ``present``, and ``weights`` of the average.
    Reports ``conflict_fraction`` (share of the pairs with a negative product) and ``mean_cosine``.

    Raises:
        InputError: an unknown choice, or (when traced) no key for random order.
    """
    check_choice("order", order, ORDERS)
    check_choice("granularity", granularity, GRANULARITIES)
    check_choice("normalise", normalise, ("none", "unit", "restore"))

    def update(
        updates,
        state,
        params=None,
        *,
        weights=None,
        key=None,
        client_ids=None,
        present=None,
        **extra_args,
    ):
        del state, params, extra_args
        updates = trees.mask_clients(updates, present)
        orders = partner_orders(order, num_rows(updates), client_ids, key)
        there = who_is_there(updates, present)

        def project(part: PyTree) -> tuple[PyTree, Statistics]:
            gram = trees.inner_products(part, part)
            coefficients = _normalised_coefficients(normalise, gram, orders, there)
            if average:
                row = trees.weighted_sum(mean_weights(there, weights), coefficients)
                return trees.weighted_sum(row, part), conflicts(gram, there)
            return trees.mix_clients(coefficients, part), conflicts(gram, there)

        projected, statistics = over_parts(granularity, project, updates)
        return projected, scalars(statistics)

    return optax.GradientTransformationExtraArgs(lambda params: no_scalars(CONFLICTS), update)


def _largest_eigenvalue(gram: jax.Array, start: jax.Array) -> jax.Array:
    """A bound on the spectral norm: the trace, tightened by a few power iterations."""
    vector = start + 1e-3 * jnp.arange(gram.shape[0])
    for _ in range(8):
        image = gram @ vector
        seen = jnp.linalg.norm(image)
        vector = image / jnp.maximum(seen, 1e-12)
    return jnp.maximum(jnp.minimum(jnp.trace(gram), 1.1 * seen), 1e-12)


@full_precision
def conflict_averse_weights(
    gram: jax.Array,
    preference: jax.Array,
    alpha: float | jax.Array,
    present: jax.Array,
    iterations: int,
) -> tuple[jax.Array, jax.Array]:
    """CAGrad's dual: the weights on the simplex, and the radius c; ``[clients], []``.

        minimise  w' A b + c sqrt(w' A w),   c = alpha ||g_0||

    by projected gradient on the problem divided by the mean squared norm, so that the scale of the
    updates has no influence (the released code's SLSQP stops at its start for small updates).

    Args:
        gram: A, ``[clients, clients]``.
        preference: b, the weights of the mean g_0, ``[clients]``.
        alpha: the radius relative to the mean.
        present: bool ``[clients]``; absent clients get weight 0.
        iterations: of the projected gradient.
    """
    scale = jnp.trace(gram) / jnp.maximum(jnp.sum(present), 1)
    unit = gram / jnp.where(scale > 0, scale, 1)
    tiny = 1e-12
    mean_squared = jnp.maximum(preference @ unit @ preference, 0)
    radius = alpha * jnp.sqrt(mean_squared + tiny)
    start = mean_weights(present)
    largest = _largest_eigenvalue(unit, start)

    def step(_, w):
        length = jnp.sqrt(jnp.maximum(w @ unit @ w, 0) + tiny)
        gradient = unit @ preference + radius * (unit @ w) / length
        moved = w - length / (jnp.maximum(radius, tiny) * largest) * gradient
        # Whatever lies more than 1 below the largest entry is projected to 0.
        return optax.projections.projection_simplex(jnp.where(present, moved, jnp.min(moved) - 2))

    weights = jax.lax.fori_loop(0, iterations, step, start.astype(gram.dtype))
    return jnp.where(present, weights, 0), radius * jnp.sqrt(jnp.where(scale > 0, scale, 0))


@full_precision
def conflict_averse_direction(
    updates: PyTree,
    mean: jax.Array,
    present: jax.Array,
    *,
    alpha: float | jax.Array,
    divisor: float | jax.Array = 1.0,
    iterations: int = 400,
) -> tuple[PyTree, Statistics]:
    """CAGrad's direction ``(g_0 + c g_w / ||g_w||) / divisor``, and how far the updates conflict.

    Args:
        updates: leaves ``[clients, ...]``, 0 where a client is absent.
        mean: the weights of the mean g_0, ``[clients]``.
        present: bool ``[clients]``.
        alpha: the radius relative to the mean.
        divisor: of the result.
        iterations: of the dual's projected gradient.
    """
    gram = trees.inner_products(updates, updates)
    preference = mean.astype(gram.dtype)
    dual, radius = conflict_averse_weights(gram, preference, alpha, present, iterations)
    length = jnp.sqrt(jnp.maximum(dual @ gram @ dual, 0))
    push = jnp.where(length > 0, radius / jnp.where(length > 0, length, 1), 0)
    direction = trees.weighted_sum((preference + push * dual) / divisor, updates)
    return direction, conflicts(gram, present)


def conflict_averse(
    *, alpha: float = 0.4, rescale: int = 1, iterations: int = 400, granularity: str = "global"
) -> optax.GradientTransformationExtraArgs:
    """CAGrad (Liu et al., arXiv 2110.14048, algorithm 1) over clients, ``[clients, ...] -> [...]``.

    It is the direction that maximises the worst client's improvement in a ball of radius
    ``alpha ||g_0||`` around the mean ``g_0``: ``g_0 + c g_w / ||g_w||``. It averages, so no
    ``average_clients()`` follows.

    Args:
        alpha: radius relative to the mean; 0 is plain averaging.
        rescale: 0 leaves the direction as it is, 1 divides it by ``1 + alpha^2`` (FMTL-Bench's), 2
            by ``1 + alpha``.
        iterations: of the dual's projected gradient.
        granularity: ``global`` or ``per_leaf``.

    Extra arguments used: ``weights`` (of the mean; default uniform over those present),
    ``present``. Reports ``conflict_fraction`` (share of the pairs with a negative product) and
    ``mean_cosine``.

    Raises:
        InputError: an unknown granularity or rescaling, or a negative alpha.
    """
    check_choice("granularity", granularity, GRANULARITIES)
    if rescale not in (0, 1, 2) or alpha < 0:
        raise InputError(
            f"conflict_averse takes rescale 0, 1 or 2 and alpha >= 0, got {rescale} and {alpha}"
        )
    divisor = {0: 1.0, 1: 1 + alpha**2, 2: 1 + alpha}[rescale]

    def update(updates, state, params=None, *, weights=None, present=None, **extra_args):
        del state, params, extra_args
        updates = trees.mask_clients(updates, present)
        there = who_is_there(updates, present)
        direct = functools.partial(
            conflict_averse_direction,
            mean=mean_weights(there, weights),
            present=there,
            alpha=alpha,
            divisor=divisor,
            iterations=iterations,
        )
        direction, statistics = over_parts(granularity, direct, updates)
        return direction, scalars(statistics)

    return optax.GradientTransformationExtraArgs(lambda params: no_scalars(CONFLICTS), update)
