"""Sheaf-FMTL: clients agree only on learned projections of their models.

Ben Issaid, Vepakomma, Bennis, TMLR 2025, arXiv 2502.01145.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedjax_mtl.core import trees
from fedjax_mtl.core.checks import InputError
from fedjax_mtl.relations.graphs import check_adjacency
from fedjax_mtl.server.gram import full_precision
from fedjax_mtl.server.mixing import Models, returned_models
from fedjax_mtl.server.reports import Report, no_scalars, scalars

PyTree = Any


class SheafState(NamedTuple):
    """What the sheaf remembers.

    Attributes:
        maps: restriction maps ``[edges, 2, rank, parameters]``: for edge (i, j) that of client i,
            then that of client j.
        report: ``disagreement`` ``[]``, what the step in the models descends, before the step.
    """

    maps: jax.Array
    report: Report


def _edges(adjacency: np.ndarray) -> np.ndarray:
    """Each pair once, int ``[edges, 2]``."""
    rows, columns = np.nonzero(np.triu((np.asarray(adjacency) + np.asarray(adjacency).T) > 0, 1))
    return np.stack([rows, columns], axis=1)


def _slots(edges: jax.Array, num_clients: int, models: Models) -> jax.Array:
    """Where the edges' ends stand in the cohort, ``[edges, 2]``; -1 for who is not there."""
    places = jnp.where(models.present, jnp.arange(models.present.shape[0]), -1)
    return jnp.full(num_clients, -1).at[models.client_ids].set(places)[edges]


@full_precision
def _disagreements(maps: jax.Array, ends: jax.Array, vectors: jax.Array) -> jax.Array:
    """Of each end of an edge with the other, ``[edges, 2, rank]``; 0 where one of them is away.

    Args:
        maps: ``[edges, 2, rank, parameters]``.
        ends: slots, ``[edges, 2]``.
        vectors: models, ``[cohort, parameters]``.
    """
    projected = jnp.einsum("esrp,esp->esr", maps, vectors[ends])
    difference = projected - projected[:, ::-1]
    active = jnp.all(ends >= 0, axis=1)
    return jnp.where(active[:, None, None], difference, 0)


@full_precision
def _pulls(maps: jax.Array, ends: jax.Array, apart: jax.Array, like: jax.Array) -> jax.Array:
    """The gradient in the models, ``[cohort, parameters]``.

    ``apart`` are the disagreements, ``[edges, 2, rank]``.
    """
    pulls = jnp.einsum("esrp,esr->esp", maps, apart)
    return jnp.zeros_like(like).at[ends.reshape(-1)].add(pulls.reshape(-1, like.shape[1]))


@full_precision
def _map_gradient(maps: jax.Array, ends: jax.Array, vectors: jax.Array) -> jax.Array:
    """The gradient in the maps, ``[edges, 2, rank, parameters]``."""
    return jnp.einsum("esr,esp->esrp", _disagreements(maps, ends, vectors), vectors[ends])


def sheaf_mixing(
    adjacency: np.ndarray,
    *,
    key: jax.Array,
    strength: float,
    map_step: float,
    compression: float = 0.1,
    deviation: float = 0.01,
) -> optax.GradientTransformationExtraArgs:
    """A gradient step on ``1/2 sum_edges ||P_ij w_i - P_ji w_j||^2`` in models, then one in maps.

        w_i  <- w_i  - strength * sum_j P_ij^T (P_ij w_i - P_ji w_j)
        P_ij <- P_ij - map_step * (P_ij w_i - P_ji w_j) w_i^T

    ``[clients, ...] -> [clients, ...]``. Each edge carries ``rank = floor(compression *
    parameters)`` numbers a direction (at least 1), :func:`sheaf_traffic`. With identity maps that
    do not move it is Laplacian mixing. All clients act on one snapshot, the paper's form; the
    released code lets them act one after the other, in place. The maps see the models after the
    first step, as in that code. Edges with an absent client rest.

    The maps take ``2 edges x rank x parameters`` numbers: this is for small models, or for a part
    of one under ``only``. Clients of different model sizes, which the paper allows, do not fit a
    stacked cohort.

    Args:
        adjacency: ``[clients, clients]``; an entry above 0 is an edge, its weight does not count.
        key: draws the maps, N(0, deviation^2).
        strength: the released code's alpha x lambda.
        map_step: its eta x lambda.
        compression: the share of a model that an edge carries.
        deviation: of the maps' entries at the start.

    Extra arguments used: ``client_ids``, ``present``. Reports ``disagreement``, the objective above
    at the models that came back.

    Raises:
        InputError: a bad adjacency, or (at init) one that is not of the population's size.
    """
    check_adjacency(adjacency)
    if not 0 < compression <= 1:
        raise InputError(
            f"compression is {compression}; the share of a model that an edge carries lies above 0 "
            "and at most at 1"
        )
    edges = jnp.asarray(_edges(adjacency), jnp.int32)
    num_clients = len(np.asarray(adjacency))

    def init(params: PyTree) -> SheafState:
        flat = jax.eval_shape(trees.flat_clients, params)
        check_adjacency(adjacency, flat.shape[0])
        rank = max(1, int(compression * flat.shape[1]))
        shape = (len(edges), 2, rank, flat.shape[1])
        maps = deviation * jax.random.normal(key, shape, flat.dtype)
        return SheafState(maps, no_scalars(["disagreement"]))

    def update(updates, state, params=None, *, client_ids=None, present=None, **extra_args):
        del extra_args
        models = returned_models(updates, params, client_ids, present)
        flat = trees.flat_clients(models.results)
        ends = _slots(edges, num_clients, models)
        apart = _disagreements(state.maps, ends, flat)
        moved = flat - strength * _pulls(state.maps, ends, apart, flat)
        maps = state.maps - map_step * _map_gradient(state.maps, ends, moved)
        steps = trees.unflatten_clients(trees.flat_clients(params) - moved, params)
        # Each edge is seen from both its ends.
        report = scalars({"disagreement": jnp.sum(jnp.square(apart)) / 4})
        return trees.mask_clients(steps, models.present), SheafState(maps, report)

    return optax.GradientTransformationExtraArgs(init, update)


def sheaf_traffic(adjacency: np.ndarray, parameters: int, compression: float = 0.1) -> int:
    """Bytes that the busiest client sends in a round: ``rank`` 4-byte numbers to each neighbour.

    Args:
        adjacency: as for :func:`sheaf_mixing`.
        parameters: the size of a model.
        compression: as for :func:`sheaf_mixing`.
    """
    degree = int(((np.asarray(adjacency) > 0).sum(axis=1)).max(initial=0))
    return 4 * degree * max(1, int(compression * parameters))
