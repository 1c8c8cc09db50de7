"""When clusters of clients split and how, against numpy and scipy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform

from fedjax_mtl.server import clusters

RNG = np.random.default_rng(0)
UPDATES = RNG.normal(size=(6, 3)) + 3 * np.repeat([[1.0, 0, 0], [0, -1, 0]], 3, axis=0)
MEMBERS = np.array([True, True, False, True, True, True])


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def test_distances_between_updates():
    """One less the cosine, and 0 on the diagonal, also of an update without length."""
    updates = np.vstack([UPDATES, np.zeros(3)])
    norms = np.linalg.norm(updates, axis=1, keepdims=True)
    units = updates / np.where(norms > 0, norms, 1)
    expected = (1 - units @ units.T) * (1 - np.eye(7))
    np.testing.assert_allclose(clusters.cosine_distances(jnp.asarray(updates)), expected, atol=1e-9)


def test_norms_that_decide_on_a_split():
    """The mean is over the members and unweighted."""
    own = UPDATES[MEMBERS]
    norms = jax.jit(clusters.split_norms)(UPDATES, MEMBERS)
    np.testing.assert_allclose(norms.mean_update, np.linalg.norm(own.mean(axis=0)), rtol=1e-9)
    np.testing.assert_allclose(norms.largest_update, np.linalg.norm(own, axis=1).max(), rtol=1e-9)
    np.testing.assert_allclose(norms.largest_coordinate, np.abs(own).max(), rtol=1e-9)


def test_members_are_divided_by_complete_linkage():
    """The group without the first member is marked."""
    divide = jax.jit(clusters.bipartition)
    for seed in range(20):
        points = np.random.default_rng(seed).normal(size=(6, 2))
        distances = np.linalg.norm(points[:, None] - points, axis=-1)
        condensed = squareform(distances[np.ix_(MEMBERS, MEMBERS)], checks=False)
        labels = fcluster(linkage(condensed, "complete"), 2, "maxclust")
        expected = np.zeros(6, bool)
        expected[MEMBERS] = labels != labels[0]
        np.testing.assert_array_equal(divide(distances, MEMBERS), expected)


def split(mean_below, largest_above, present=None, num_clusters=1, rows=3, fidelity="paper"):
    """Members and number of the clusters after a round in which all began in the first."""
    members = np.zeros((rows, 6), bool)
    members[0] = MEMBERS
    present = np.ones(6, bool) if present is None else present
    run = jax.jit(clusters.split_clusters, static_argnames="fidelity")
    facts = (jnp.int32(num_clusters), present, mean_below, largest_above)
    return jax.device_get(run(UPDATES, members, *facts, fidelity=fidelity))


def test_when_a_cluster_splits():
    """Its mean must be below the first bound and its largest update above the second.

    All of its members must be there, and there must be room for another cluster.
    """
    own = UPDATES[MEMBERS]
    mean, largest = np.linalg.norm(own.mean(axis=0)), np.linalg.norm(own, axis=1).max()
    absent = np.arange(6) != 1
    outsider = np.arange(6) != 2
    for arguments, count in (
        ((mean * 1.01, largest * 0.99), 2),
        ((mean * 0.99, largest * 0.99), 1),
        ((mean * 1.01, largest * 1.01), 1),
        ((mean * 1.01, largest * 0.99, absent), 1),
        ((mean * 1.01, largest * 0.99, outsider), 2),
        ((mean * 1.01, largest * 0.99, None, 3), 3),
    ):
        members, number = split(*arguments)
        assert number == count
    members, _ = split(mean * 1.01, largest * 0.99)
    np.testing.assert_array_equal(members[0] | members[1], MEMBERS)
    np.testing.assert_array_equal(members[:2, :3], [[True, True, False], [False] * 3])
    assert not members[2].any() and not (members[0] & members[1]).any()


def test_the_released_code_looks_at_coordinates():
    """Positions inside of the parent are taken for the clients' numbers, as that code does."""
    own = UPDATES[MEMBERS]
    mean, largest = np.linalg.norm(own.mean(axis=0)), np.abs(own).max()
    members, number = split(2 * mean, largest * 0.99, fidelity="released")
    assert number == 2
    # The members 0, 1 and 3, 4, 5 are its positions 0, 1 and 2, 3, 4.
    np.testing.assert_array_equal(np.flatnonzero(members[0]), [0, 1])
    np.testing.assert_array_equal(np.flatnonzero(members[1]), [2, 3, 4])
    _, number = split(2 * mean, largest * 1.01, fidelity="released")
    assert number == 1
