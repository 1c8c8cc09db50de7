"""Over the air: which losses a cluster's weights are learned from."""

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_mtl import server

KEY = jax.random.key(3)
SHAPE = (3, 2)  # clusters and clients in each
UPDATES = {
    "a": jax.random.normal(jax.random.key(0), (6, 4)),
    "b": jax.random.normal(jax.random.key(1), (6, 2, 3)),
}


def receive(updates=UPDATES, losses=(1.0,) * 6, rounds=1, present=None, **channel):
    transformation = server.over_the_air_gradnorm(*SHAPE, **{"learning_rate": 0.0, **channel})
    state = transformation.init(jax.tree.map(lambda x: x[0], updates))
    for index in range(rounds):
        received, state = transformation.update(
            updates,
            state,
            losses=jnp.asarray(losses) / (index + 1),
            client_ids=jnp.arange(6),
            present=present,
            key=KEY,
        )
    return received, state


def test_a_client_without_a_loss_is_left_out_of_its_cluster():
    losses = (jnp.nan, 2.0, 1.0, 1.0, 1.0, 1.0)
    away = jnp.array([False, True, True, True, True, True])
    ours, state = receive(losses=losses, rounds=2, learning_rate=0.1)
    theirs, other = receive(rounds=2, losses=losses, learning_rate=0.1, present=away)
    for name in UPDATES:
        assert np.isfinite(ours[name]).all()
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-6)
    np.testing.assert_allclose(state.weights, other.weights, rtol=1e-6)
    assert state.weights[0, 0] == 1 and not state.seen[0, 0]


def test_negative_losses_are_first_losses():
    _, state = receive(losses=(-1.0, -2.0, 1.0, 2.0, 0.0, 3.0), rounds=2, learning_rate=0.1)
    np.testing.assert_array_equal(state.initial_losses, [[-1, -2], [1, 2], [0, 3]])
    np.testing.assert_array_equal(state.seen, [[True, True], [True, True], [False, True]])
    assert np.isfinite(state.weights).all()
