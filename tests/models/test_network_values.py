"""The small networks by value.

Outputs against plain numpy, and the distributions that their weights start from.
"""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_layers import convolution, dense, draw, max_pool, random_params, relu, sigmoid

from fedjax_mtl import models
from fedjax_mtl.models.dense_layer import Dense

KEY = jax.random.key(0)


def apply(model, params, inputs):
    return jax.jit(lambda p, x: model.apply(p, x, None))(params, inputs)


def assert_equals(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=2e-4)


# --- Networks of the federated benchmarks.


@pytest.mark.parametrize("batch", [3, 21])
def test_linear(batch):
    """The inputs are flattened, and small batches take another path than large ones."""
    model = models.linear((2, 3), 4)
    params, x = random_params(model.init), draw(batch, 2, 3)
    assert_equals(apply(model, params, x), dense(params["decoder"], x.reshape(batch, 6)))


@pytest.mark.parametrize("batch", [3, 21])
def test_mlp(batch):
    """Every hidden layer is followed by a ReLU, and the last layer is not."""
    model = models.mlp((2, 3), 4, (5, 7))
    params, x = random_params(model.init), draw(batch, 2, 3)
    hidden = relu(dense(params["encoder"]["Dense_0"], x.reshape(batch, 6)))
    hidden = relu(dense(params["encoder"]["Dense_1"], hidden))
    outputs = dense(params["decoder"], hidden)
    assert (outputs < 0).any()
    assert_equals(apply(model, params, x), outputs)


def test_the_mlp_has_one_hidden_layer_of_64_by_default():
    params = jax.eval_shape(models.mlp((3,), 2).init, KEY)
    assert {name: layer["kernel"].shape for name, layer in params["encoder"].items()} == {
        "Dense_0": (3, 64)
    }


@pytest.mark.parametrize(("batch", "special"), [(20, True), (21, False)])
def test_only_small_batches_take_the_path_of_outer_products(batch, special):
    layer = Dense(2)
    params = random_params(lambda key: layer.init(key, jnp.zeros((1, 3))))
    program = str(jax.make_jaxpr(layer.apply)(params, jnp.zeros((batch, 3))))
    on_cpu = jax.default_backend() == "cpu"
    assert ("custom_jvp_call" in program) == (special and on_cpu)


@pytest.mark.parametrize("pools", [(True, False), (False, True)])
def test_cnn(pools):
    """Valid convolutions with a ReLU are pooled where it says so, and two dense layers follow.

    There is a ReLU between the dense layers.
    """
    model = models.cnn((9, 8, 2), 3, channels=(4, 5), kernel=3, pools=pools, hidden=6)
    params, x = random_params(model.init, scale=0.3), draw(2, 9, 8, 2)
    body, hidden = params["encoder"], x
    for index, pooled in enumerate(pools):
        layer = convolution(body[f"PatchConv_{index}"], hidden, padding="VALID")
        hidden = relu(max_pool(layer, 2) if pooled else layer)
    hidden = relu(dense(body["Dense_0"], hidden.reshape(2, -1)))
    outputs = dense(params["decoder"], hidden)
    assert (outputs < 0).any()
    assert_equals(apply(model, params, x), outputs)


def test_sizes_of_the_papers_networks():
    """FedEM's, in the modules and in the functions that make models of them."""
    cnn = {"channels": (32, 64), "kernel": 5, "pools": (True, True), "hidden": 2048}
    lstm = {"vocabulary": 100, "embedding": 8, "hidden": 256, "layers": 2}
    for own, module, function in (
        (cnn, models.TwoLayerCNN, models.cnn),
        (lstm, models.CharLSTM, models.lstm),
    ):
        assert {name: getattr(module, name) for name in own} == own
        assert {name: defaults_of(function).get(name) for name in own} == own


def lstm_layer(p, inputs, width):
    """One layer of an LSTM over time, ``[batch, length, ...] -> [batch, length, width]``."""
    memory = hidden = np.zeros((len(inputs), width))
    outputs = []
    for step in range(inputs.shape[1]):
        enter, forget, change, leave = (
            dense(p[f"h{gate}"], hidden) + inputs[:, step] @ p[f"i{gate}"]["kernel"]
            for gate in "ifgo"
        )
        memory = sigmoid(forget) * memory + sigmoid(enter) * np.tanh(change)
        hidden = sigmoid(leave) * np.tanh(memory)
        outputs.append(hidden)
    return np.stack(outputs, axis=1)


def test_lstm():
    """An embedding is followed by two layers, and by the same dense layer at every position."""
    model = models.lstm(4, 6, embedding=3, hidden=5)
    params = random_params(model.init)
    tokens = np.random.default_rng(0).integers(0, 6, (2, 4))
    body = params["encoder"]
    hidden = body["Embed_0"]["embedding"][tokens]
    for index in range(2):
        hidden = lstm_layer(body[f"OptimizedLSTMCell_{index}"], hidden, 5)
    assert_equals(apply(model, params, tokens), dense(params["decoder"], hidden))


