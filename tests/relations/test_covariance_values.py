"""Relations between tasks by value.

What each rule minimises, where it starts, and how it takes one task more.
"""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize

from fedjax_mtl.relations import covariance

RNG = np.random.default_rng(0)
WEIGHTS = RNG.normal(size=(5, 3))
ROOT = RNG.normal(size=(4, 4))
SIGMA = ROOT @ ROOT.T + 0.5 * np.eye(4)


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def assert_equals(ours, theirs, rtol=1e-6):
    np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=1e-9)


def learned(rule, weights=WEIGHTS):
    """The relation that a rule learns from weights."""
    return np.asarray(jax.jit(lambda w: rule.update(w, None))(jnp.asarray(weights)))


def start(rule, num_tasks=4):
    return np.asarray(rule.init(num_tasks, jnp.float64))


def test_bounds():
    scale = np.sqrt(np.diag(SIGMA))
    assert_equals(
        covariance.row_sum_bound(jnp.asarray(SIGMA)),
        max(np.abs(row).sum() / row[i] for i, row in enumerate(SIGMA)),
    )
    correlations = SIGMA / scale[:, None] / scale
    largest = np.linalg.eigvalsh(correlations)[-1]
    assert_equals(covariance.eigenvalue_bound(jnp.asarray(SIGMA)), largest)


def test_independent_tasks():
    """Tasks have variance 1 / tasks, or the variance that is asked for.

    The same holds with one task more.
    """
    for rule, scale in (
        (covariance.independent(), lambda tasks: 1 / tasks),
        (covariance.independent(0.3), lambda tasks: 0.3),
    ):
        assert_equals(start(rule), scale(4) * np.eye(4))
        assert_equals(rule.extend(jnp.asarray(SIGMA)), scale(5) * np.eye(5))
        assert rule.update is None


def test_mean_regularised_is_the_inverse_of_its_precision():
    """The regulariser is ``coupling sum ||w_t - mean||^2 + ridge ||W||^2``.

    That equals ``penalty / 2 tr(W^T Omega W)``.
    """
    rule = covariance.mean_regularised(0.7, 2.0, 0.3)
    for ours, tasks in ((start(rule), 4), (rule.extend(jnp.asarray(SIGMA)), 5)):
        spread = np.eye(tasks) - np.full((tasks, tasks), 1 / tasks)
        precision = 2 / 0.7 * (2.0 * spread + 0.3 * np.eye(tasks))
        assert_equals(ours, np.linalg.inv(precision))


def test_a_newcomer_is_unrelated_and_the_trace_stays():
    for rule in (
        covariance.given(SIGMA),
        covariance.task_relationship(),
        covariance.clustered_tasks(2),
    ):
        grown = np.asarray(rule.extend(jnp.asarray(SIGMA)))
        assert_equals(grown[:4, :4], 0.8 * SIGMA)
        assert_equals(grown[4], [0, 0, 0, 0, np.trace(SIGMA) / 5])


def root(matrix, floor=1e-7):
    values, vectors = np.linalg.eigh(matrix)
    return vectors * np.sqrt(np.maximum(values, floor)) @ vectors.T


def test_task_relationship():
    """The relation is the root of ``W W^T`` over its trace, with eigenvalues of at least 1e-7.

    A ridge is added to the precision.
    """
    square = root(WEIGHTS @ WEIGHTS.T)
    square /= np.trace(square)
    # Five tasks with three features: two eigenvalues are at the floor.
    assert 1e-5 < np.linalg.eigvalsh(square)[0] < 1e-3
    assert_equals(learned(covariance.task_relationship()), square)
    floored = root(WEIGHTS @ WEIGHTS.T, 0.5)
    assert_equals(learned(covariance.task_relationship(floor=0.5)), floored / np.trace(floored))
    ridged = np.linalg.inv(np.linalg.inv(square) + 0.2 * np.eye(5))
    assert_equals(learned(covariance.task_relationship(0.2)), ridged, rtol=1e-5)
    assert_equals(start(covariance.task_relationship()), np.eye(4) / 4)
    assert_equals(start(covariance.task_relationship(0.2)), np.eye(4) / 4.2)


