"""Pytrees with a client axis, and predicates on paths that say what is shared.

A *path* is a tuple of strings: ``("decoders", "depth", "kernel")`` is the path of
``params["decoders"]["depth"]["kernel"]``. A *predicate* maps a path to a bool. What is shared and
what stays on a client is such a predicate, never a class.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any
Path = tuple[str, ...]
PathPredicate = Callable[[Path], bool]


def everything(path: Path) -> bool:
    """Selects all leaves."""
    del path
    return True


def nothing(path: Path) -> bool:
    """Selects no leaf."""
    del path
    return False


def under(*names: str) -> PathPredicate:
    """Selects the leaves below any top-level entry named here, e.g. ``under("decoder")``."""
    return lambda path: bool(path) and path[0] in names


def negate(predicate: PathPredicate) -> PathPredicate:
    """Selects what ``predicate`` does not."""
    return lambda path: not predicate(path)


def _as_path(key_path: Sequence[Any]) -> Path:
    return tuple(str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in key_path)


def partition(tree: PyTree, predicate: PathPredicate) -> tuple[PyTree, PyTree]:
    """Splits ``tree`` into ``(selected, rest)``, each with ``None`` in the places of the other.

    ``None`` is an empty subtree to JAX, so both parts go through maps, optimisers and
    transformations as they are.
    """
    selected = map_with_path(lambda path, leaf: leaf if predicate(path) else None, tree)
    rest = map_with_path(lambda path, leaf: None if predicate(path) else leaf, tree)
    return selected, rest


def combine(first: PyTree, second: PyTree) -> PyTree:
    """Fills the ``None`` places of ``first`` from ``second``: the inverse of :func:`partition`."""
    return jax.tree.map(
        lambda a, b: b if a is None else a, first, second, is_leaf=lambda leaf: leaf is None
    )


def map_with_path(fn: Callable[[Path, Any], Any], tree: PyTree) -> PyTree:
    """Applies ``fn(path, leaf)`` to every leaf."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: fn(_as_path(path), leaf), tree)


def leaves_by_path(tree: PyTree) -> dict[Path, Any]:
    """Returns the leaves of nested dicts by path."""
    return {_as_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def from_paths(leaves: dict[Path, Any]) -> PyTree:
    """Returns nested dicts from leaves by path: the inverse of :func:`leaves_by_path`."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        branch = tree
        for name in path[:-1]:
            branch = branch.setdefault(name, {})
        branch[path[-1]] = leaf
    return tree


def broadcast_clients(tree: PyTree, num_clients: int) -> PyTree:
    """Repeats every leaf along a new leading client axis, ``[...] -> [num_clients, ...]``."""
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (num_clients, *leaf.shape)), tree)


def take_clients(tree: PyTree, client_ids: jax.Array) -> PyTree:
    """Returns rows ``client_ids`` of every leaf, ``[clients, ...] -> [cohort, ...]``."""
    return jax.tree.map(lambda leaf: leaf[client_ids], tree)


def put_clients(tree: PyTree, client_ids: jax.Array, rows: PyTree, present: jax.Array) -> PyTree:
    """Writes ``rows`` ``[cohort, ...]`` into the tree at ``client_ids``.

    Slots that are not ``present`` leave the tree as it was.
    """

    def put(leaf: jax.Array, new: jax.Array) -> jax.Array:
        slots = jnp.where(present, client_ids, leaf.shape[0])
        return leaf.at[slots].set(new.astype(leaf.dtype), mode="drop")

    return jax.tree.map(put, tree, rows)


def weighted_sum(weights: jax.Array, tree: PyTree) -> PyTree:
    """Returns ``sum_c weights[c] * leaf[c]`` for every leaf, ``[clients, ...] -> [...]``."""
    return mix_clients(weights, tree)


def where(condition: jax.Array, if_true: PyTree, if_false: PyTree) -> PyTree:
    """Applies ``jnp.where`` with a scalar condition to every leaf."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), if_true, if_false)


def flat_clients(tree: PyTree) -> jax.Array:
    """Puts every client's leaves into one row, ``[clients, ...] -> [clients, parameters]``."""
    leaves = jax.tree.leaves(tree)
    return jnp.concatenate([leaf.reshape(leaf.shape[0], -1) for leaf in leaves], axis=1)


def along_first_axis(values: jax.Array, leaf: jax.Array) -> jax.Array:
    """Shapes one value a row, ``[rows]``, so that it broadcasts against a leaf ``[rows, ...]``."""
    return values.reshape((-1,) + (1,) * (leaf.ndim - 1))


def where_clients(condition: jax.Array, if_true: PyTree, if_false: PyTree) -> PyTree:
    """Applies ``jnp.where`` client by client.

    The shapes are ``[clients], [clients, ...], [clients, ...] -> [clients, ...]``.
    """
    return jax.tree.map(
        lambda a, b: jnp.where(along_first_axis(condition, a), a, b), if_true, if_false
    )


def mask_clients(tree: PyTree, present: jax.Array | None) -> PyTree:
    """Zeroes the rows of absent clients, ``[clients, ...]``, whatever they hold.

    ``present`` is bool ``[clients]``; ``None`` means that all are present.
    """
    if present is None:
        return tree
    return jax.tree.map(lambda x: jnp.where(along_first_axis(present, x), x, 0), tree)


def scale_clients(factors: jax.Array, tree: PyTree) -> PyTree:
    """Multiplies every client's leaves by its factor, ``factors[c] * leaf[c]``.

    The shapes are ``[clients], [clients, ...] -> [clients, ...]``.
    """
    return jax.tree.map(lambda x: along_first_axis(factors.astype(x.dtype), x) * x, tree)


def mix_clients(coefficients: jax.Array, tree: PyTree) -> PyTree:
    """Combines the clients' rows linearly, ``[rows, clients], [clients, ...] -> [rows, ...]``.

    The products are in full precision on every device: some round the factors of a matrix product
    unless told not to.
    """

    def mix(leaf: jax.Array) -> jax.Array:
        return jnp.tensordot(
            coefficients.astype(leaf.dtype), leaf, 1, precision=jax.lax.Precision.HIGHEST
        )

    return jax.tree.map(mix, tree)


def inner_products(first: PyTree, second: PyTree) -> jax.Array:
    """Returns all inner products of the rows of two trees, ``[a, ...], [b, ...] -> [a, b]``.

    They are summed over all leaves, in float32 at least. With the same tree twice it is the Gram
    matrix, in which projections and conflict-averse directions are computed without another pass
    over the parameters.
    """

    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        dtype = jnp.promote_types(a.dtype, jnp.float32)
        a, b = (x.reshape(x.shape[0], -1).astype(dtype) for x in (a, b))
        return jnp.matmul(a, b.T, precision=jax.lax.Precision.HIGHEST)

    return sum(map(product, jax.tree.leaves(first), jax.tree.leaves(second)), jnp.zeros(()))


def unflatten_clients(rows: jax.Array, like: PyTree) -> PyTree:
    """Cuts ``[clients, parameters]`` into leaves of the shapes of ``like``, ``[clients, ...]``.

    This is the inverse of :func:`flat_clients`.
    """
    leaves, structure = jax.tree.flatten(like)
    ends = list(itertools.accumulate(leaf[0].size for leaf in leaves))
    parts = jnp.split(rows, ends[:-1], axis=1)
    return jax.tree.unflatten(
        structure, [p.reshape(x.shape).astype(x.dtype) for p, x in zip(parts, leaves, strict=True)]
    )
