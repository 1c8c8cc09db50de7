"""How tasks are related: the covariance between the tasks' weight vectors, given or learned.

The regulariser is ``(penalty / 2) tr(W^T Omega W)`` for weights W ``[tasks, features]``. Its
precision ``Omega = inv(Sigma)`` and the covariance Sigma are ``[tasks, tasks]``. Everything in the
dual needs Sigma, so that is what rules return. (In the literature on task relationships "Omega" is
sometimes the covariance.)
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_mtl.core.checks import InputError


class Relationship(NamedTuple):
    """A rule for the covariance between tasks.

    Attributes:
        init: ``(num_tasks, dtype) -> covariance [tasks, tasks]`` to start with.
        update: ``(weights [tasks, features], covariance) -> covariance``; None where the relation
            is fixed.
        extend: ``covariance -> covariance`` of one task more, before anything is known of it.
    """

    init: Callable[[int, Any], jax.Array]
    update: Callable[[jax.Array, jax.Array], jax.Array] | None
    extend: Callable[[jax.Array], jax.Array]


def row_sum_bound(covariance: jax.Array) -> jax.Array:
    """Returns MOCHA's safe sigma', ``max_t sum_u |Sigma_tu| / Sigma_tt``, ``[]``.

    Reference: arXiv 1705.10467, appendix, and the released code.
    """
    return jnp.max(jnp.sum(jnp.abs(covariance), axis=1) / jnp.diagonal(covariance))


def eigenvalue_bound(covariance: jax.Array) -> jax.Array:
    """Returns the smallest safe sigma', ``lambda_max(D^-1/2 Sigma D^-1/2)``, ``[]``.

    D is the diagonal of Sigma. The value is never above :func:`row_sum_bound`.
    """
    scale = jax.lax.rsqrt(jnp.diagonal(covariance))
    return jnp.linalg.eigvalsh(scale[:, None] * covariance * scale)[-1]


def check_covariance(matrix: Any, num_tasks: int) -> None:
    """Checks that a relation is a covariance between ``num_tasks`` tasks.

    Raises:
        InputError: the matrix is not ``[num_tasks, num_tasks]``, finite, symmetric and positive
            definite.
    """
    matrix = np.asarray(matrix)
    if matrix.shape != (num_tasks, num_tasks):
        raise InputError(
            f"the relation has shape {matrix.shape}; {num_tasks} tasks need {num_tasks, num_tasks}"
        )
    if not np.isfinite(matrix).all():
        raise InputError("the relation has entries that are not finite")
    difference = np.abs(matrix - matrix.T)
    if difference.max() > 1e-6 * np.abs(matrix).max():
        row, column = np.unravel_index(int(difference.argmax()), matrix.shape)
        raise InputError(
            f"the relation is not symmetric: entry ({row}, {column}) is "
            f"{matrix[row, column]:.6g} and ({column}, {row}) is {matrix[column, row]:.6g}; "
            "give (A + A.T) / 2 if that is what you mean"
        )
    smallest = np.linalg.eigvalsh(matrix)[0]
    if smallest <= 0:
        raise InputError(
            f"the relation is not positive definite: its smallest eigenvalue is {smallest:.3g}; "
            "it must be a covariance between tasks, add a multiple of the identity"
        )


def _with_unrelated_task(covariance: jax.Array) -> jax.Array:
    """Adds a task that is unrelated to the others, with the trace as before.

    Reference: Li et al. 2019, online federated multi-task learning.
    """
    count = covariance.shape[0] + 1
    own = jnp.trace(covariance) / count
    return jnp.pad(covariance * ((count - 1) / count), (0, 1)).at[-1, -1].set(own)


def independent(scale: float | None = None) -> Relationship:
    """Returns ``Sigma = scale * I``: every task is alone.

    Args:
        scale: the variance of each task. The default is 1 / tasks, where MOCHA's released code
            starts.
    """

    def init(num_tasks: int, dtype: Any = jnp.float32) -> jax.Array:
        return jnp.eye(num_tasks, dtype=dtype) * (1 / num_tasks if scale is None else scale)

    return Relationship(
        init, None, lambda covariance: init(covariance.shape[0] + 1, covariance.dtype)
    )


def given(covariance: Any) -> Relationship:
    """Returns a covariance known beforehand.

    Args:
        covariance: ``[tasks, tasks]``, symmetric and positive definite.

    Raises:
        InputError: the matrix is not symmetric and positive definite, or (at init) its size is not
            the number of tasks.
    """
    check_covariance(covariance, len(np.asarray(covariance)))

    def init(num_tasks: int, dtype: Any = jnp.float32) -> jax.Array:
        check_covariance(covariance, num_tasks)
        return jnp.asarray(covariance, dtype)

    return Relationship(init, None, _with_unrelated_task)


def mean_regularised(penalty: float, coupling: float, ridge: float) -> Relationship:
    """Pulls the tasks towards their mean, as in MOCHA's running example.

    The regulariser is ``coupling sum_t ||w_t - mean||^2 + ridge ||W||^2`` (Evgeniou and Pontil,
    KDD 2004), of which the covariance is
    ``Sigma = penalty / 2 (1 1^T / (tasks ridge) + (I - 1 1^T / tasks) / (coupling + ridge))``.

    Args:
        penalty: MOCHA's own penalty. It cancels: it only scales Sigma.
        coupling: 0 leaves every task alone; towards infinity there is one model for all.
        ridge: of the weights themselves; must be positive.

    Raises:
        InputError: a penalty or ridge that is not positive, or a negative coupling.
    """
    known = [x if not isinstance(x, jax.core.Tracer) else 1.0 for x in (penalty, ridge, coupling)]
    if known[0] <= 0 or known[1] <= 0 or known[2] < 0:  # mapped hyper-parameters have no value yet
        raise InputError(
            "mean_regularised takes penalty > 0, ridge > 0 and coupling >= 0, "
            f"got {penalty}, {ridge} and {coupling}; without a ridge the common "
            "mean is not regularised and Sigma does not exist"
        )

    def init(num_tasks: int, dtype: Any = jnp.float32) -> jax.Array:
        mean = jnp.full((num_tasks, num_tasks), 1 / num_tasks, dtype)
        spread = jnp.eye(num_tasks, dtype=dtype) - mean
        return penalty / 2 * (mean / ridge + spread / (coupling + ridge))

    return Relationship(
        init, None, lambda covariance: init(covariance.shape[0] + 1, covariance.dtype)
    )


def _spectral(weights: jax.Array, fn: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Applies ``fn`` to the eigenvalues of ``W W^T``, ``[tasks, tasks]``.

    It goes through a thin SVD, so it is cheap for many tasks with few features.
    """
    vectors, singular, _ = jnp.linalg.svd(weights, full_matrices=False)
    # All other eigenvalues are 0.
    rest = fn(jnp.zeros((), weights.dtype))
    scaled = vectors * (fn(jnp.square(singular)) - rest)
    inside = jnp.matmul(scaled, vectors.T, precision=jax.lax.Precision.HIGHEST)
    return inside + rest * jnp.eye(weights.shape[0], dtype=weights.dtype)


