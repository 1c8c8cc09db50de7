"""Updates that conflict: projections (PCGrad, FedBone's GPAggregation) and the conflict-averse direction (CAGrad).

All three only ever combine the clients' updates linearly, so they work on the Gram matrix ``[clients, clients]``: one pass over the parameters for the
inner products, one to combine, whatever happens between.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedjax_mtl.core import trees

PyTree = Any

ORDERS = ("index", "random")
GRANULARITIES = ("global", "per_leaf")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raises ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"unknown {name} {value!r}; expected one of {', '.join(choices)}")


def partner_orders(
    order: str, count: int, client_ids: jax.Array | None, key: jax.Array | None
) -> jax.Array:
    """In which order each client visits its partners, int32 ``[clients, clients]`` slots, itself included.

    ``index``: by ascending client number. ``random``: an order of its own for each client, drawn from the key and the two clients' numbers, so that
    it does not depend on the order of the cohort.
    """
    ids = jnp.arange(count) if client_ids is None else client_ids
    if order == "index":
        return jnp.broadcast_to(jnp.argsort(ids), (count, count))
    if key is None:
        raise ValueError(
            "order='random' needs the extra argument key; pass one, or use order='index'"
        )

    def priority(own, other):
        return jax.random.bits(jax.random.fold_in(jax.random.fold_in(key, own), other))

    return jnp.argsort(jax.vmap(jax.vmap(priority, (None, 0)), (0, None))(ids, ids), axis=1)


def projection_coefficients(gram: jax.Array, orders: jax.Array) -> jax.Array:
    """Each client's update after projection, as coefficients of the original updates, ``[clients, clients]``.

    Row i starts as ``e_i`` and visits its partners one after the other: where the running vector has a negative product with partner j's original
    update, it is projected onto the normal plane of that update (Yu et al., arXiv 2001.06782, algorithm 1; FedBone, arXiv 2306.17465, equation 2).

    Args:
        gram: ``[clients, clients]``. orders: int32 ``[clients, partners]``; a client among its own partners is skipped.
    """

    def project(index, partners):
        def visit(m, coefficients):
            j = partners[m]
            product = jnp.dot(coefficients, gram[:, j], precision=jax.lax.Precision.HIGHEST)
            squared = gram[j, j]
            conflict = (product < 0) & (j != index) & (squared > 0)
            step = jnp.where(conflict, product / jnp.where(squared > 0, squared, 1), 0)
            return coefficients.at[j].add(-step)

        start = jax.nn.one_hot(index, gram.shape[0], dtype=gram.dtype)
        return jax.lax.fori_loop(0, partners.shape[0], visit, start)

    return jax.vmap(project)(jnp.arange(gram.shape[0]), orders)


def _granular(granularity: str, fn, *parts: PyTree) -> PyTree:
    """``fn`` of the whole trees, or of each leaf as a tree of its own."""
    return fn(*parts) if granularity == "global" else jax.tree.map(fn, *parts)


def _inverse_norms(gram: jax.Array) -> jax.Array:
    squared = jnp.diagonal(gram)
    return jnp.where(squared > 0, jax.lax.rsqrt(jnp.where(squared > 0, squared, 1)), 0)


def project_conflicts(
    *,
    order: str = "random",
    granularity: str = "global",
    normalise: str = "none",
    average: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """PCGrad (Yu et al., arXiv 2001.06782, algorithm 1) over clients, ``[clients, ...] -> [clients, ...]``.

    Every update is projected onto the normal planes of those it conflicts with. Follow it with ``average_clients()``: the original sums, FMTL-Bench (arXiv
    2402.12876) and FedBone average. Absent clients and zero updates conflict with nobody.

    Args:
        order: of the partners, ``random`` (the paper's; needs the extra argument ``key``) or ``index``.
        granularity: ``global``, one vector over all leaves, or ``per_leaf``.
        normalise: ``none``; ``unit``, every update scaled to length 1 first, as FMTL-Bench's released code does (the step's length is lost); or
            ``restore``, that times the mean length of the updates.
        average: True gives what a following ``average_clients()`` would, ``[clients, ...] -> [...]``, from one row of coefficients: the projected
            updates are never formed, which halves the memory of a large cohort. No averaging follows then.

    Extra arguments used: ``key``, ``client_ids``, ``present``, and ``weights`` of the average. Raises ValueError: an unknown choice, or no key for
    random order.
    """
    check_choice("order", order, ORDERS)
    check_choice("granularity", granularity, GRANULARITIES)
    check_choice("normalise", normalise, ("none", "unit", "restore"))

    def coefficients_of(gram, orders, number):
        if normalise == "none":
            return projection_coefficients(gram, orders)
        scale = _inverse_norms(gram)
        coefficients = projection_coefficients(scale[:, None] * gram * scale, orders) * scale
        if normalise == "restore":
            coefficients *= jnp.sum(jnp.sqrt(jnp.diagonal(gram))) / number
        return coefficients

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
        del params, extra_args
        updates = trees.mask_clients(updates, present)
        count = jax.tree.leaves(updates)[0].shape[0]
        orders = partner_orders(order, count, client_ids, key)
        there = jnp.ones(count, bool) if present is None else present
        number = jnp.maximum(jnp.sum(there), 1)
        mean = there / number if weights is None else weights

        def project(part):
            coefficients = coefficients_of(trees.inner_products(part, part), orders, number)
            if average:
                return trees.weighted_sum(trees.weighted_sum(mean, coefficients), part)
            return trees.mix_clients(coefficients, part)

        return _granular(granularity, project, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


class GPAggregationState(NamedTuple):
    """The previous aggregate (``history``), whether there is one, and what happened in the last aggregation.

    Attributes:
        history: pytree like the parameters. started: bool ``[]``.
        statistics: scalars: ``conflict_fraction`` (share of the pairs with a negative cosine), ``mean_cosine``, ``attention_spread`` (largest minus
            smallest), ``norm_ratio`` (of the aggregate to the plain weighted mean).
    """

    history: PyTree
    started: jax.Array
    statistics: dict[str, jax.Array]


def attention_to_history(
    kind: str,
    temperature: float,
    products: jax.Array,
    squared: jax.Array,
    history_squared: jax.Array,
    size: int,
) -> jax.Array:
    """Unnormalised attention scores of each update to the history, ``[clients]``; see :func:`gp_aggregation`."""
    if kind == "softmax_cosine":
        norms = jnp.maximum(jnp.sqrt(squared), 1e-12) * jnp.maximum(
            jnp.sqrt(history_squared), 1e-12
        )
        return products / norms / temperature
    return products / jnp.sqrt(size) / temperature


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
    """FedBone's GPAggregation (arXiv 2306.17465, algorithm 2), ``[clients, ...] -> [...]``: attention to the history, projection, average.

        g_i <- a_i g_i,  a = clients * softmax(s / temperature),  s_i = cos(g_i, history)
        v_i <- g_i projected onto the normal planes of the g_j it conflicts with
        result = sum_i weights_i v_i,  history <- result

    The conflict test, the projection and the average are the paper's (as others report them); the attention formula could not be verified and is a reconstruction,
    as are order, weights and what the history holds. Positive scalars change no projection, so attention only re-weights PCGrad's result.

    Args:
        attention: ``softmax_cosine``, ``softmax_dot`` (``s_i = g_i . history / sqrt(parameters)``) or ``none``. All 1 while there is no history.
        project: False leaves conflicts alone (for ablation).
        temperature: of the softmax.
        order, granularity: as for :func:`project_conflicts`.
        history_decay: 0 keeps the last aggregate, d > 0 the running mean ``d * history + (1 - d) * aggregate``.
        groups: int ``[population]``; updates of clients of one group (e.g. one task) are averaged by their weights first, and the group weighs their sum.

    Extra arguments used: ``weights`` (default uniform), ``client_ids``, ``present``, ``key`` (random order).
    """
    check_choice("attention", attention, ("softmax_cosine", "softmax_dot", "none"))
    check_choice("order", order, ORDERS)
    check_choice("granularity", granularity, GRANULARITIES)
    if not 0 <= history_decay < 1:
        raise ValueError(f"history_decay is {history_decay}; give 0 <= history_decay < 1")

    def init(params):
        names = ("conflict_fraction", "mean_cosine", "attention_spread", "norm_ratio")
        return GPAggregationState(
            optax.tree.zeros_like(params),
            jnp.zeros((), bool),
            {name: jnp.zeros(()) for name in names},
        )

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
        count = jax.tree.leaves(updates)[0].shape[0]
        there = jnp.ones(count, bool) if present is None else present
        if weights is None:
            weights = there / jnp.maximum(jnp.sum(there), 1)
        orders = partner_orders(order, count, client_ids, key)
        ids = jnp.arange(count) if client_ids is None else client_ids
        gather, there, weights = _group_means(groups, ids, there, weights)

        def combine(part, history):
            gram = gather @ trees.inner_products(part, part) @ gather.T
            one = jax.tree.map(lambda leaf: leaf[None], history)
            products = gather @ trees.inner_products(part, one)[:, 0]
            history_squared = trees.inner_products(one, one)[0, 0]
            attend = jnp.ones(count)
            if attention != "none":
                size = sum(leaf.size for leaf in jax.tree.leaves(history))
                scores = attention_to_history(
                    attention, temperature, products, jnp.diagonal(gram), history_squared, size
                )
                rescaled = jnp.sum(there) * jax.nn.softmax(scores, where=there)
                known = state.started & (history_squared > 1e-24)
                attend = jnp.where(known, rescaled, 1.0)
            coefficients = projection_coefficients(gram, orders) if project else jnp.eye(count)
            row = (weights * attend) @ coefficients
            statistics = _statistics(gram, there, attend, row, weights)
            return trees.weighted_sum(row @ gather, part), statistics

        if granularity == "global":
            result, statistics = combine(updates, state.history)
        else:
            leaves, structure = jax.tree.flatten(updates)
            pairs = [
                combine(*pair) for pair in zip(leaves, jax.tree.leaves(state.history), strict=True)
            ]
            result = jax.tree.unflatten(structure, [pair[0] for pair in pairs])
            statistics = jax.tree.map(lambda *xs: sum(xs) / len(xs), *[pair[1] for pair in pairs])
        decay = jnp.where(state.started, history_decay, 0.0)
        anybody = jnp.any(there)
        history = jax.tree.map(
            lambda h, r: jnp.where(anybody, (decay * h + (1 - decay) * r).astype(h.dtype), h),
            state.history,
            result,
        )
        return result, GPAggregationState(history, state.started | anybody, statistics)

    return optax.GradientTransformationExtraArgs(init, update)


def _group_means(groups, ids, there, weights):
    """Rows that average each group, by weight, into its first present member: ``(matrix [clients, clients], who is left, their weights)``."""
    count = ids.shape[0]
    if groups is None:
        return jnp.eye(count), there, weights
    own = jnp.asarray(groups)[ids]
    together = (own[:, None] == own[None, :]) & there[:, None] & there[None, :]
    first = there & (jnp.argmax(together, axis=1) == jnp.arange(count))
    members = jnp.where(first[:, None] & together, weights, 0)
    total = jnp.sum(members, axis=1)
    return members / jnp.where(total > 0, total, 1)[:, None], first, total


def _statistics(gram, there, attend, row, weights):
    """What :class:`GPAggregationState` reports."""
    scale = _inverse_norms(gram)
    cosines = scale[:, None] * gram * scale
    pairs = there[:, None] & there[None, :] & ~jnp.eye(gram.shape[0], dtype=bool)
    number = jnp.maximum(jnp.sum(pairs), 1)
    length, plain = jnp.maximum(row @ gram @ row, 0), jnp.maximum(weights @ gram @ weights, 0)
    return {
        "conflict_fraction": jnp.sum(pairs & (gram < 0)) / number,
        "mean_cosine": jnp.sum(jnp.where(pairs, cosines, 0)) / number,
        "attention_spread": jnp.max(attend, where=there, initial=0)
        - jnp.min(attend, where=there, initial=jnp.inf) * jnp.any(there),
        "norm_ratio": jnp.sqrt(length / jnp.maximum(plain, 1e-30)),
    }


def conflict_averse_weights(
    gram: jax.Array, preference: jax.Array, alpha: float, present: jax.Array, iterations: int
) -> tuple[jax.Array, jax.Array]:
    """CAGrad's dual: the weights on the simplex, and the radius c; ``[clients], []``.

        minimise  w' A b + c sqrt(w' A w),   c = alpha ||g_0||

    by projected gradient on the problem divided by the mean squared norm, so that the scale of the updates has no influence (the released
    code's SLSQP stops at its start for small updates). Absent clients get weight 0.
    """
    scale = jnp.trace(gram) / jnp.maximum(jnp.sum(present), 1)
    unit = gram / jnp.where(scale > 0, scale, 1)
    tiny = 1e-12
    mean_squared = jnp.maximum(preference @ unit @ preference, 0)
    radius = alpha * jnp.sqrt(mean_squared + tiny)
    start = present / jnp.maximum(jnp.sum(present), 1)
    largest = jnp.trace(unit)  # bounds the spectral norm; tightened by a few power iterations
    vector = start + 1e-3 * jnp.arange(gram.shape[0])
    for _ in range(8):
        image = unit @ vector
        largest_seen = jnp.linalg.norm(image)
        vector = image / jnp.maximum(largest_seen, tiny)
    largest = jnp.maximum(jnp.minimum(largest, 1.1 * largest_seen), tiny)

    def step(_, w):
        length = jnp.sqrt(jnp.maximum(w @ unit @ w, 0) + tiny)
        gradient = unit @ preference + radius * (unit @ w) / length
        moved = w - length / (jnp.maximum(radius, tiny) * largest) * gradient
        # Whatever lies more than 1 below the largest entry is projected to 0.
        return optax.projections.projection_simplex(jnp.where(present, moved, jnp.min(moved) - 2))

    weights = jax.lax.fori_loop(0, iterations, step, start.astype(gram.dtype))
    return jnp.where(present, weights, 0), radius * jnp.sqrt(jnp.where(scale > 0, scale, 0))


def conflict_averse(
    *, alpha: float = 0.4, rescale: int = 1, iterations: int = 400, granularity: str = "global"
) -> optax.GradientTransformationExtraArgs:
    """CAGrad (Liu et al., arXiv 2110.14048, algorithm 1) over clients, ``[clients, ...] -> [...]``.

    The direction that maximises the worst client's improvement in a ball of radius ``alpha ||g_0||`` around the mean ``g_0``:
    ``g_0 + c g_w / ||g_w||``. It averages, so no ``average_clients()`` follows.

    Args:
        alpha: radius relative to the mean; 0 is plain averaging.
        rescale: 0 as it is, 1 divided by ``1 + alpha^2`` (FMTL-Bench's), 2 by ``1 + alpha``.
        iterations: of the dual's projected gradient.
        granularity: ``global`` or ``per_leaf``.

    Extra arguments used: ``weights`` (of the mean; default uniform over those present), ``present``.
    """
    check_choice("granularity", granularity, GRANULARITIES)
    if rescale not in (0, 1, 2) or alpha < 0:
        raise ValueError(
            f"conflict_averse takes rescale 0, 1 or 2 and alpha >= 0, got {rescale} and {alpha}"
        )
    divisor = {0: 1.0, 1: 1 + alpha**2, 2: 1 + alpha}[rescale]

    def update(updates, state, params=None, *, weights=None, present=None, **extra_args):
        del params, extra_args
        updates = trees.mask_clients(updates, present)
        count = jax.tree.leaves(updates)[0].shape[0]
        there = jnp.ones(count, bool) if present is None else present
        mean = there / jnp.maximum(jnp.sum(there), 1) if weights is None else weights

        def direct(part):
            gram = trees.inner_products(part, part)
            preference = mean.astype(gram.dtype)
            dual, radius = conflict_averse_weights(gram, preference, alpha, there, iterations)
            length = jnp.sqrt(jnp.maximum(dual @ gram @ dual, 0))
            push = jnp.where(length > 0, radius / jnp.where(length > 0, length, 1), 0)
            return trees.weighted_sum((preference + push * dual) / divisor, part)

        return _granular(granularity, direct, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
