"""FedHCA2: personal updates helped by the other clients' through learned hyper-weights.

Lu et al., arXiv 2311.13250. What is certain are the formulas of the authors' and FMTL-Bench's
released codes, which these follow; the paper's text was not at hand.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedjax_mtl.core import trees
from fedjax_mtl.core.checks import InputError
from fedjax_mtl.server.facts import mean_weights, num_rows, numbers_of, who_is_there
from fedjax_mtl.server.projection import conflict_averse_direction
from fedjax_mtl.server.reports import Report

PyTree = Any
Decoders = dict[trees.Path, jax.Array]


# --- The weights and how they learn.


class HyperWeights(NamedTuple):
    """Learned weights, one a client (and layer), with the momentum of their SGD.

    Attributes:
        values: ``[population, ...]``.
        velocity: ``[population, ...]``.
        known: bool ``[population]``; whether the client took part in the round before, so that its
            next update tells how its share fared.
    """

    values: jax.Array
    velocity: jax.Array
    known: jax.Array


def _shares(values: jax.Array) -> jax.Array:
    """What the weights are used as: they are learned without bounds."""
    return jnp.clip(values, 0, 1)


class HyperOptimizer(NamedTuple):
    """SGD of the hyper-weights; the defaults are the released codes'.

    Attributes:
        initial: where the weights start.
        learning_rate: of the step.
        momentum: of the step.
        weight_decay: added to the gradient, times the weight.
    """

    initial: float = 0.1
    learning_rate: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 1e-4

    def start(self, shape: tuple[int, ...]) -> HyperWeights:
        """Weights of this shape, clients first."""
        return HyperWeights(
            jnp.full(shape, self.initial), jnp.zeros(shape), jnp.zeros(shape[0], bool)
        )

    def learn(
        self, weights: HyperWeights, agreement: jax.Array, ids: jax.Array, present: jax.Array
    ) -> HyperWeights:
        """One step: a weight grows if what the client received agrees with what it then learned.

        Outside [0, 1] the weight has no gradient, but momentum and decay still move it. Clients
        that were not there in the round before stay.

        Args:
            weights: of the population.
            agreement: ``[cohort, ...]``, an inner product.
            ids: the cohort's clients, ``[cohort]``.
            present: bool ``[cohort]``.
        """
        values, velocity = weights.values[ids], weights.velocity[ids]
        gradient = jnp.where((values >= 0) & (values <= 1), -agreement, 0)
        moved_velocity = self.momentum * velocity + gradient + self.weight_decay * values
        moved = values - self.learning_rate * moved_velocity
        due = trees.along_first_axis(present & weights.known[ids], values)
        values, velocity = jnp.where(due, moved, values), jnp.where(due, moved_velocity, velocity)
        rows = (values, velocity)
        values, velocity = trees.put_clients((weights.values, weights.velocity), ids, rows, present)
        everybody = jnp.zeros_like(weights.known)
        known = trees.put_clients(everybody, ids, jnp.ones_like(present), present)
        return HyperWeights(values, velocity, known)


RELEASED = HyperOptimizer()


# --- Encoders.


class HyperConflictAverseState(NamedTuple):
    """What the encoders' rule remembers.

    Attributes:
        weights: the hyper-weights, ``[population]``.
        direction: the last common direction, leaves ``[...]``.
        report: ``hyper_weights`` ``[population]``, as they are used.
    """

    weights: HyperWeights
    direction: PyTree
    report: Report


def _encoder_state(weights: HyperWeights, direction: PyTree) -> HyperConflictAverseState:
    report = Report({"hyper_weights": _shares(weights.values)})
    return HyperConflictAverseState(weights, direction, report)


def hyper_conflict_averse(
    *,
    alpha: float = 0.4,
    groups: jax.Array | None = None,
    hyper: HyperOptimizer = RELEASED,
) -> optax.GradientTransformationExtraArgs:
    """FedHCA2's encoder rule: each client's update, and its share of a common direction.

        update_i <- update_i + clip(a_i, 0, 1) U,   U = CAGrad of all updates

    ``[clients, ...] -> [clients, ...]``. A client's hyper-weight a_i learns when it took part in
    the round before too.

    Args:
        alpha: CAGrad's radius (U is divided by ``1 + alpha^2``).
        groups: int ``[population]``; after U, updates of clients of one group (same domain and
            tasks) are replaced by their mean. The authors' code does so for neighbours in its list,
            FMTL-Bench's not at all (None).
        hyper: the a_i's optimiser.

    Extra arguments used: ``client_ids``, ``present``. Reports ``hyper_weights`` ``[clients]``.
    """

    def init(params: PyTree) -> HyperConflictAverseState:
        direction = jax.tree.map(lambda leaf: jnp.zeros_like(leaf[0]), params)
        return _encoder_state(hyper.start((num_rows(params),)), direction)

    def update(updates, state, params=None, *, client_ids=None, present=None, **extra_args):
        del params, extra_args
        ids, there = numbers_of(updates, client_ids), who_is_there(updates, present)
        updates = trees.mask_clients(updates, there)
        before = jax.tree.map(lambda leaf: leaf[None], state.direction)
        agreement = trees.inner_products(updates, before)[:, 0]
        weights = hyper.learn(state.weights, agreement, ids, there)
        direction, _ = conflict_averse_direction(
            updates, mean_weights(there), there, alpha=alpha, divisor=1 + alpha**2
        )
        if groups is not None:
            updates = trees.mix_clients(_group_mean(jnp.asarray(groups)[ids], there), updates)
        shares = jnp.where(there, _shares(weights.values[ids]), 0)
        helped = jax.tree.map(
            lambda x, u: x + (trees.along_first_axis(shares, x) * u).astype(x.dtype),
            updates,
            direction,
        )
        return helped, _encoder_state(weights, direction)

    return optax.GradientTransformationExtraArgs(init, update)


def _group_mean(groups: jax.Array, present: jax.Array) -> jax.Array:
    same = (groups[:, None] == groups) & present[:, None] & present
    return same / jnp.maximum(jnp.sum(same, axis=1, keepdims=True), 1)


# --- Decoders.


def cross_attention(updates: jax.Array, there: jax.Array) -> jax.Array:
    """Each decoder's attention over all decoders' updates of one tensor, ``[decoders, decoders]``.

    It is the row softmax of ``<D_i, D_j> / sqrt(size)``, itself included, over the decoders that
    are there.

    Args:
        updates: D, ``[decoders, size]``.
        there: bool ``[decoders]``.
    """
    scores = trees.inner_products(updates, updates) / jnp.sqrt(updates.shape[1])
    return jnp.where(there[:, None], jax.nn.softmax(scores, axis=1, where=there), 0)


class HyperAttentionState(NamedTuple):
    """What the decoders' rule remembers.

    Attributes:
        weights: the hyper-weights, ``[population, decoders of a client, layers]``.
        attended: what attention gave last, leaves ``[population, decoders, ...]``.
        report: ``layer_hyper_weights``, of the shape of ``weights``, as they are used.
    """

    weights: HyperWeights
    attended: Decoders
    report: Report


def _decoder_state(weights: HyperWeights, attended: Decoders) -> HyperAttentionState:
    report = Report({"layer_hyper_weights": _shares(weights.values)})
    return HyperAttentionState(weights, attended, report)


def hyper_attention(
    *,
    decoders: Sequence[trees.Path] | None = None,
    owned: jax.Array | None = None,
    hyper: HyperOptimizer = RELEASED,
) -> optax.GradientTransformationExtraArgs:
    """FedHCA2's decoder rule: each decoder's update, plus its share of what attention gives.

        update_i^l <- update_i^l + clip(b_i^l, 0, 1) softmax(<D_i^l, D_j^l> / sqrt(size)) D^l

    ``[clients, ...] -> [clients, ...]``. Attention is over all clients' decoders, tensor by tensor;
    the tensors of one layer (one module: kernel and bias) share a hyper-weight b.

    Args:
        decoders: path prefixes of a client's decoders, e.g.
            ``[("decoders", "depth"), ("decoders", "normals")]``, all of one structure; default: all
            leaves are one decoder.
        owned: bool ``[population, decoders]``, which of them a client has (its tasks); default all.
            Others neither attend nor are attended to.
        hyper: the optimiser of b.

    Extra arguments used: ``client_ids``, ``present``, and ``owned``, a tree like the updates with
    bool ``[cohort]`` in every leaf: a decoder takes part only if all of its leaves are the client's
    own. Reports ``layer_hyper_weights`` ``[clients, decoders, layers]``.

    Raises:
        InputError: (at init) decoders of different structure, or a prefix without leaves.
    """
    prefixes = [()] if decoders is None else [tuple(path) for path in decoders]

    def init(params: PyTree) -> HyperAttentionState:
        stacked = _stack_decoders(params, prefixes)
        weights = hyper.start((num_rows(params), len(prefixes), len(_layers(stacked))))
        return _decoder_state(weights, jax.tree.map(jnp.zeros_like, stacked))

    return optax.GradientTransformationExtraArgs(
        init, functools.partial(_attend, prefixes, owned, hyper)
    )


def _attend(
    prefixes: Sequence[trees.Path],
    owned_by_number: jax.Array | None,
    hyper: HyperOptimizer,
    updates: PyTree,
    state: HyperAttentionState,
    params: PyTree | None = None,
    *,
    client_ids: jax.Array | None = None,
    present: jax.Array | None = None,
    owned: PyTree | None = None,
    **extra_args: Any,
) -> tuple[PyTree, HyperAttentionState]:
    """The update of :func:`hyper_attention`."""
    del params, extra_args
    ids, present = numbers_of(updates, client_ids), who_is_there(updates, present)
    updates = trees.mask_clients(updates, present)
    stacked = _stack_decoders(updates, prefixes)
    mine = _ownership(prefixes, owned_by_number, owned, ids)
    there = mine & present[:, None]
    layers = _layers(stacked)
    products = jax.tree.map(_products, trees.take_clients(state.attended, ids), stacked)
    agreement = jnp.stack([sum(products[path] for path in layer) for layer in layers], axis=-1)
    weights = hyper.learn(state.weights, agreement, ids, present)
    shares = jnp.where(there[..., None], _shares(weights.values[ids]), 0)
    given = jax.tree.map(lambda x: _attended(x, there), stacked)
    helped = {
        path: stacked[path] + _along_decoders(shares[..., index], given[path])
        for index, layer in enumerate(layers)
        for path in layer
    }
    attended = trees.put_clients(state.attended, ids, given, present)
    return _unstack_decoders(helped, prefixes, updates), _decoder_state(weights, attended)


def _ownership(
    prefixes: Sequence[trees.Path],
    owned_by_number: jax.Array | None,
    owned: PyTree | None,
    client_ids: jax.Array,
) -> jax.Array:
    """Which decoders the cohort's clients have, bool ``[cohort, decoders]``, by both accounts."""
    mine = jnp.ones((len(client_ids), len(prefixes)), bool)
    if owned_by_number is not None:
        mine &= jnp.asarray(owned_by_number, bool)[client_ids]
    if owned is not None:
        for leaf in _stack_decoders(owned, prefixes).values():
            mine &= leaf
    return mine


