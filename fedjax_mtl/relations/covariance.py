"""How tasks are related: the covariance between the tasks' weight vectors, given or learned from them.

The regulariser is ``(penalty / 2) tr(W^T Omega W)`` for weights W ``[tasks, features]``; its precision ``Omega = inv(Sigma)`` and covariance Sigma are
``[tasks, tasks]``. Everything in the dual needs Sigma, so that is what rules return. (In the literature on task relationships "Omega" is sometimes the covariance.)
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Relationship(NamedTuple):
    """A rule for the covariance between tasks.

    Attributes:
        init: ``(num_tasks, dtype) -> covariance [tasks, tasks]`` to start with.
        update: ``(weights [tasks, features], covariance) -> covariance``; None where the relation is fixed.
        extend: ``covariance -> covariance`` of one task more, before anything is known of it.
    """

    init: Callable[[int, Any], jax.Array]
    update: Callable[[jax.Array, jax.Array], jax.Array] | None
    extend: Callable[[jax.Array], jax.Array]


def row_sum_bound(covariance: jax.Array) -> jax.Array:
    """``max_t sum_u |Sigma_tu| / Sigma_tt``, the safe sigma' of MOCHA (arXiv 1705.10467, appendix; its released code), ``[]``."""
    return jnp.max(jnp.sum(jnp.abs(covariance), axis=1) / jnp.diagonal(covariance))


def eigenvalue_bound(covariance: jax.Array) -> jax.Array:
    """The smallest safe sigma', ``lambda_max(D^-1/2 Sigma D^-1/2)`` with D the diagonal of Sigma, ``[]``; never above the row sums."""
    scale = jax.lax.rsqrt(jnp.diagonal(covariance))
    return jnp.linalg.eigvalsh(scale[:, None] * covariance * scale)[-1]


def check_covariance(matrix: Any, num_tasks: int) -> None:
    """Raises ValueError unless the matrix is ``[num_tasks, num_tasks]``, finite, symmetric and positive definite."""
    matrix = np.asarray(matrix)
    if matrix.shape != (num_tasks, num_tasks):
        raise ValueError(
            f"the relation has shape {matrix.shape}; {num_tasks} tasks need {num_tasks, num_tasks}"
        )
    if not np.isfinite(matrix).all():
        raise ValueError("the relation has entries that are not finite")
    difference = np.abs(matrix - matrix.T)
    if difference.max() > 1e-6 * np.abs(matrix).max():
        row, column = np.unravel_index(int(difference.argmax()), matrix.shape)
        raise ValueError(
            f"the relation is not symmetric: entry ({row}, {column}) is {matrix[row, column]:.6g} and ({column}, {row}) is "
            f"{matrix[column, row]:.6g}; give (A + A.T) / 2 if that is what you mean"
        )
    smallest = np.linalg.eigvalsh(matrix)[0]
    if smallest <= 0:
        raise ValueError(
            f"the relation is not positive definite: its smallest eigenvalue is {smallest:.3g}; "
            "it must be a covariance between tasks, add a multiple of the identity"
        )


def _block(covariance: jax.Array) -> jax.Array:
    """The newcomer unrelated to the others, the trace as before (Li et al. 2019, online federated multi-task learning)."""
    count = covariance.shape[0] + 1
    own = jnp.trace(covariance) / count
    return jnp.pad(covariance * ((count - 1) / count), (0, 1)).at[-1, -1].set(own)


def independent(scale: float | None = None) -> Relationship:
    """``Sigma = scale * I``: every task alone. Default scale: 1 / tasks, where MOCHA's released code starts."""

    def init(num_tasks, dtype=jnp.float32):
        return jnp.eye(num_tasks, dtype=dtype) * (1 / num_tasks if scale is None else scale)

    return Relationship(
        init, None, lambda covariance: init(covariance.shape[0] + 1, covariance.dtype)
    )


def given(covariance: Any) -> Relationship:
    """A covariance known beforehand, ``[tasks, tasks]``.

    Raises:
        ValueError: it is not symmetric and positive definite, or (at init) of another size than the tasks.
    """
    check_covariance(covariance, len(np.asarray(covariance)))

    def init(num_tasks, dtype=jnp.float32):
        check_covariance(covariance, num_tasks)
        return jnp.asarray(covariance, dtype)

    return Relationship(init, None, _block)


