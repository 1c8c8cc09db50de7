"""Corners of batches and cohorts: keys, weights and padding of steps, facts of a cohort."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import SIZES, small_federation

from fedjax_mtl.core import batching, sampling
from fedjax_mtl.core.federation import NO_BUDGET, ClientView

KEY = jax.random.key(0)
SIZE, CAPACITY, STEPS = 5, 8, 6


def client(size=SIZE, work=1.0, budget=NO_BUDGET):
    """A client whose example at position p is the number 10 + p."""
    rows, zero = jnp.arange(CAPACITY) + 10, jnp.int32(0)
    examples = {"number": jnp.arange(40)}
    return ClientView(examples, rows, jnp.int32(size), zero, jnp.int32(budget), zero, KEY, work)


@jax.jit
def visited(size, work, weights):
    """The numbers, weights, masks and keys of up to six steps in batches of 2, and steps made."""

    def step(carry, batch, key):
        count, log = carry
        seen = (batch.examples["number"], batch.weights, batch.mask, jax.random.key_data(key))
        return count + 1, jax.tree.map(lambda old, new: old.at[count].set(new), log, seen)

    zeros = lambda dtype: jnp.zeros((STEPS, 2), dtype)  # noqa: E731
    log = (zeros(int), zeros(float), zeros(bool), zeros(jnp.uint32))
    plan, me = batching.steps(STEPS, 2), client(size, work)
    (_, log), done = batching.for_each_batch(step, (0, log), me, plan, KEY, weights)
    return (*log, done)


def test_steps_of_a_client():
    """Weights follow the examples through the shuffles, and every step has a key of its own."""
    own = np.linspace(0.1, 0.8, CAPACITY).astype(np.float32)
    numbers, weights, masks, keys, done = jax.device_get(visited(SIZE, 1.0, own))
    assert done == STEPS
    np.testing.assert_allclose(weights[masks], own[numbers[masks] - 10])
    # Two passes of three steps, of which the last has one example.
    np.testing.assert_array_equal(masks.sum(axis=1), [2, 2, 1, 2, 2, 1])
    for start in (0, 3):
        seen = numbers[start : start + 3][masks[start : start + 3]]
        assert sorted(seen) == [10, 11, 12, 13, 14]
    assert len(np.unique(keys, axis=0)) == STEPS


def test_weights_are_1_by_default():
    *_, weights, masks, _, _ = jax.device_get(visited(SIZE, 1.0, None))
    assert masks.any() and (weights == 1).all()


@pytest.mark.parametrize(("work", "steps"), [(1.0, 6), (0.5, 3), (0.49, 2), (0.1, 0), (0.0, 0)])
def test_a_share_of_the_planned_steps_is_rounded_down(work, steps):
    assert visited(SIZE, work, None)[-1] == steps


def test_a_batch_drawn_for_a_step():
    """Without replacement; where there are too few examples the rest is masked."""
    draw = jax.jit(jax.vmap(lambda key: batching.draw_batch(client(), 3, key)))
    batches = jax.device_get(draw(jax.random.split(KEY, 400)))
    numbers = batches.examples["number"]
    assert all(len(set(own)) == 3 for own in numbers) and batches.mask.all()
    np.testing.assert_allclose(np.bincount(numbers.ravel())[10:] / 400, 0.6, atol=0.1)
    few = jax.device_get(jax.jit(lambda key: batching.draw_batch(client(2), 10, key))(KEY))
    assert few.mask.sum() == 2 and len(few.mask) == 10 and (few.weights == 1).all()
    assert set(few.examples["number"][few.mask]) == {10, 11}


@pytest.mark.parametrize("capacity", [4096, 4097, 5000])
def test_orders_of_large_clients_are_permutations(capacity):
    """Up to 4096 positions fit beside the random bits in one integer."""
    order = jax.jit(batching.epoch_order, static_argnames="capacity")
    ours = np.asarray(order(KEY, 4096, capacity=capacity))
    np.testing.assert_array_equal(np.sort(ours), np.arange(capacity))
    np.testing.assert_array_equal(np.sort(ours[:4096]), np.arange(4096))


# --- Cohorts.

FEDERATION = small_federation()
EVERYBODY = sampling.full_participation()


def test_facts_of_a_cohort():
    """Nobody has a budget, everybody does all of its work, and the absent have no size or share."""
    ids, present = jnp.array([4, 0, 2]), jnp.array([True, False, True])
    cohort = sampling.make_cohort(FEDERATION, ids, present)
    np.testing.assert_array_equal(cohort.budgets, [NO_BUDGET] * 3)
    assert cohort.budgets.dtype == jnp.int32 and NO_BUDGET == 2**31 - 1
    np.testing.assert_array_equal(cohort.work, [1, 1, 1])
    np.testing.assert_array_equal(cohort.federation.sizes, [SIZES[4], 0, SIZES[2]])
    total = sum(SIZES)
    np.testing.assert_allclose(cohort.shares, [SIZES[4] / total, 0, SIZES[2] / total], rtol=1e-6)


def test_cohorts_of_groups():
    """Each is drawn with a key of its own, and shares are of all groups together."""
    population = {"b": FEDERATION, "a": FEDERATION, "c": FEDERATION.take(jnp.array([1, 3]))}
    samplers = {"a": sampling.uniform(3), "b": sampling.uniform(3), "c": EVERYBODY}
    sample = jax.jit(lambda key: sampling.by_group(samplers)(key, 0, population))
    drawn = [sample(key) for key in jax.random.split(KEY, 8)]
    assert any(
        set(own["a"].client_ids.tolist()) != set(own["b"].client_ids.tolist()) for own in drawn
    )
    whole = sampling.by_group(EVERYBODY)(KEY, 0, population)
    total = 2 * sum(SIZES) + SIZES[1] + SIZES[3]
    np.testing.assert_allclose(whole["a"].shares, np.array(SIZES) / total, rtol=1e-6)
    np.testing.assert_allclose(whole["c"].shares, [SIZES[1] / total, SIZES[3] / total], rtol=1e-6)


def test_traces_of_availability_repeat():
    trace = np.eye(3, 6, dtype=bool)
    sample = jax.jit(lambda index: sampling.available(2, trace)(KEY, index, FEDERATION))
    for index, available in ((0, 0), (2, 2), (3, 0), (7, 1)):
        cohort = sample(index)
        assert cohort.client_ids[cohort.present].tolist() == [available]


def budgets(low, high, of_smallest=False):
    rule = sampling.fraction_of_data(low, high, of_smallest=of_smallest)
    cohort = sampling.make_cohort(FEDERATION, jnp.arange(6), jnp.arange(6) != 2)
    return np.asarray(rule(KEY, cohort))


def test_budgets_in_shares_of_the_data():
    """They are rounded down; the smallest node is the smallest of those that came."""
    sizes = np.where(np.arange(6) != 2, SIZES, 0)
    np.testing.assert_array_equal(budgets(0.7, 0.7), np.floor(0.7 * sizes))
    smallest = min(size for size in sizes if size)
    np.testing.assert_array_equal(budgets(0.7, 0.7, True), [np.floor(0.7 * smallest)] * 6)
    for low, high in ((-0.1, 0.5), (0.6, 0.5)):
        with pytest.raises(ValueError, match="make no sense"):
            sampling.fraction_of_data(low, high)


def test_partial_work_is_uniform_between_its_bounds():
    sampler = sampling.partial_work(EVERYBODY, 0.2, 0.6)
    draw = jax.jit(jax.vmap(lambda key: sampler(key, 0, FEDERATION).work))
    work = np.asarray(draw(jax.random.split(KEY, 500)))
    assert 0.2 <= work.min() < 0.21 and 0.59 < work.max() <= 0.6
    np.testing.assert_allclose(work.mean(axis=0), 0.4, atol=0.03)
    assert inspect.signature(sampling.partial_work).parameters["high"].default == 1.0
    for low, high in ((-0.1, 0.5), (0.6, 0.5), (0.5, 1.1)):
        with pytest.raises(ValueError, match="make no sense"):
            sampling.partial_work(EVERYBODY, low, high)