def flat(*trees):
    leaves = jax.tree.leaves(trees)
    return np.concatenate([np.ravel(leaf) for leaf in leaves])


def assert_uniform(values, bound):
    """Values are uniform in [-bound, bound].

    Nothing is outside, and the values are as spread as that distribution is.
    """
    assert np.abs(values).max() <= bound
    np.testing.assert_allclose(values.std(), bound / np.sqrt(3), rtol=0.12)


def test_weights_and_biases_start_as_pytorchs():
    """Weights are uniform up to 1 / sqrt(inputs) of each layer.

    Those of an LSTM are uniform up to 1 / sqrt(hidden), and its embedding is standard normal.
    """
    mlp = jax.jit(models.mlp((100,), 30, (49,)).init)(KEY)
    assert_uniform(flat(mlp["encoder"]), 1 / 10)
    assert_uniform(flat(mlp["decoder"]), 1 / 7)
    conv = jax.jit(models.cnn((10, 10, 4), 9, channels=(36, 9), kernel=3, hidden=40).init)(KEY)
    # Windows of 3 x 3 x 4 and of 3 x 3 x 36 inputs; 1 x 1 x 9 values are left for the dense layer.
    assert_uniform(flat(conv["encoder"]["PatchConv_0"]), 1 / 6)
    assert_uniform(flat(conv["encoder"]["PatchConv_1"]), 1 / 18)
    assert_uniform(flat(conv["encoder"]["Dense_0"]), 1 / 3)
    assert_uniform(flat(conv["decoder"]), 1 / np.sqrt(40))
    lstm = jax.jit(models.lstm(3, 50, hidden=16, layers=1).init)(KEY)
    body = lstm["encoder"]
    assert_uniform(flat(body["OptimizedLSTMCell_0"]), 1 / 4)
    assert_uniform(flat(lstm["decoder"]), 1 / 4)
    np.testing.assert_allclose(flat(body["Embed_0"]).std(), 1, rtol=0.1)


# --- A body and heads.


def body(params, x):
    for index in range(len(params)):
        x = relu(dense(params[f"dense_{index}"], x))
    return x


def test_body_and_head():
    model = models.body_and_head(3, 2, (5, 4))
    params, x = random_params(model.init), draw(6, 3)
    assert_equals(apply(model, params, x), dense(params["decoder"], body(params["encoder"], x)))


def test_many_heads():
    """Each example goes through the head that it names."""
    model = models.many_heads(3, 2, num_heads=4, hidden=(5, 6))
    params, x = random_params(model.init), draw(6, 3)
    chosen = np.array([2, 0, 3, 3, 1, 2])
    hidden, heads = body(params["encoder"], x), params["heads"]
    expected = [
        h @ heads["kernel"][c] + heads["bias"][c] for h, c in zip(hidden, chosen, strict=True)
    ]
    assert_equals(apply(model, params, {"features": x, "head": chosen}), expected)


def deviation(layer):
    return np.asarray(layer["kernel"]).std()


def defaults_of(function):
    parameters = inspect.signature(function).parameters.values()
    return {own.name: own.default for own in parameters if own.default is not own.empty}


def test_bodies_and_heads_start_at_their_scales():
    """The body is N(0, gain^2 / inputs), the head N(0, head_scale^2) or N(0, 1 / inputs).

    Biases are 0.
    """
    settings = {"gain": 0.7, "head_scale": 3.0}
    params = jax.jit(models.body_and_head(100, 50, (64, 32), **settings).init)(KEY)
    np.testing.assert_allclose(deviation(params["encoder"]["dense_0"]), 0.7 / 10, rtol=0.05)
    np.testing.assert_allclose(deviation(params["encoder"]["dense_1"]), 0.7 / 8, rtol=0.06)
    np.testing.assert_allclose(deviation(params["decoder"]), 3.0, rtol=0.06)
    assert defaults_of(models.body_and_head) == {"hidden": (64, 32), "gain": 1.4, "head_scale": 0.1}
    many = jax.jit(models.many_heads(100, 10, num_heads=5).init)(KEY)
    assert many["heads"]["kernel"].shape == (5, 48, 10)
    assert many["encoder"]["dense_0"]["kernel"].shape == (100, 64)
    np.testing.assert_allclose(deviation(many["encoder"]["dense_0"]), np.sqrt(2) / 10, rtol=0.05)
    np.testing.assert_allclose(deviation(many["encoder"]["dense_1"]), np.sqrt(2) / 8, rtol=0.05)
    np.testing.assert_allclose(deviation(many["heads"]), 1 / np.sqrt(48), rtol=0.06)
    for tree in (params, many):
        biases = [x for path, x in jax.tree_util.tree_leaves_with_path(tree) if "bias" in str(path)]
        assert biases and not any(leaf.any() for leaf in biases)
