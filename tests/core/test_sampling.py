"""Cohort samplers: pure functions of a key, with the distributions they promise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import NUM_CLIENTS, SIZES, small_federation

from fedjax_mtl.core import sampling

FEDERATION = small_federation()
KEY = jax.random.key(0)


def draws(sampler, count=2000, round_index=0):
    cohorts = jax.vmap(lambda k: sampler(k, jnp.int32(round_index), FEDERATION))(
        jax.random.split(KEY, count)
    )
    return cohorts


def test_full_participation():
    cohort = sampling.full_participation()(KEY, 0, FEDERATION)
    np.testing.assert_array_equal(cohort.client_ids, range(NUM_CLIENTS))
    np.testing.assert_allclose(cohort.shares, np.array(SIZES) / sum(SIZES), rtol=1e-6)


def test_uniform_draws_different_clients_equally_often():
    ids = np.array(draws(sampling.uniform(3)).client_ids)
    assert all(len(set(own)) == 3 for own in ids)
    np.testing.assert_allclose(np.bincount(ids.ravel()) / len(ids), 0.5, atol=0.05)
    again = np.array(draws(sampling.uniform(3)).client_ids)
    np.testing.assert_array_equal(ids, again)


def test_weighted():
    probabilities = jnp.array([0.5, 0.1, 0.1, 0.1, 0.2, 0.0])
    with_replacement = draws(sampling.weighted(2, probabilities, replace=True))
    frequencies = np.bincount(np.array(with_replacement.client_ids).ravel(), minlength=6) / 4000
    np.testing.assert_allclose(frequencies, probabilities, atol=0.03)
    without = np.array(draws(sampling.weighted(2, probabilities)).client_ids)
    assert all(len(set(own)) == 2 for own in without)
    assert not (without == 5).any()
    np.testing.assert_allclose(np.mean(without[:, 0] == 0), 0.5, atol=0.04)


def test_nobody_is_made_to_come():
    cohort = sampling.weighted(3, jnp.array([1.0, 1.0, 0, 0, 0, 0]))(KEY, 0, FEDERATION)
    assert set(np.array(cohort.client_ids)[np.array(cohort.present)]) == {0, 1}
    assert cohort.federation.sizes[~cohort.present].sum() == 0


def test_availability_follows_the_trace():
    trace = jnp.array([[1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1]], bool)
    sampler = sampling.available(3, trace)
    first = sampler(KEY, jnp.int32(0), FEDERATION)
    assert set(np.array(first.client_ids)[np.array(first.present)]) == {0, 1}
    assert int(first.present.sum()) == 2
    second = draws(sampler, round_index=3)
    assert set(np.array(second.client_ids).ravel()) == {2, 3, 4, 5}
    assert np.array(second.present).all()


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        (sampling.uniform(7), "cohort_size is 7 but the federation has 6 clients"),
        (sampling.uniform(0), "cohort_size is 0"),
        (
            sampling.weighted(2, jnp.ones(5)),
            r"probabilities has shape \(5,\); give one for each of the 6 clients, none negative",
        ),
        (sampling.weighted(7, np.ones(6)), "cohort_size is 7"),
        (sampling.weighted(2, -np.ones(6)), "none negative"),
        (
            sampling.available(2, np.ones((3, 5), bool)),
            r"availability trace has shape \(3, 5\); give \[rounds, 6\]",
        ),
    ],
)
def test_bad_samplers(sampler, message):
    with pytest.raises(ValueError, match=message):
        sampler(KEY, 0, FEDERATION)


def test_drops_are_as_likely_as_asked():
    federation = small_federation()
    probability = np.array([0.0, 1.0, 0.5, 0.5, 0.2, 0.8])
    sampler = sampling.dropping(sampling.full_participation(), probability)
    draws = jax.vmap(lambda key: sampler(key, 0, federation).present)(
        jax.random.split(jax.random.key(0), 2000)
    )
    np.testing.assert_allclose(draws.mean(0), 1 - probability, atol=0.04)
    cohort = sampler(jax.random.key(1), 0, federation)
    assert not cohort.present[1]
    np.testing.assert_array_equal(cohort.federation.sizes[~cohort.present], 0)
    np.testing.assert_array_equal(cohort.shares[~cohort.present], 0)


def test_budgets_are_shares_of_the_data():
    federation = small_federation()
    for of_smallest in (False, True):
        budget = sampling.fraction_of_data(0.5, 1.0, of_smallest=of_smallest)
        sampler = sampling.straggling(sampling.full_participation(), budget)
        budgets = np.stack(
            [sampler(key, 0, federation).budgets for key in jax.random.split(jax.random.key(0), 50)]
        )
        sizes = np.asarray(federation.sizes)
        limit = np.full_like(sizes, sizes.min()) if of_smallest else sizes
        assert (budgets <= limit).all() and (budgets >= np.floor(0.5 * limit)).all()
        assert len(np.unique(budgets[:, 1])) > 1 or of_smallest


def test_partial_work_is_a_share_of_what_is_planned():
    sampler = sampling.partial_work(sampling.uniform(3), 0.2, 0.6)
    work = np.asarray(draws(sampler).work)
    assert work.shape == (2000, 3) and work.min() >= 0.2 and work.max() <= 0.6
    np.testing.assert_allclose(work.mean(0), 0.4, atol=0.01)
    whole = sampling.uniform(3)(KEY, 0, FEDERATION)
    np.testing.assert_array_equal(whole.work, 1.0)
    for low, high in ((-0.1, 1.0), (0.5, 0.2), (0.5, 1.5)):
        with pytest.raises(ValueError, match="give 0 <= low <= high <= 1"):
            sampling.partial_work(sampling.full_participation(), low, high)
