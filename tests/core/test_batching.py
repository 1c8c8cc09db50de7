"""Batches of one client: every example once an epoch, padding masked, orders uniform.

The orders do not depend on padding.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_mtl.core import batching
from fedjax_mtl.core.federation import NO_BUDGET, ClientView

KEY = jax.random.key(0)


def client(size, capacity, budget=NO_BUDGET):
    examples = {"inputs": jnp.arange(100.0), "labels": jnp.arange(100)}
    return ClientView(
        examples,
        jnp.arange(capacity) + 50,
        jnp.int32(size),
        jnp.int32(0),
        jnp.int32(budget),
        jnp.int32(0),
        KEY,
    )


def visits(plan, size, capacity, budget=NO_BUDGET, key=KEY):
    """How a client goes through its data.

    Returns how often each position was visited, how many real examples each batch had, and how many
    steps were made.
    """

    def step(carry, batch, key):
        counts, log, index = carry
        rows = jnp.where(batch.mask, batch.examples["labels"] - 50, capacity)
        log = log.at[index].set(jnp.sum(batch.mask))
        return counts.at[rows].add(1, mode="drop"), log, index + 1

    start = (jnp.zeros(capacity, jnp.int32), jnp.zeros(64, jnp.int32), 0)
    (counts, log, _), done = batching.for_each_batch(
        step, start, client(size, capacity, budget), plan, key
    )
    return np.array(counts), np.array(log), int(done)


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 10), st.integers(0, 3), st.sampled_from([1, 3, 4, None]), st.booleans())
def test_epochs_visit_every_example_once_an_epoch(size, epochs, batch_size, shuffle):
    plan = batching.epochs(epochs, batch_size, shuffle=shuffle)
    counts, log, done = visits(plan, size, 10)
    np.testing.assert_array_equal(counts, [epochs] * size + [0] * (10 - size))
    per_epoch = -(-size // (batch_size or 10))
    assert done == epochs * per_epoch
    assert log.sum() == epochs * size
    if done:
        assert log[:done].min() >= 1


def test_steps_reshuffle_when_the_data_are_used_up():
    counts, log, done = visits(batching.steps(5, 4), 6, 10)
    assert done == 5
    np.testing.assert_array_equal(log[:5], [4, 2, 4, 2, 4])
    assert counts.max() - counts.min() == 1 or counts[:6].min() == 2


def test_a_traced_number_of_steps():
    done = jax.jit(lambda n: visits_done(n))(jnp.int32(7))
    assert done == 7


def visits_done(n):
    _, done = batching.for_each_batch(
        lambda carry, batch, key: carry + 1, 0, client(6, 10), batching.steps(n, 4), KEY
    )
    return done


def test_budgets_and_empty_clients():
    assert visits(batching.epochs(2, 3), 6, 10, budget=3)[2] == 3
    assert visits(batching.steps(4, 3), 0, 10)[2] == 0
    assert visits(batching.epochs(4, None), 0, 10)[2] == 0


@pytest.mark.parametrize(("small", "large"), [(10, 37), (100, 4096), (4097, 6000)])
def test_orders_do_not_depend_on_padding(small, large):
    size = small - 3
    for seed in range(5):
        key = jax.random.key(seed)
        one = batching.epoch_order(key, size, small)[:size]
        two = batching.epoch_order(key, size, large)[:size]
        np.testing.assert_array_equal(one, two)
        np.testing.assert_array_equal(np.sort(one), np.arange(size))


@pytest.mark.parametrize("capacity", [6, 5000])
def test_orders_are_uniform(capacity):
    keys = jax.random.split(KEY, 4000 if capacity == 6 else 200)
    orders = jax.vmap(lambda k: batching.epoch_order(k, 4, capacity)[:4])(keys)
    frequencies = np.stack([np.bincount(orders[:, p], minlength=4) for p in range(4)]) / len(keys)
    np.testing.assert_allclose(frequencies, 0.25, atol=0.03 if capacity == 6 else 0.12)


def test_epochs_differ_and_keys_differ():
    def orders(key):
        def step(carry, batch, key):
            log, index = carry
            return log.at[index].set(batch.examples["labels"][0]), index + 1

        (log, _), _ = batching.for_each_batch(
            step, (jnp.zeros(20, jnp.int32), 0), client(10, 10), batching.epochs(2, 1), key
        )
        return np.array(log)

    first = orders(KEY)
    assert (first[:10] != first[10:]).any()
    assert (first != orders(jax.random.key(1))).any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: batching.epochs(1, 0), "batch_size is 0"),
        (lambda: batching.epochs(-1, 4), "local epochs is -1"),
        (lambda: batching.steps(-2, 4), "local steps is -2"),
    ],
)
def test_bad_plans(make, message):
    with pytest.raises(ValueError, match=message):
        make()
