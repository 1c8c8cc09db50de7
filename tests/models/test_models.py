"""Models: convolutions and dense layers equal to flax's, the papers' parameter counts, refusals."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_trees_close

from fedjax_mtl import models
from fedjax_mtl.models.convolution import PatchConv, max_pool, minimal_filtering
from fedjax_mtl.models.dense_layer import small_batch_product

KEY = jax.random.key(0)


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize("strides", [1, 2, (2, 1)])
@pytest.mark.parametrize("kernel", [(3, 3), (5, 2), (1, 1)])
def test_patch_convolution_equals_flax(kernel, strides, padding):
    x = jax.random.normal(KEY, (2, 9, 8, 3))
    pair = strides if isinstance(strides, tuple) else (strides, strides)
    theirs = nn.Conv(4, kernel, pair, padding)
    ours = PatchConv(4, kernel, strides, padding)
    params = theirs.init(KEY, x)
    assert jax.tree.map(jnp.shape, ours.init(KEY, x)) == jax.tree.map(jnp.shape, params)

    def value(module):
        def loss(p, x):
            return jnp.sum(jnp.sin(module.apply(p, x)))

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(params, x)

    assert_trees_close(value(ours), value(theirs), rtol=1e-4, atol=1e-5)


def test_patch_convolution_with_weights_of_its_own_for_every_client():
    x = jax.random.normal(KEY, (3, 2, 6, 6, 2))
    ours, theirs = PatchConv(4, (3, 3)), nn.Conv(4, (3, 3))
    params = jax.vmap(lambda k, x: theirs.init(k, x))(jax.random.split(KEY, 3), x)
    per_client = [theirs.apply(jax.tree.map(lambda p, c=c: p[c], params), x[c]) for c in range(3)]
    np.testing.assert_allclose(
        jax.vmap(ours.apply)(params, x), jnp.stack(per_client), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("shape", [(4, 4), (6, 3), (9, 8), (11, 7)])
def test_minimal_filtering_is_the_convolution(shape):
    """It is exact in double precision, for heights of every remainder, and so are its gradients."""
    with jax.enable_x64(True):
        x = jax.random.normal(KEY, (2, *shape, 5), jnp.float64)
        kernel = jax.random.normal(KEY, (3, 3, 5, 4), jnp.float64)

        def direct(x, kernel):
            return jax.lax.conv_general_dilated(
                x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )

        def value(convolve):
            return jax.value_and_grad(
                lambda *args: jnp.sum(jnp.sin(convolve(*args))), argnums=(0, 1)
            )(x, kernel)

        np.testing.assert_allclose(
            jax.jit(minimal_filtering)(x, kernel), direct(x, kernel), rtol=1e-11, atol=1e-12
        )
        assert_trees_close(value(minimal_filtering), value(direct), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize(("channels", "products"), [(15, 1), (16, 6)])
def test_wide_convolutions_filter_minimally(channels, products, padding):
    """On CPUs the layer equals flax's in single precision.

    That holds with weights of its own for each client.
    """
    x = jax.random.normal(KEY, (3, 2, 7, 6, channels))
    ours, theirs = PatchConv(4, (3, 3), padding=padding), nn.Conv(4, (3, 3), padding=padding)
    params = jax.vmap(theirs.init)(jax.random.split(KEY, 3), x)

    def value(module):
        return jax.jit(
            jax.vmap(jax.value_and_grad(lambda p, x: jnp.sum(jnp.sin(module.apply(p, x)))))
        )(params, x)

    assert_trees_close(value(ours), value(theirs), rtol=1e-4, atol=2e-5)
    if jax.default_backend() == "cpu":
        assert (
            str(jax.make_jaxpr(ours.apply)(jax.tree.map(lambda p: p[0], params), x[0])).count(
                "dot_general"
            )
            == products
        )


@pytest.mark.parametrize("mode", ["jvp", "vjp", "hessian"])
def test_the_small_batch_product_differentiates_like_a_product(mode):
    x, k = jax.random.normal(KEY, (5, 4)), jax.random.normal(KEY, (4, 3))

    def through(product):
        def loss(k):
            return jnp.sum(jnp.tanh(product(x, k)))

        if mode == "jvp":
            return jax.jvp(loss, (k,), (jnp.ones_like(k),))
        return jax.grad(loss)(k) if mode == "vjp" else jax.hessian(loss)(k)

    assert_trees_close(through(small_batch_product), through(jnp.matmul), rtol=1e-4, atol=1e-5)


def test_max_pool_equals_flax():
    x = jax.random.normal(KEY, (2, 7, 6, 3))
    theirs = nn.max_pool(x, (2, 2), (2, 2))
    np.testing.assert_array_equal(max_pool(x, 2), theirs)
    ours = jax.grad(lambda x: jnp.sum(jnp.sin(max_pool(x, 2))))(x)
    expected = jax.grad(lambda x: jnp.sum(jnp.sin(nn.max_pool(x, (2, 2), (2, 2)))))(x)
    np.testing.assert_allclose(ours, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("model", "count"),
    [
        (lambda: models.linear((150,), 1), 151),
        (lambda: models.cnn((28, 28, 1), 62), 2_278_334),
        (lambda: models.cnn((32, 32, 3), 10), 3_353_034),
        # PyTorch has two bias vectors a gate and counts 825,220 parameters; 4 * 256 for each of two
        # layers are superfluous.
        (lambda: models.lstm(80), 825_220 - 2 * 4 * 256),
    ],
)
def test_parameter_counts_are_the_papers(model, count):
    params = jax.eval_shape(model().init, KEY)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count


def test_initialisation_is_pytorchs():
    params = models.linear((400,), 50).init(KEY)["decoder"]
    for leaf in (params["kernel"], params["bias"]):
        assert jnp.max(jnp.abs(leaf)) <= 0.05
    np.testing.assert_allclose(jnp.std(params["kernel"]), 0.05 / np.sqrt(3), rtol=0.05)


def test_a_language_model_runs():
    model = models.lstm(12, hidden=8)
    params = model.init(KEY)
    x = jnp.arange(24, dtype=jnp.uint8).reshape(2, 12)
    outputs = model.apply(params, x, None)
    assert outputs.shape == (2, 12, 100)
    # Causal: what comes later has no influence.
    changed = model.apply(params, x.at[:, 7:].set(3), None)
    np.testing.assert_allclose(changed[:, :7], outputs[:, :7], rtol=1e-5)


def test_refusals():
    class Normalised(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return nn.BatchNorm(use_running_average=not train)(x)

    with pytest.raises(ValueError, match=r"keeps \['batch_stats'\] .*GroupNorm or LayerNorm"):
        models.from_flax(Normalised(), (3,)).init(KEY)
    with pytest.raises(ValueError, match=r"two-dimensional, got kernel_size \(3,\)"):
        PatchConv(2, (3,)).init(KEY, jnp.ones((1, 4, 4, 1)))
    with pytest.raises(ValueError, match="padding must be 'SAME' or 'VALID'"):
        PatchConv(2, (3, 3), padding="same").init(KEY, jnp.ones((1, 4, 4, 1)))