def task_covariance(weights: jax.Array, floor: float = 1e-7) -> jax.Array:
    """Returns ``(W W^T)^(1/2)`` over its trace, ``[tasks, features] -> [tasks, tasks]``.

    It minimises ``tr(W^T Sigma^-1 W)`` over covariances of trace 1, where that equals the squared
    trace norm of W (Zhang and Yeung, UAI 2010).

    Args:
        weights: ``[tasks, features]``.
        floor: the least eigenvalue that ``W W^T`` is taken to have.
    """
    root = _spectral(weights, lambda squares: jnp.sqrt(jnp.maximum(squares, floor)))
    return root / jnp.trace(root)


def task_relationship(ridge: float = 0.0, floor: float = 1e-7) -> Relationship:
    """Learns a relation of trace 1, :func:`task_covariance`; MOCHA's released code learns this one.

    The regulariser is ``(penalty / 2) (tr(W^T Sigma^-1 W) + ridge ||W||^2)`` (Zhang and Yeung,
    UAI 2010), so that the effective covariance is ``(Sigma^-1 + ridge I)^-1``. It starts from
    ``I / tasks``.

    Args:
        ridge: it weakens the coupling. Without it sigma' grows with the coupling, and with sigma'
            the number of rounds that are needed.
        floor: the least eigenvalue. The released code clips eigenvalues only if rounding made one
            negative; here they are always clipped.
    """

    def effective(covariance: jax.Array) -> jax.Array:
        if not isinstance(ridge, jax.core.Tracer) and ridge == 0:
            return covariance
        count = covariance.shape[0]
        return jnp.linalg.solve(
            jnp.eye(count, dtype=covariance.dtype) + ridge * covariance, covariance
        )

    def init(num_tasks: int, dtype: Any = jnp.float32) -> jax.Array:
        return effective(jnp.eye(num_tasks, dtype=dtype) / num_tasks)

    def update(weights: jax.Array, covariance: jax.Array) -> jax.Array:
        del covariance
        return effective(task_covariance(weights, floor))

    return Relationship(init, update, _with_unrelated_task)