def test_clusters():
    """The relation is ``smoothing I + Q``, where Q minimises the regulariser.

    The eigenvalues of Q lie between 0 and 1 and sum to the number of clusters.
    """
    smoothing, clusters = 0.5, 2
    assert_equals(start(covariance.clustered_tasks(clusters)), (smoothing + 0.5) * np.eye(4))
    sigma = learned(covariance.clustered_tasks(clusters))
    vectors, singular, _ = np.linalg.svd(WEIGHTS)
    ours = np.diag(vectors.T @ sigma @ vectors)
    assert_equals(vectors.T @ sigma @ vectors, np.diag(ours))
    assert_equals(ours[3:], smoothing)  # two directions without weight
    shares = ours[:3] - smoothing
    assert_equals(shares.sum(), clusters)
    exact = minimize(
        lambda q: np.sum(np.square(singular) / (smoothing + q)),
        np.full(3, clusters / 3),
        bounds=[(0, 1)] * 3,
        constraints={"type": "eq", "fun": lambda q: q.sum() - clusters},
    )
    np.testing.assert_allclose(shares, exact.x, atol=1e-4)
    other = learned(covariance.clustered_tasks(1, 0.1))
    assert_equals(np.trace(other), 1 + 5 * 0.1)


def test_graphical_lasso_is_optimal():
    """``S - inv(Omega)`` is minus the sparsity times the sign where an entry is not 0.

    Elsewhere it is at most the sparsity.
    """
    solve = jax.jit(lambda s: covariance.graphical_lasso(s, 0.4, iterations=2000))
    omega = np.asarray(solve(jnp.asarray(SIGMA)))
    slack = SIGMA - np.linalg.inv(omega)
    there = omega != 0
    assert 4 < there.sum() < 16
    np.testing.assert_allclose(slack[there], -0.4 * np.sign(omega[there]), atol=1e-6)
    assert np.abs(slack[~there]).max() <= 0.4


def test_sparse_precision():
    """The precision is the graphical lasso of ``penalty / 2 W W^T / features + floor I``.

    The ridge is added to what the lasso gives.
    """
    rule = covariance.sparse_precision(0.8, 0.1, ridge=0.3, floor=0.2, iterations=500)
    scatter = 0.8 / 2 * WEIGHTS @ WEIGHTS.T / 3 + 0.2 * np.eye(5)
    solve = jax.jit(lambda s: covariance.graphical_lasso(s, 0.1, iterations=500))
    precision = np.asarray(solve(jnp.asarray(scatter)))
    assert_equals(learned(rule), np.linalg.inv(precision + 0.3 * np.eye(5)))
    assert_equals(start(rule), np.eye(4) / (1 / 0.3 + 0.3))
    assert_equals(start(covariance.sparse_precision(0.8, 0.1)), 0.15 * np.eye(4))


def test_defaults():
    """Learned relations depend on these default values."""
    for name, expected in {
        "independent": {"scale": None},
        "task_covariance": {"floor": 1e-7},
        "task_relationship": {"ridge": 0.0, "floor": 1e-7},
        "clustered_tasks": {"smoothing": 0.5},
        "graphical_lasso": {"step": 1.0, "iterations": 1000},
        "sparse_precision": {"ridge": 0.0, "floor": 0.05, "iterations": 300},
    }.items():
        parameters = inspect.signature(getattr(covariance, name)).parameters
        assert {own: parameters[own].default for own in expected} == expected


def test_refusals():
    """A coupling or sparsity of 0 makes sense.

    A ridge, penalty or smoothing of 0 does not.
    """
    covariance.mean_regularised(1.0, 0.0, 0.1)
    covariance.sparse_precision(1.0, 0.0)
    covariance.clustered_tasks(4).init(4)
    for make in (
        lambda: covariance.mean_regularised(0.0, 1.0, 0.1),
        lambda: covariance.mean_regularised(1.0, 1.0, 0.0),
        lambda: covariance.mean_regularised(1.0, -0.1, 0.1),
        lambda: covariance.sparse_precision(1.0, 1.0, floor=0.0),
        lambda: covariance.clustered_tasks(2, 0.0),
        lambda: covariance.given(np.ones((2, 2))),
    ):
        with pytest.raises(ValueError):
            make()