def mean_regularised(penalty: float, coupling: float, ridge: float) -> Relationship:
    """``coupling sum_t ||w_t - mean||^2 + ridge ||W||^2`` (Evgeniou and Pontil, KDD 2004; MOCHA's running example).

    ``Sigma = penalty / 2 (1 1^T / (tasks ridge) + (I - 1 1^T / tasks) / (coupling + ridge))``. Coupling 0 is every task alone; towards infinity it becomes one model for
    all. ``penalty`` is MOCHA's own, which cancels: it only scales Sigma.
    """
    known = [x if not isinstance(x, jax.core.Tracer) else 1.0 for x in (penalty, ridge, coupling)]
    if known[0] <= 0 or known[1] <= 0 or known[2] < 0:  # mapped hyper-parameters have no value yet
        raise ValueError(
            f"mean_regularised takes penalty > 0, ridge > 0 and coupling >= 0, got {penalty}, {ridge} and {coupling}; "
            "without a ridge the common mean is not regularised and Sigma does not exist"
        )

    def init(num_tasks, dtype=jnp.float32):
        mean = jnp.full((num_tasks, num_tasks), 1 / num_tasks, dtype)
        spread = jnp.eye(num_tasks, dtype=dtype) - mean
        return penalty / 2 * (mean / ridge + spread / (coupling + ridge))

    return Relationship(
        init, None, lambda covariance: init(covariance.shape[0] + 1, covariance.dtype)
    )