def cluster_memberships(weights: jax.Array, num_clusters: float, smoothing: float) -> jax.Array:
    """Returns ``argmin_Q tr(W^T (smoothing I + Q)^-1 W)``, ``[tasks, tasks]``.

    The minimum is over ``0 <= Q <= I, tr Q = num_clusters``. Q shares its eigenvectors with
    ``W W^T``. Its eigenvalues are ``clip(s_i / sqrt(nu) - smoothing, 0, 1)`` of the singular values
    s_i, with nu such that they sum to ``num_clusters``, found by bisection.

    Args:
        weights: ``[tasks, features]``.
        num_clusters: the trace of Q.
        smoothing: of the papers; must be positive.
    """
    singular = jnp.linalg.svd(weights, compute_uv=False)

    def eigenvalues(scale: jax.Array, values: jax.Array) -> jax.Array:
        return jnp.clip(values * scale - smoothing, 0, 1)

    def halve(_: int, bracket: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bracket
        middle = jnp.sqrt(low * high)
        short = jnp.sum(eigenvalues(middle, singular)) < num_clusters
        return jnp.where(short, middle, low), jnp.where(short, high, middle)

    # Weights that are all 0 have no clusters: Q is 0 then, whatever the bracket.
    largest = jnp.where(jnp.max(singular) > 0, jnp.max(singular), 1)
    # In scale = 1 / sqrt(nu), geometrically: at the lower end all eigenvalues are 0, at the upper
    # end all that can be 1 are 1.
    smallest = jnp.maximum(jnp.min(jnp.where(singular > 0, singular, largest)), largest * 1e-12)
    bracket = (smoothing / largest * 0.5, (1 + smoothing) / smallest * 2)
    _, scale = jax.lax.fori_loop(0, 200, halve, bracket)
    return _spectral(weights, lambda squares: eigenvalues(scale, jnp.sqrt(squares)))


def clustered_tasks(num_clusters: int, smoothing: float = 0.5) -> Relationship:
    """Learns clusters of tasks: ``Sigma = smoothing I + Q``, with :func:`cluster_memberships`.

    This is a convex relaxation (Jacob, Bach, Vert 2009; Zhou, Chen, Ye 2011). The papers' weight
    lambda' is ``penalty / 2``. It starts from ``Q = num_clusters / tasks I``. With more clusters
    than W has rank, tr Q stays at the rank.

    Args:
        num_clusters: how many clusters, at most one a task.
        smoothing: must be positive; the larger, the less the clusters bind.

    Raises:
        InputError: no cluster, a smoothing that is not positive, or (at init) more clusters than
            tasks.
    """
    if num_clusters < 1 or smoothing <= 0:
        raise InputError(
            "clustered_tasks takes num_clusters >= 1 and smoothing > 0, "
            f"got {num_clusters} and {smoothing}"
        )

    def init(num_tasks: int, dtype: Any = jnp.float32) -> jax.Array:
        if num_clusters > num_tasks:
            raise InputError(
                f"{num_clusters} clusters of {num_tasks} tasks; give at most one a task"
            )
        return jnp.eye(num_tasks, dtype=dtype) * (smoothing + num_clusters / num_tasks)

    def update(weights: jax.Array, covariance: jax.Array) -> jax.Array:
        del covariance
        identity = jnp.eye(weights.shape[0], dtype=weights.dtype)
        return smoothing * identity + cluster_memberships(weights, num_clusters, smoothing)

    return Relationship(init, update, _with_unrelated_task)


def graphical_lasso(
    scatter: jax.Array, sparsity: float | jax.Array, *, step: float = 1.0, iterations: int = 1000
) -> jax.Array:
    """Returns ``argmin_Omega tr(S Omega) - log det Omega + sparsity sum |Omega_tu|``, by ADMM.

    The result is the sparse iterate; it is positive definite once the iteration has converged.

    Args:
        scatter: S, ``[tasks, tasks]``.
        sparsity: the weight of the absolute values, diagonal included.
        step: ADMM's penalty.
        iterations: how many steps of ADMM.

    Returns:
        The precision Omega, ``[tasks, tasks]``.
    """

    def iterate(_: int, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        sparse, scaled_dual = carry
        values, vectors = jnp.linalg.eigh(step * (sparse - scaled_dual) - scatter)
        values = (values + jnp.sqrt(jnp.square(values) + 4 * step)) / (2 * step)
        dense = jnp.matmul(vectors * values, vectors.T, precision=jax.lax.Precision.HIGHEST)
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
    """Learns a sparse precision: tasks without an edge are conditionally independent.

    The regulariser is ``(penalty / 2) (tr(W^T Omega W) + ridge ||W||^2) - features log det Omega
    + features (sparsity ||Omega||_1 + floor tr Omega)`` (Goncalves et al., MSSL, 2014/2016). The
    step of Omega is the :func:`graphical_lasso` of ``penalty / 2 W W^T / features + floor I``. The
    exact weights of the terms differ between the sources, so these are a reconstruction. It starts
    from independent tasks.

    Args:
        penalty: MOCHA's penalty.
        sparsity: the weight of the absolute values of Omega's entries; not negative.
        ridge: of the weights themselves.
        floor: the weight of the trace of Omega; must be positive.
        iterations: of the graphical lasso.

    Raises:
        InputError: a negative sparsity, or a floor that is not positive.
    """
    if sparsity < 0 or floor <= 0:
        raise InputError(
            f"sparse_precision takes sparsity >= 0 and floor > 0, got {sparsity} and {floor}"
        )

    def effective(precision: jax.Array) -> jax.Array:
        count = precision.shape[0]
        return jnp.linalg.inv(precision + ridge * jnp.eye(count, dtype=precision.dtype))

    def init(num_tasks: int, dtype: Any = jnp.float32) -> jax.Array:
        return effective(jnp.eye(num_tasks, dtype=dtype) / (floor + sparsity))

    def update(weights: jax.Array, covariance: jax.Array) -> jax.Array:
        del covariance
        gram = jnp.matmul(penalty / 2 * weights, weights.T, precision=jax.lax.Precision.HIGHEST)
        scatter = gram / weights.shape[1]
        scatter += floor * jnp.eye(len(weights), dtype=weights.dtype)
        return effective(graphical_lasso(scatter, sparsity, iterations=iterations))

    return Relationship(init, update, _with_unrelated_task)
