"""Arbitrary chains of the transformations keep their promises."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from helpers import assert_trees_close
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_mtl import server

CLIENTS = 4
PARAMS = {"a": jnp.zeros((3, 2)), "b": {"c": jnp.zeros(4)}}
KEEPING = {
    "clip": lambda: server.clip_clients(0.7),
    "compress": lambda: server.compress_clients(server.top_entries(0.5), CLIENTS),
    "decouple": lambda: server.decouple_updates(0.4),
    "decouple layers": lambda: server.decouple_updates(0.4, scope="layer", denominator="selected"),
    "gradnorm": lambda: server.normalize_gradients(CLIENTS, learning_rate=0.05),
    "pcgrad": lambda: server.project_conflicts(),
    "pcgrad per leaf": lambda: server.project_conflicts(
        granularity="per_leaf", normalise="restore"
    ),
    "quantise": lambda: server.compress_clients(
        server.stochastic_levels(3), CLIENTS, error_feedback=False
    ),
}
REDUCING = {
    "average": lambda: server.average_clients(),
    "cagrad": lambda: server.conflict_averse(iterations=20),
    "gp": lambda: server.gp_aggregation(),
    "median": lambda: server.coordinate_median(),
    "pcgrad average": lambda: server.project_conflicts(average=True),
    "private": lambda: server.private_average(1.0, 0.1),
    "trimmed": lambda: server.trimmed_mean(0.25),
}
STEPS = {
    "sgd": lambda: optax.sgd(1.0),
    "adam": lambda: optax.adam(0.1),
    "momentum": lambda: optax.sgd(0.5, 0.9),
}


@functools.cache
def compiled(kept, reduced, step):
    """A chain's init and its jitted update, with the number of times it was traced."""
    chain = optax.chain(*[KEEPING[k]() for k in kept], REDUCING[reduced](), STEPS[step]())
    traces = []

    @jax.jit
    def update(updates, state, order, present, key):
        traces.append(1)
        losses, weights = jnp.arange(1.0, 5)[order], jnp.array([0.1, 0.2, 0.3, 0.4])[order]
        weights = jnp.where(present, weights, 0)
        return chain.update(
            updates,
            state,
            PARAMS,
            losses=losses,
            weights=weights,
            client_ids=order,
            present=present,
            key=key,
        )

    return chain, update, traces


def rounds(kept, reduced, step, order, present, garbage=0.0):
    chain, update, traces = compiled(kept, reduced, step)
    state, order, present = chain.init(PARAMS), jnp.asarray(order), jnp.asarray(present)
    for index in range(2):
        key = jax.random.fold_in(jax.random.key(7), index)
        drawn = optax.tree.random_like(
            key, jax.tree.map(lambda x: jnp.zeros((CLIENTS, *x.shape)), PARAMS)
        )
        drawn = jax.tree.map(
            lambda x: jnp.where(present.reshape((-1,) + (1,) * (x.ndim - 1)), x[order], garbage),
            drawn,
        )
        step_, state = update(drawn, state, order, present, key)
    return step_, state, traces


@settings(deadline=None, max_examples=12)
@given(
    st.lists(st.sampled_from(sorted(KEEPING)), max_size=3).map(tuple),
    st.sampled_from(sorted(REDUCING)),
    st.sampled_from(sorted(STEPS)),
    st.permutations(range(CLIENTS)),
    st.lists(st.booleans(), min_size=CLIENTS, max_size=CLIENTS),
)
def test_any_chain(kept, reduced, step, order, present):
    plain, state, traces = rounds(kept, reduced, step, range(CLIENTS), present)
    assert jax.tree.map(jnp.shape, plain) == jax.tree.map(jnp.shape, PARAMS)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((plain, state)))
    there = np.array(present)[list(order)]
    moved, moved_state, _ = rounds(kept, reduced, step, order, there)
    assert_trees_close(moved, plain, rtol=2e-3, atol=2e-4)
    assert_trees_close(moved_state, state, rtol=2e-3, atol=2e-4)
    unlike, _, _ = rounds(kept, reduced, step, range(CLIENTS), present, garbage=1e6)
    assert_trees_close(unlike, plain, rtol=2e-3, atol=2e-4)
    assert len(traces) == 1
