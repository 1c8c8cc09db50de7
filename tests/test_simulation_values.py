"""A run draws from streams of its seed: for its start, for every round, and for judging."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_mtl import Algorithm, simulate
from fedjax_mtl.core import sampling

SEEDS = (3, 8)


class Draws(NamedTuple):
    """What the recording algorithm's state is."""

    clients: jax.Array
    start: jax.Array


def bits(key):
    """A key as a number that tells it from others."""
    return jax.random.bits(key)


def recording():
    """An algorithm that keeps what it drew at its start, and reports what a round draws."""

    def init(key):
        return Draws(jnp.zeros(2), bits(key))

    def one_round(state, cohort, key):
        info = {"round": bits(key), "cohort": cohort.client_ids[0]}
        return state, info

    return Algorithm(init, one_round, None, None, lambda state: (0, 0), 2)


def recording_sampler(key, index, federation):
    """Everybody, numbered by the key and the round that the sampler was given."""
    cohort = sampling.full_participation()(key, index, federation)
    drawn = (bits(key) >> 1).astype(jnp.int32) + index
    return cohort._replace(client_ids=jnp.full(2, drawn))


@pytest.fixture(scope="module")
def run():
    """Five rounds in blocks of two."""
    from helpers import small_federation

    return simulate(
        recording(),
        small_federation(sizes=(1, 2)),
        num_rounds=5,
        seeds=SEEDS,
        sampler=recording_sampler,
        evaluate=lambda algorithm, state, data, key: bits(key),
        eval_every=2,
    )


def test_what_a_run_draws_is_a_function_of_its_seed(run):
    """The start folds in 0; round r folds in 1 and r, and is split for cohort and clients."""
    for place, seed in enumerate(SEEDS):
        root = jax.random.key(seed)
        assert run.state.start[place] == bits(jax.random.fold_in(root, 0))
        for index in range(5):
            own = jax.random.fold_in(jax.random.fold_in(root, 1), index)
            cohort_key, round_key = jax.random.split(own)
            assert run.metrics["round"][place, index] == bits(round_key)
            drawn = int(bits(cohort_key) >> 1) + index
            assert run.metrics["cohort"][place, index] == np.int32(drawn)


def test_judging_draws_from_a_stream_of_its_own(run):
    """It folds in 2 and the number of rounds that are done."""
    assert list(run.rounds) == [0, 2, 4, 5]
    for done, drawn in zip(run.rounds, run.evaluations, strict=True):
        for place, seed in enumerate(SEEDS):
            own = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 2), done)
            assert drawn[place] == bits(own)
