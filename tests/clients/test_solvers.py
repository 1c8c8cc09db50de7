"""Solvers from plain values."""

import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_mtl.clients.solvers import make_optimizer, make_plan, make_schedule, make_solver
from fedjax_mtl.core.checks import InputError


def step(gradient, params, **settings):
    optimizer = make_optimizer(**settings)
    params = jnp.asarray(params, jnp.float32)
    update, _ = optimizer.update(jnp.asarray(gradient, jnp.float32), optimizer.init(params), params)
    return np.asarray(update)


def test_optimizers_cut_then_decay_then_step():
    # ||(3, 4)|| = 5 is cut to 1; the decay adds 0.1 x params after that.
    made = step([3.0, 4.0], [10.0, 0.0], learning_rate=0.5, max_norm=1.0, weight_decay=0.1)
    np.testing.assert_allclose(made, [-0.5 * (0.6 + 1.0), -0.5 * 0.8], rtol=1e-6)
    np.testing.assert_allclose(
        step([3.0], [0.0], learning_rate=0.01, name="adam"), [-0.01], rtol=1e-4
    )


@pytest.mark.parametrize(
    "name, expected",
    [
        ("multi_step", [1.0, 0.1, 0.01]),
        ("cosine", [1.0, 0.5, 0.146447]),
        ("sqrt", [1.0, 1 / 5**0.5, 1 / 7**0.5]),
        ("linear", [1.0, 1 / 5, 1 / 7]),
    ],
)
def test_schedules(name, expected):
    schedule = make_schedule(name, 8)
    found = [float(schedule(jnp.int32(r))) for r in (0, 4, 6)]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_plans_and_what_is_left_unsaid():
    assert make_plan(batch_size=4)[:3] == (4, 1, None)
    assert make_plan(steps=7)[:3] == (None, None, 7)
    solver = make_solver(learning_rate=0.1, num_rounds=3)
    assert solver.plan[:3] == (128, 1, None)
    assert solver.schedule is None and solver.keep_optimizer is None


BAD = {
    "optimizer": ({"name": "adagrad"}, "unknown optimizer 'adagrad'; expected one of sgd, adam"),
    "momentum": ({"name": "adam", "momentum": 0.9}, "adam has its own"),
    "length": ({"max_norm": 0.0}, "give a positive length, or None"),
    "both": ({"epochs": 1, "steps": 2}, "has epochs=1 and steps=2; give one of them"),
    "none": ({"steps": 0}, "has steps=0; give at least 1"),
    "schedule": ({"schedule": "step"}, "unknown config.client.schedule 'step'"),
}


@pytest.mark.parametrize("name", sorted(BAD))
def test_settings_that_make_no_sense(name):
    settings, message = BAD[name]
    with pytest.raises(InputError, match=message):
        make_solver(learning_rate=0.1, num_rounds=3, **settings)
