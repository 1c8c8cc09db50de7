"""Sheaf-FMTL: clients agree only on learned projections of their models (Ben Issaid, Vepakomma, Bennis, TMLR 2025, arXiv 2502.01145)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedjax_mtl.core import trees
from fedjax_mtl.relations.graphs import check_adjacency
from fedjax_mtl.server.mixing import returned_models


class SheafState(NamedTuple):
    """Restriction maps ``[edges, 2, rank, parameters]``: for edge (i, j) that of client i, then that of client j."""

    maps: jax.Array


def _edges(adjacency: np.ndarray) -> np.ndarray:
    """Each pair once, int ``[edges, 2]``."""
    rows, columns = np.nonzero(np.triu((np.asarray(adjacency) + np.asarray(adjacency).T) > 0, 1))
    return np.stack([rows, columns], axis=1)


def sheaf_mixing(
    adjacency: np.ndarray,
    *,
    key: jax.Array,
    strength: float,
    map_step: float,
    compression: float = 0.1,
    deviation: float = 0.01,
) -> optax.GradientTransformationExtraArgs:
    """A gradient step on ``1/2 sum_edges ||P_ij w_i - P_ji w_j||^2`` in the models, then one in the maps, ``[clients, ...] -> [clients, ...]``.

        w_i  <- w_i  - strength * sum_j P_ij^T (P_ij w_i - P_ji w_j)
        P_ij <- P_ij - map_step * (P_ij w_i - P_ji w_j) w_i^T

    Each edge carries ``rank = floor(compression * parameters)`` numbers a direction (at least 1), :func:`sheaf_traffic`. With identity maps that do not move it is Laplacian mixing. All clients act on one snapshot, the paper's
    form; the released code lets them act one after the other, in place. The maps see the models after the first step, as in that code. Edges with an absent client rest.

    Args:
        adjacency: ``[clients, clients]``; an entry above 0 is an edge, its weight does not count.
        key: draws the maps, N(0, deviation^2). strength: the released code's alpha x lambda. map_step: its eta x lambda.

    The maps take ``2 edges x rank x parameters`` numbers: this is for small models, or for a part of one under ``only``. Clients of different model sizes, which the paper allows,
    do not fit a stacked cohort.

    Raises:
        ValueError: a bad adjacency, or (at init) one that is not of the population's size.
    """
    check_adjacency(adjacency)
    if not 0 < compression <= 1:
        raise ValueError(
            f"compression is {compression}; the share of a model that an edge carries lies above 0 and at most at 1"
        )
    edges = jnp.asarray(_edges(adjacency), jnp.int32)

    def init(params):
        flat = jax.eval_shape(trees.flat_clients, params)
        check_adjacency(adjacency, flat.shape[0])
        rank = max(1, int(compression * flat.shape[1]))
        shape = (len(edges), 2, rank, flat.shape[1])
        return SheafState(deviation * jax.random.normal(key, shape, flat.dtype))

    def update(updates, state, params=None, *, client_ids=None, present=None, **extra_args):
        del extra_args
        models = returned_models(updates, params, client_ids, present)
        flat = trees.flat_clients(models.results)
        num_clients = len(np.asarray(adjacency))
        # Slots of the edges' ends in this cohort; a client that was not sampled has none.
        slots = (
            jnp.full(num_clients, -1)
            .at[models.client_ids]
            .set(jnp.where(models.present, jnp.arange(flat.shape[0]), -1))
        )
        ends = slots[edges]
        active = jnp.all(ends >= 0, axis=1)

        def disagreement(vectors):
            """``[edges, 2, rank]``: of each end with the other."""
            projected = jnp.einsum("esrp,esp->esr", state.maps, vectors[ends])
            difference = projected - projected[:, ::-1]
            return jnp.where(active[:, None, None], difference, 0)

        pulls = jnp.einsum("esrp,esr->esp", state.maps, disagreement(flat))
        pulled = jnp.zeros_like(flat).at[ends.reshape(-1)].add(pulls.reshape(-1, flat.shape[1]))
        moved = flat - strength * pulled
        maps = state.maps - map_step * jnp.einsum("esr,esp->esrp", disagreement(moved), moved[ends])
        steps = trees.unflatten_clients(trees.flat_clients(params) - moved, params)
        return trees.mask_clients(steps, models.present), SheafState(maps)

    return optax.GradientTransformationExtraArgs(init, update)


def sheaf_traffic(adjacency: np.ndarray, parameters: int, compression: float = 0.1) -> int:
    """Bytes that the busiest client sends in a round: ``rank`` 4-byte numbers to each neighbour."""
    degree = int(((np.asarray(adjacency) > 0).sum(axis=1)).max(initial=0))
    return 4 * degree * max(1, int(compression * parameters))
