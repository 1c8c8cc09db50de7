"""The algebra of FedEM's steps, for arbitrary losses and weights."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedjax_mtl.algorithms._fedem import responsibilities, update_mixture

SETTINGS = settings(deadline=None, max_examples=40)
M, N = 3, 7
LOSSES = hnp.arrays(np.float32, (M, N), elements=st.floats(0, 200, width=32))
MIXTURES = hnp.arrays(np.float32, (M,), elements=st.floats(0, 1, width=32)).filter(
    lambda p: p.sum() > 0.1
)


def normal(p):
    return jnp.asarray(p / p.sum(), jnp.float32)


@SETTINGS
@given(LOSSES, MIXTURES)
def test_responsibilities_are_distributions_and_finite(losses, p):
    q = responsibilities(jnp.asarray(losses), normal(p))
    assert np.isfinite(q).all() and (q >= 0).all()
    np.testing.assert_allclose(jnp.sum(q, axis=0), 1, rtol=1e-5)


@SETTINGS
@given(LOSSES, MIXTURES, st.permutations(range(M)))
def test_permuting_components_permutes_responsibilities(losses, p, order):
    order = np.array(order)
    q = responsibilities(jnp.asarray(losses), normal(p))
    permuted = responsibilities(jnp.asarray(losses[order]), normal(p)[order])
    np.testing.assert_allclose(permuted, q[order], rtol=1e-5, atol=1e-7)


@SETTINGS
@given(LOSSES, MIXTURES, st.integers(0, N))
def test_the_mixture_step_never_raises_the_negative_log_likelihood(losses, p, size):
    losses, old = jnp.asarray(losses), normal(p)
    mask = jnp.arange(N) < size
    new = update_mixture(responsibilities(losses, old), mask, old)
    np.testing.assert_allclose(jnp.sum(new), 1, rtol=1e-5)

    def nll(mixture):
        logs = jax.nn.logsumexp(jnp.log(jnp.maximum(mixture, 1e-30))[:, None] - losses, axis=0)
        return -float(jnp.sum(jnp.where(mask, logs, 0)))

    assert nll(new) <= nll(old) + 1e-3
    if size == 0:
        np.testing.assert_array_equal(new, old)


@SETTINGS
@given(LOSSES, MIXTURES)
def test_what_stands_in_the_padding_does_not_matter(losses, p):
    mask = jnp.arange(N) < 4
    other = jnp.where(mask, jnp.asarray(losses), 77.0)
    mixture = normal(p)
    one = update_mixture(responsibilities(jnp.asarray(losses), mixture), mask, mixture)
    two = update_mixture(responsibilities(other, mixture), mask, mixture)
    np.testing.assert_array_equal(one, two)