def _attended(updates: jax.Array, there: jax.Array) -> jax.Array:
    """What attention gives each decoder of one tensor, ``[cohort, decoders, ...]``, from all."""
    flat = updates.reshape(there.size, -1)
    flat = trees.mask_clients(flat, there.reshape(-1))
    attention = cross_attention(flat, there.reshape(-1))
    return trees.mix_clients(attention, flat).reshape(updates.shape)


def _along_decoders(shares: jax.Array, given: jax.Array) -> jax.Array:
    """Each decoder's share of what it is given, ``[cohort, decoders, ...]``."""
    return shares.reshape(shares.shape + (1,) * (given.ndim - 2)) * given


def _products(first: jax.Array, second: jax.Array) -> jax.Array:
    """Inner products decoder by decoder, of ``[cohort, decoders, ...]``: ``[cohort, decoders]``."""
    return jnp.sum((first * second).reshape(*first.shape[:2], -1), axis=-1)


def _layers(stacked: Decoders) -> list[list[trees.Path]]:
    """Paths by the module they belong to."""
    modules: dict[trees.Path, list[trees.Path]] = {}
    for path in sorted(stacked):
        modules.setdefault(path[:-1], []).append(path)
    return [modules[name] for name in sorted(modules)]


def _stack_decoders(tree: PyTree, prefixes: Sequence[trees.Path]) -> Decoders:
    """Leaves of all decoders of a client side by side, by their path inside the decoder.

    They are ``[clients, decoders, ...]``.
    """
    leaves = trees.leaves_by_path(tree)
    parts: list[Decoders] = []
    for prefix in prefixes:
        inside = {
            path[len(prefix) :]: x for path, x in leaves.items() if path[: len(prefix)] == prefix
        }
        shapes = {path: x.shape for path, x in inside.items()}
        if not inside:
            raise InputError(
                f"no parameters below {'/'.join(prefix)}; name the clients' decoders as they are"
            )
        if parts and shapes != {path: x.shape for path, x in parts[0].items()}:
            raise InputError(
                f"decoder {'/'.join(prefix)} has other layers than {'/'.join(prefixes[0])}; "
                "attention needs decoders of one structure, leave the last layers out"
            )
        parts.append(inside)
    return {path: jnp.stack([part[path] for part in parts], axis=1) for path in parts[0]}


def _unstack_decoders(stacked: Decoders, prefixes: Sequence[trees.Path], like: PyTree) -> PyTree:
    """The inverse of :func:`_stack_decoders`; leaves of ``like`` outside all decoders pass."""
    leaves = {
        (*prefix, *path): x[:, index]
        for index, prefix in enumerate(prefixes)
        for path, x in stacked.items()
    }
    return trees.map_with_path(lambda path, leaf: leaves.get(path, leaf), like)
