"""FedHCA2: personal updates helped by the other clients' through learned hyper-weights (Lu et al., arXiv 2311.13250).

What is certain are the formulas of the authors' and FMTL-Bench's released codes, which these follow; the paper's text was not at hand.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedjax_mtl.core import trees
from fedjax_mtl.server.projection import conflict_averse

PyTree = Any


class HyperWeights(NamedTuple):
    """Learned weights, one a client (and layer), with the momentum of their SGD.

    Attributes:
        values, velocity: ``[population, ...]``.
        known: bool ``[population]``; whether the client took part in the round before, so that its next update tells how its share fared.
    """

    values: jax.Array
    velocity: jax.Array
    known: jax.Array


class HyperOptimizer(NamedTuple):
    """SGD of the hyper-weights: the released codes' rate, momentum and weight decay."""

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
        """One step: a weight grows if what the client received agrees with what it then learned (``agreement`` ``[cohort, ...]``, an inner product).

        Outside [0, 1] the weight has no gradient, but momentum and decay still move it. Clients that were not there in the round before stay.
        """
        values, velocity = weights.values[ids], weights.velocity[ids]
        gradient = jnp.where((values >= 0) & (values <= 1), -agreement, 0)
        moved_velocity = self.momentum * velocity + gradient + self.weight_decay * values
        moved = values - self.learning_rate * moved_velocity
        due = trees.along_first_axis(present & weights.known[ids], values)
        values, velocity = jnp.where(due, moved, values), jnp.where(due, moved_velocity, velocity)
        both = trees.put_clients(
            (weights.values, weights.velocity), ids, (values, velocity), present
        )
        known = (
            jnp.zeros_like(weights.known)
            .at[jnp.where(present, ids, len(weights.known))]
            .set(True, mode="drop")
        )
        return HyperWeights(*both, known)


RELEASED = HyperOptimizer()


class HyperConflictAverseState(NamedTuple):
    """The hyper-weights ``[population]`` and the last common direction, leaves ``[...]``."""

    weights: HyperWeights
    direction: PyTree


def _identity(client_ids: jax.Array | None, present: jax.Array | None, count: int):
    ids = jnp.arange(count) if client_ids is None else client_ids
    return ids, jnp.ones(count, bool) if present is None else present


def hyper_conflict_averse(
    *,
    alpha: float = 0.4,
    groups: jax.Array | None = None,
    hyper: HyperOptimizer = RELEASED,
) -> optax.GradientTransformationExtraArgs:
    """FedHCA2's encoder rule, ``[clients, ...] -> [clients, ...]``: each client's own update, plus its share of the conflict-averse direction.

        update_i <- update_i + clip(a_i, 0, 1) U,   U = CAGrad of all updates

    Args:
        alpha: CAGrad's radius (divided by ``1 + alpha^2``). hyper: the a_i's optimiser.
        groups: int ``[population]``; after U, updates of clients of one group (same domain and tasks) are replaced by their mean. The authors' code does so for neighbours in its list, FMTL-Bench's not at
            all (None).

    A client's hyper-weight learns when it took part in the round before too. Extra arguments used: ``client_ids``, ``present``.
    """
    averse = conflict_averse(alpha=alpha, rescale=1)

    def init(params):
        count = jax.tree.leaves(params)[0].shape[0]
        direction = jax.tree.map(lambda leaf: jnp.zeros_like(leaf[0]), params)
        return HyperConflictAverseState(hyper.start((count,)), direction)

    def update(updates, state, params=None, *, client_ids=None, present=None, **extra_args):
        del params, extra_args
        ids, there = _identity(client_ids, present, jax.tree.leaves(updates)[0].shape[0])
        updates = trees.mask_clients(updates, there)
        before = jax.tree.map(lambda leaf: leaf[None], state.direction)
        agreement = trees.inner_products(updates, before)[:, 0]
        weights = hyper.learn(state.weights, agreement, ids, there)
        direction, _ = averse.update(updates, optax.EmptyState(), present=there)
        if groups is not None:
            updates = trees.mix_clients(_group_mean(jnp.asarray(groups)[ids], there), updates)
        shares = jnp.where(there, jnp.clip(weights.values[ids], 0, 1), 0)
        helped = jax.tree.map(
            lambda x, u: x + (shares.reshape((-1,) + (1,) * u.ndim) * u).astype(x.dtype),
            updates,
            direction,
        )
        return helped, HyperConflictAverseState(weights, direction)

    return optax.GradientTransformationExtraArgs(init, update)


def _group_mean(groups: jax.Array, present: jax.Array) -> jax.Array:
    same = (groups[:, None] == groups) & present[:, None] & present
    return same / jnp.maximum(jnp.sum(same, axis=1, keepdims=True), 1)


def cross_attention(updates: jax.Array, there: jax.Array) -> jax.Array:
    """Each decoder's attention over all decoders' updates of one tensor, ``[decoders, size] -> [decoders, decoders]``.

    Row softmax of ``<D_i, D_j> / sqrt(size)``, itself included, over the decoders that are ``there``.
    """
    scores = updates @ updates.T / jnp.sqrt(updates.shape[1])
    return jnp.where(there[:, None], jax.nn.softmax(scores, axis=1, where=there), 0)


