"""Defaults of all transformations, and small corners of some.

These are decoupling, compression, privacy and robust means.
"""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transforming import first_update, transformed

from fedjax_mtl import server
from fedjax_mtl.server import hyper

KEY = jax.random.key(0)

# What stands in the constructors: values of the papers or of their released codes, and choices that
# results depend on.
DEFAULTS = {
    "attention_mixing": {"scale": 1.0, "bandwidth": 1.0, "per_parameter": False, "clip": False},
    "cluster_mixing": {"num_clusters": 2, "soft": False, "threshold": 0.0},
    "compress_clients": {"error_feedback": True},
    "conflict_averse": {"alpha": 0.4, "rescale": 1, "iterations": 400, "granularity": "global"},
    "decouple_updates": {
        "keep": 0.2,
        "select": "top",
        "threshold": 0.1,
        "scope": "global",
        "rescale": "l1",
        "rescale_scope": "global",
        "rescale_cap": None,
        "denominator": "all",
    },
    "gp_aggregation": {
        "attention": "softmax_cosine",
        "project": True,
        "temperature": 1.0,
        "order": "index",
        "granularity": "global",
        "history_decay": 0.0,
        "groups": None,
    },
    "hyper_attention": {"decoders": None, "owned": None, "hyper": hyper.RELEASED},
    "hyper_conflict_averse": {"alpha": 0.4, "groups": None, "hyper": hyper.RELEASED},
    "laplacian_mixing": {"neighbours": "sampled"},
    "normalize_gradients": {
        "exponent": 0.6,
        "norms": "update",
        "initial_losses": None,
        "minimum": 1e-3,
        "renormalise": True,
        "already_weighted": False,
    },
    "over_the_air_gradnorm": {
        "exponent": 0.6,
        "threshold": 0.032,
        "fading": 1.0,
        "noise": 1e-3,
        "transmit_scale": 1.0,
        "power": None,
        "minimum": 1e-3,
    },
    "private_average": {"expected_clients": None},
    "project_conflicts": {
        "order": "random",
        "granularity": "global",
        "normalise": "none",
        "average": False,
    },
    "sheaf_mixing": {"compression": 0.1, "deviation": 0.01},
    "sheaf_traffic": {"compression": 0.1},
    "trimmed_mean": {"trim": 0.1},
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults(name):
    parameters = inspect.signature(getattr(server, name)).parameters
    assert {own: parameters[own].default for own in DEFAULTS[name]} == DEFAULTS[name]


def test_trimmed_means_cut_the_share_of_each_side():
    """A tenth of ten clients is one client on each side.

    A tenth of the nine that came is none.
    """
    updates = np.arange(10.0)[:, None] ** 3
    np.testing.assert_allclose(
        transformed(server.trimmed_mean(), updates), [np.mean(np.arange(1.0, 9) ** 3)], rtol=1e-6
    )
    present = np.arange(10) < 9
    np.testing.assert_allclose(
        transformed(server.trimmed_mean(), updates, present=present),
        [np.mean(np.arange(9.0) ** 3)],
        rtol=1e-6,
    )


def test_decoupling_by_deviation_and_with_a_bound():
    """Entries are kept that have at least the mean plus ``threshold`` standard deviations.

    The factor is at most the bound.
    """
    vector = np.array([1.0, -2.0, 3.0, -4.0, 0.5, 0.1])
    strength = np.abs(vector)
    kept = strength >= strength.mean() + 0.8 * strength.std()
    rule = server.decouple_updates(select="deviation", threshold=0.8, rescale="none")
    np.testing.assert_allclose(transformed(rule, vector[None])[0], vector * kept, rtol=1e-6)
    assert kept.sum() == 2
    bounded = server.decouple_updates(1 / 3, rescale="l1", rescale_cap=1.2)
    np.testing.assert_allclose(
        transformed(bounded, vector[None])[0], 1.2 * vector * kept, rtol=1e-6
    )
    density = server.decouple_updates(1 / 3, rescale="density")
    np.testing.assert_allclose(transformed(density, vector[None])[0], 3 * vector * kept, rtol=1e-6)


def test_coordinates_that_nobody_else_kept():
    """With denominator ``selected`` a coordinate is averaged over those that kept it and came."""
    updates = np.array([[4.0, 0.0, 0.1], [3.0, 0.2, 0.1], [0.1, 0.1, 5.0], [0.1, 9.0, 0.1]])
    weights = np.array([0.1, 0.3, 0.4, 0.2])
    present = np.array([True, True, True, False])
    rule = server.decouple_updates(1 / 3, rescale="none", denominator="selected")
    ours = transformed(rule, updates, weights=weights, present=present)
    total = 0.8
    mean = np.where(present, weights, 0) @ ours
    np.testing.assert_allclose(mean, [total * (0.1 * 4 + 0.3 * 3) / 0.4, 0, total * 5], rtol=1e-5)
    uniform = transformed(rule, updates)
    np.testing.assert_allclose(uniform.mean(axis=0), [3.5, 9, 5], rtol=1e-5)


@pytest.mark.parametrize(("fraction", "kept"), [(0.3, 3), (0.31, 4), (0.01, 1), (1.0, 10)])
def test_largest_entries_that_are_sent(fraction, kept):
    """The number of entries is rounded up, so 0.3 of ten are three."""
    vector = jnp.asarray(np.random.default_rng(0).normal(size=10))
    assert np.count_nonzero(jax.jit(server.top_entries(fraction))(vector, KEY)) == kept


def test_what_was_not_sent_is_owed_by_default():
    updates = np.array([[1.0, 3.0], [4.0, 2.0]])
    rule = server.compress_clients(server.top_entries(0.5), 3)
    facts = {"client_ids": np.array([2, 0]), "key": KEY}
    first, state = first_update(rule, updates, **facts)
    np.testing.assert_allclose(first, [[0, 3], [4, 0]])
    np.testing.assert_allclose(state.unsent, [[0, 2], [0, 0], [1, 0]])
    second, _ = jax.jit(rule.update)(np.array([[2.5, 3.0], [1.0, 0.5]]), state, **facts)
    np.testing.assert_allclose(second, [[3.5, 0], [0, 2.5]])


def test_clients_of_one_cohort_quantise_by_their_own_draws():
    """Alike updates of two clients are rounded differently, whatever their slots."""
    rule = server.compress_clients(server.stochastic_levels(2), 3, error_feedback=False)
    updates = np.tile(np.random.default_rng(0).normal(size=30), (2, 1))
    straight = transformed(rule, updates, client_ids=np.array([0, 2]), key=KEY)
    turned = transformed(rule, updates, client_ids=np.array([2, 0]), key=KEY)
    assert not np.array_equal(straight[0], straight[1])
    np.testing.assert_array_equal(straight[0], turned[1])


def test_noise_of_private_averages():
    """The noise is relative to the bound and divided by the number of the cohort's slots.

    Every leaf has another draw.
    """
    zeros = {"a": jnp.zeros((5, 4000)), "b": jnp.zeros((5, 4000))}
    ours = transformed(server.private_average(0.2, 3.0), zeros, key=KEY)
    np.testing.assert_allclose(np.std(ours["a"]), 0.2 * 3.0 / 5, rtol=0.05)
    assert abs(np.corrcoef(ours["a"], ours["b"])[0, 1]) < 0.1


def test_medians_of_even_numbers_lie_between_the_middle_two():
    updates = np.array([[1.0], [2.0], [10.0], [50.0]])
    np.testing.assert_allclose(transformed(server.coordinate_median(), updates), [6.0])
    present = np.array([True, True, False, True])
    np.testing.assert_allclose(
        transformed(server.coordinate_median(), updates, present=present), [2.0]
    )
