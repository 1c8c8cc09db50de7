"""Averaging with the neighbours on a graph, without a server."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedjax_mtl.core.checks import InputError
from fedjax_mtl.server.mixing import mix_models


def gossip_coefficients(
    mixing_matrix: jax.Array, client_ids: jax.Array, present: jax.Array
) -> jax.Array:
    """What each client of a cohort takes from which other one, ``[cohort, cohort]``; rows sum to 1.

    Nobody hears a client that is absent or not in the cohort: the weight that was meant for it goes
    to the listener's own model. A symmetric matrix so stays doubly stochastic among those present.

    Args:
        mixing_matrix: ``[clients, clients]``; rows sum to 1.
        client_ids: the numbers of the cohort's clients, ``[cohort]``.
        present: bool ``[cohort]``.
    """
    rows = jnp.asarray(mixing_matrix)[client_ids]
    speaks = jnp.zeros(rows.shape[1], bool).at[client_ids].set(present)
    missing = jnp.sum(jnp.where(speaks, 0, rows), axis=1)
    return jnp.where(present, rows[:, client_ids], 0) + jnp.diag(missing)


def gossip_mixing(mixing_matrix: jax.Array) -> optax.GradientTransformationExtraArgs:
    """One step of gossip, ``[clients, ...] -> [clients, ...]``: ``w_s <- sum_t W[s, t] w_t``.

    A client that is absent, or whose update diverged, neither sends nor receives in the round
    (:func:`gossip_coefficients`).

    Args:
        mixing_matrix: W, ``[clients, clients]``; rows sum to 1. See
            :mod:`fedjax_mtl.relations.gossip`.
    """
    return mix_models(
        lambda models: gossip_coefficients(mixing_matrix, models.client_ids, models.present)
    )


def check_mixing_matrix(mixing_matrix: jax.Array | np.ndarray) -> None:
    """Checks a mixing matrix, as far as its values are known.

    Args:
        mixing_matrix: ``[clients, clients]``. Of a traced one only the shape is checked.

    Raises:
        InputError: it is not square, has a negative entry, or a row does not sum to 1.
    """
    if mixing_matrix.ndim != 2 or mixing_matrix.shape[0] != mixing_matrix.shape[1]:
        raise InputError(
            f"the mixing matrix has shape {mixing_matrix.shape}; it must be [clients, clients]"
        )
    if isinstance(mixing_matrix, jax.core.Tracer):
        return  # a mapped hyper-parameter: its values are not known yet
    entries = np.asarray(mixing_matrix)
    sums = entries.sum(axis=1)
    worst = int(np.argmax(np.abs(sums - 1)))
    if abs(sums[worst] - 1) > 1e-3:
        raise InputError(
            f"row {worst} of the mixing matrix sums to {sums[worst]:.4f}, not 1; normalise it, "
            "e.g. with gossip.metropolis_weights"
        )
    if entries.min() < -1e-6:
        raise InputError(f"the mixing matrix has a negative entry ({entries.min():.3g})")