def _spectral(weights: jax.Array, fn: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """``fn`` applied to the eigenvalues of ``W W^T``, ``[tasks, tasks]``; through a thin SVD, so cheap for many tasks with few features."""
    vectors, singular, _ = jnp.linalg.svd(weights, full_matrices=False)
    # All other eigenvalues are 0.
    rest = fn(jnp.zeros((), weights.dtype))
    inside = (vectors * (fn(jnp.square(singular)) - rest)) @ vectors.T
    return inside + rest * jnp.eye(weights.shape[0], dtype=weights.dtype)


def task_covariance(weights: jax.Array, floor: float = 1e-7) -> jax.Array:
    """``(W W^T)^(1/2)`` over its trace, ``[tasks, features] -> [tasks, tasks]``, eigenvalues of ``W W^T`` at least ``floor``.

    It minimises ``tr(W^T Sigma^-1 W)`` over covariances of trace 1, where that equals the squared trace norm of W (Zhang and Yeung, UAI 2010).
    """
    root = _spectral(weights, lambda squares: jnp.sqrt(jnp.maximum(squares, floor)))
    return root / jnp.trace(root)


def task_relationship(ridge: float = 0.0, floor: float = 1e-7) -> Relationship:
    """Learned relation of trace 1, :func:`task_covariance` (Zhang and Yeung 2010); the one MOCHA's released code learns.

    Regulariser: ``(penalty / 2) (tr(W^T Sigma^-1 W) + ridge ||W||^2)``, so that the effective covariance is ``(Sigma^-1 + ridge I)^-1``. A ridge weakens the coupling, without which sigma' grows and rounds
    with it. Starts from ``I / tasks``.

    Args:
        floor: the released code clips eigenvalues only if rounding made one negative; here always.
    """

    def effective(covariance):
        if not isinstance(ridge, jax.core.Tracer) and ridge == 0:
            return covariance
        count = covariance.shape[0]
        return jnp.linalg.solve(
            jnp.eye(count, dtype=covariance.dtype) + ridge * covariance, covariance
        )

    def init(num_tasks, dtype=jnp.float32):
        return effective(jnp.eye(num_tasks, dtype=dtype) / num_tasks)

    def update(weights, covariance):
        del covariance
        return effective(task_covariance(weights, floor))

    return Relationship(init, update, _block)


def cluster_memberships(weights: jax.Array, num_clusters: float, smoothing: float) -> jax.Array:
    """``argmin tr(W^T (smoothing I + Q)^-1 W)`` over ``0 <= Q <= I, tr Q = num_clusters``, ``[tasks, tasks]``.

    Q shares eigenvectors with ``W W^T``; its eigenvalues are ``clip(s_i / sqrt(nu) - smoothing, 0, 1)`` of the singular values s_i, with nu such that they sum to
    ``num_clusters``, found by bisection.
    """
    singular = jnp.linalg.svd(weights, compute_uv=False)

    def eigenvalues(scale, values):
        return jnp.clip(values * scale - smoothing, 0, 1)

    def halve(_, bracket):
        low, high = bracket
        middle = jnp.sqrt(low * high)
        short = jnp.sum(eigenvalues(middle, singular)) < num_clusters
        return jnp.where(short, middle, low), jnp.where(short, high, middle)

    # Weights that are all 0 have no clusters: Q is 0 then, whatever the bracket.
    largest = jnp.where(jnp.max(singular) > 0, jnp.max(singular), 1)
    # In scale = 1 / sqrt(nu), geometrically: at the lower end all are 0, at the upper all that can be are 1.
    smallest = jnp.maximum(jnp.min(jnp.where(singular > 0, singular, largest)), largest * 1e-12)
    bracket = (smoothing / largest * 0.5, (1 + smoothing) / smallest * 2)
    _, scale = jax.lax.fori_loop(0, 200, halve, bracket)
    return _spectral(weights, lambda squares: eigenvalues(scale, jnp.sqrt(squares)))


def clustered(num_clusters: int, smoothing: float = 0.5) -> Relationship:
    """Tasks in clusters, as a convex relaxation (Jacob, Bach, Vert 2009; Zhou, Chen, Ye 2011): ``Sigma = smoothing I + Q``, :func:`cluster_memberships`.

    The papers' weight lambda' is ``penalty / 2``. Starts from ``Q = num_clusters / tasks I``. With more clusters than W has rank, tr Q stays at the rank.
    """
    if num_clusters < 1 or smoothing <= 0:
        raise ValueError(
            f"clustered takes num_clusters >= 1 and smoothing > 0, got {num_clusters} and {smoothing}"
        )

    def init(num_tasks, dtype=jnp.float32):
        if num_clusters > num_tasks:
            raise ValueError(
                f"{num_clusters} clusters of {num_tasks} tasks; give at most one a task"
            )
        return jnp.eye(num_tasks, dtype=dtype) * (smoothing + num_clusters / num_tasks)

    def update(weights, covariance):
        del covariance
        identity = jnp.eye(weights.shape[0], dtype=weights.dtype)
        return smoothing * identity + cluster_memberships(weights, num_clusters, smoothing)

    return Relationship(init, update, _block)


def graphical_lasso(
    scatter: jax.Array, sparsity: float | jax.Array, *, step: float = 1.0, iterations: int = 1000
) -> jax.Array:
    """``argmin tr(S Omega) - log det Omega + sparsity sum |Omega_tu|``, ``[tasks, tasks]``, diagonal included, by ADMM.

    The result is the sparse iterate; it is positive definite once the iteration has converged.
    """

    def iterate(_, carry):
        sparse, scaled_dual = carry
        values, vectors = jnp.linalg.eigh(step * (sparse - scaled_dual) - scatter)
        values = (values + jnp.sqrt(jnp.square(values) + 4 * step)) / (2 * step)
        dense = (vectors * values) @ vectors.T
        total = dense + scaled_dual
        sparse = jnp.sign(total) * jnp.maximum(jnp.abs(total) - sparsity / step, 0)
        return sparse, total - sparse

    zero = jnp.zeros_like(scatter)
    return jax.lax.fori_loop(0, iterations, iterate, (zero, zero))[0]


def sparse_precision(
    penalty: float,
    sparsity: float,
    *,
    ridge: float = 0.0,
    floor: float = 0.05,
    iterations: int = 300,
) -> Relationship:
    """Conditionally independent tasks have no edge: a learned sparse precision (Goncalves et al., MSSL, 2014/2016).

    Regulariser: ``(penalty / 2) (tr(W^T Omega W) + ridge ||W||^2) - features log det Omega + features (sparsity ||Omega||_1 + floor tr Omega)``. The Omega step is the
    :func:`graphical_lasso` of ``penalty / 2 W W^T / features + floor I``. The exact weights of the terms differ between the sources; these are a reconstruction. Starts
    from independent tasks.
    """
    if sparsity < 0 or floor <= 0:
        raise ValueError(
            f"sparse_precision takes sparsity >= 0 and floor > 0, got {sparsity} and {floor}"
        )

    def effective(precision):
        count = precision.shape[0]
        return jnp.linalg.inv(precision + ridge * jnp.eye(count, dtype=precision.dtype))

    def init(num_tasks, dtype=jnp.float32):
        return effective(jnp.eye(num_tasks, dtype=dtype) / (floor + sparsity))

    def update(weights, covariance):
        del covariance
        scatter = penalty / 2 * weights @ weights.T / weights.shape[1]
        scatter += floor * jnp.eye(len(weights), dtype=weights.dtype)
        return effective(graphical_lasso(scatter, sparsity, iterations=iterations))

    return Relationship(init, update, _block)