class HyperAttentionState(NamedTuple):
    """Hyper-weights ``[population, decoders of a client, layers]`` and what attention gave last, leaves ``[population, decoders, ...]``."""

    weights: HyperWeights
    attended: PyTree


def hyper_attention(
    *,
    decoders: Sequence[trees.Path] | None = None,
    owned: jax.Array | None = None,
    hyper: HyperOptimizer = RELEASED,
) -> optax.GradientTransformationExtraArgs:
    """FedHCA2's decoder rule, ``[clients, ...] -> [clients, ...]``: each decoder's own update, plus its layers' shares of what attention over all decoders gives.

        update_i^l <- update_i^l + clip(b_i^l, 0, 1) softmax(<D_i^l, D_j^l> / sqrt(size)) D^l

    Attention is tensor by tensor; the tensors of one layer (one module: kernel and bias) share a hyper-weight.

    Args:
        decoders: path prefixes of a client's decoders, e.g. ``[("decoders", "depth"), ("decoders", "normals")]``, all of one structure; default: all leaves are one decoder.
        owned: bool ``[population, decoders]``, which of them a client has (its tasks); default all. Others neither attend nor are attended to.

    Extra arguments used: ``client_ids``, ``present``. Raises ValueError: (at init) decoders of different structure, or a prefix without leaves.
    """
    prefixes = [()] if decoders is None else [tuple(path) for path in decoders]

    def init(params):
        stacked = _stack_decoders(params, prefixes)
        count = jax.tree.leaves(params)[0].shape[0]
        weights = hyper.start((count, len(prefixes), len(_layers(stacked))))
        return HyperAttentionState(
            weights, {path: jnp.zeros_like(x) for path, x in stacked.items()}
        )

    def update(updates, state, params=None, *, client_ids=None, present=None, **extra_args):
        del params, extra_args
        ids, present = _identity(client_ids, present, jax.tree.leaves(updates)[0].shape[0])
        updates = trees.mask_clients(updates, present)
        stacked = _stack_decoders(updates, prefixes)
        layers = _layers(stacked)
        shape = (len(ids), len(prefixes))
        mine = jnp.ones(shape, bool) if owned is None else jnp.asarray(owned, bool)[ids]
        there = mine & present[:, None]
        before = trees.take_clients(state.attended, ids)
        products = {path: _products(before[path], stacked[path]) for path in stacked}
        agreement = jnp.stack([sum(products[path] for path in layer) for layer in layers], axis=-1)
        weights = hyper.learn(state.weights, agreement, ids, present)
        shares = jnp.where(there[..., None], jnp.clip(weights.values[ids], 0, 1), 0)
        attended, helped = {}, {}
        for index, layer in enumerate(layers):
            for path in layer:
                x = stacked[path]
                flat = jnp.where(there.reshape(-1, 1), x.reshape(there.size, -1), 0)
                given = (cross_attention(flat, there.reshape(-1)) @ flat).reshape(x.shape)
                share = shares[..., index].reshape(shape + (1,) * (x.ndim - 2))
                attended[path], helped[path] = given, x + share * given
        attended = trees.put_clients(state.attended, ids, attended, present)
        return _unstack_decoders(helped, prefixes, updates), HyperAttentionState(weights, attended)

    return optax.GradientTransformationExtraArgs(init, update)


def _products(first: jax.Array, second: jax.Array) -> jax.Array:
    """Inner products decoder by decoder, ``[cohort, decoders, ...]`` twice ``-> [cohort, decoders]``."""
    return jnp.sum((first * second).reshape(*first.shape[:2], -1), axis=-1)


def _layers(stacked: dict[trees.Path, jax.Array]) -> list[list[trees.Path]]:
    """Paths by the module they belong to."""
    modules: dict[trees.Path, list[trees.Path]] = {}
    for path in sorted(stacked):
        modules.setdefault(path[:-1], []).append(path)
    return [modules[name] for name in sorted(modules)]


def _stack_decoders(tree: PyTree, prefixes: Sequence[trees.Path]) -> dict[trees.Path, jax.Array]:
    """Leaves of all decoders of a client side by side, by their path inside the decoder, ``[clients, decoders, ...]``."""
    leaves = trees.leaves_by_path(tree)
    parts = []
    for prefix in prefixes:
        inside = {
            path[len(prefix) :]: x for path, x in leaves.items() if path[: len(prefix)] == prefix
        }
        shapes = {path: x.shape for path, x in inside.items()}
        if not inside:
            raise ValueError(
                f"no parameters below {'/'.join(prefix)}; name the clients' decoders as they are"
            )
        if parts and shapes != {path: x.shape for path, x in parts[0].items()}:
            raise ValueError(
                f"decoder {'/'.join(prefix)} has other layers than {'/'.join(prefixes[0])}; attention needs decoders of one structure, "
                "leave the last layers out"
            )
        parts.append(inside)
    return {path: jnp.stack([part[path] for part in parts], axis=1) for path in parts[0]}


def _unstack_decoders(
    stacked: dict[trees.Path, jax.Array], prefixes: Sequence[trees.Path], like: PyTree
) -> PyTree:
    """The inverse of :func:`_stack_decoders`; leaves of ``like`` outside all decoders pass."""
    leaves = {
        (*prefix, *path): x[:, index]
        for index, prefix in enumerate(prefixes)
        for path, x in stacked.items()
    }
    return trees.map_with_path(lambda path, leaf: leaves.get(path, leaf), like)
