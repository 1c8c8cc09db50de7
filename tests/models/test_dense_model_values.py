"""Networks of dense prediction and of split learning by value: outputs against plain numpy."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_layers import (
    attention,
    convolution,
    dense,
    draw,
    gelu_tanh,
    group_norm,
    instance_norm,
    layer_norm,
    leaky_relu,
    random_params,
    relu,
    resize,
)

from fedjax_mtl import models
from fedjax_mtl.models import dense_prediction, split_parts

KEY = jax.random.key(0)


def apply(model, params, inputs):
    return jax.jit(lambda p, x: model.apply(p, x))(params, inputs)


def assert_equals(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=2e-5)


# --- Dense prediction.


def residual_block(p, x, groups):
    shortcut = group_norm(p["norm_shortcut"], convolution(p["shortcut"], x, 2), groups, 1e-5)
    y = relu(group_norm(p["norm_0"], convolution(p["conv_0"], x, 2), groups, 1e-5))
    y = group_norm(p["norm_1"], convolution(p["conv_1"], y), groups, 1e-5)
    return relu(y + shortcut)


@pytest.mark.parametrize(("features", "groups"), [(16, 8), (4, 4)])
def test_residual_block(features, groups):
    """There are eight groups of channels, or one for each channel where there are fewer.

    Inputs are small, so that epsilon counts.
    """
    block = dense_prediction.ResidualBlock(features)
    x = 0.01 * draw(2, 4, 6, 3)
    params = random_params(lambda key: block.init(key, x))
    ours = jax.jit(block.apply)(params, x)
    assert_equals(ours, residual_block(params["params"], x, groups))


def encoder(p, images):
    maps = [relu(group_norm(p["norm"], convolution(p["stem"], images, 2), 8, 1e-5))]
    for index in range(len([name for name in p if name.startswith("block")])):
        maps.append(residual_block(p[f"block_{index}"], maps[-1], 8))
    return maps


def block(p, x, embedding=None):
    x = instance_norm(convolution(p["conv"], x))
    if embedding is None:
        return relu(x * p["scale"] + p["shift"])
    scale, shift = dense(p["scale"], embedding), dense(p["shift"], embedding)
    return leaky_relu(x * scale + shift, 0.01)


def decoder(p, maps, embedding=None):
    skips = [block(p[f"skip_{i}"], x, embedding) for i, x in enumerate(maps)]
    x = skips[-1]
    for index in reversed(range(len(maps))):
        x = resize(x, 2 * x.shape[1], 2 * x.shape[2])
        if index:
            x = np.concatenate([x, skips[index - 1]], axis=-1)
        x = block(p[f"block_{index}"], x, embedding)
    return convolution(p["last"], x)


def unit(x):
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


IMAGES = draw(2, 8, 4, 3)


@pytest.fixture
def tiniest(monkeypatch):
    """Gives the tiny size two maps instead of three, so that less is compiled."""
    size = dense_prediction.DenseSize((8, 16), (6, 5), 2, 20)
    monkeypatch.setitem(dense_prediction.SIZES, "tiny", size)


def test_one_decoder_a_task(tiniest):
    """Each task has a decoder, and only the outputs for normals are made unit vectors."""
    model = models.multi_decoder((8, 4, 3), {"depth": 1, "normals": 3}, "tiny")
    params = random_params(model.init)
    ours, maps = apply(model, params, IMAGES), encoder(params["encoder"], IMAGES)
    assert_equals(ours["depth"], decoder(params["decoders"]["depth"], maps))
    assert_equals(ours["normals"], unit(decoder(params["decoders"]["normals"], maps)))


def task_embedding(p, code):
    x = code / np.sqrt(np.mean(np.square(code)) + 1e-8)
    for index in range(len(p)):
        x = leaky_relu(dense(p[f"dense_{index}"], x), 0.2)
    return x


def channel_means(x, ranges):
    return np.stack([x[..., a:b].mean(axis=-1) for a, b in ranges], axis=-1)


def test_one_decoder_conditioned_on_the_task(tiniest):
    """The code of each of three tasks has ones in six of its 20 entries.

    The twelve maps are pooled to as many channels as the task has, unless it has twelve.
    """
    blocks = ("semseg", "depth", "normals")
    given = {"normals": 3, "semseg": 12}
    model = models.task_conditioned((8, 4, 3), given, "tiny", blocks)
    params = random_params(model.init)
    ours, maps = apply(model, params, IMAGES), encoder(params["encoder"], IMAGES)
    whole = {}
    for task in given:
        code = np.zeros(20)
        code[6 * blocks.index(task) : 6 * blocks.index(task) + 6] = 1
        embedding = task_embedding(params["task_embedding"], code)
        whole[task] = decoder(params["decoder"], maps, embedding)
        assert whole[task].shape[-1] == 12
    assert_equals(ours["semseg"], whole["semseg"])
    thirds = channel_means(whole["normals"], [(0, 4), (4, 8), (8, 12)])
    assert_equals(ours["normals"], unit(thirds))


def test_maps_of_the_conditioned_decoder(tiniest, monkeypatch):
    """The small size has sixteen maps, or as many as the largest task has channels."""
    monkeypatch.setitem(dense_prediction.SIZES, "small", dense_prediction.SIZES["tiny"])

    def maps(given, size):
        model = models.task_conditioned((8, 4, 3), given, size)
        return jax.eval_shape(model.init, KEY)["decoder"]["last"]["kernel"].shape[-1]

    assert maps({"depth": 1}, "small") == 16
    assert maps({"depth": 1, "semseg": 21}, "tiny") == 21


def codes_of(model, images):
    """The codes that a model's program holds, in the order of its tasks."""
    params = jax.eval_shape(model.init, KEY)
    constants = jax.make_jaxpr(lambda p, x: model.apply(p, x))(params, images).consts
    return [np.flatnonzero(c).tolist() for c in constants if np.shape(c) == (20,)]


def test_codes_follow_the_order_of_the_tasks(tiniest):
    """Codes follow the order of the tasks, unless blocks are named.

    There can be as many tasks as the embedding is wide.
    """
    default = models.task_conditioned((8, 4, 3), {"b": 1, "a": 1}, "tiny")
    assert codes_of(default, IMAGES) == [list(range(10)), list(range(10, 20))]
    named = models.task_conditioned((8, 4, 3), {"b": 1}, "tiny", ("x", "a", "b"))
    assert codes_of(named, IMAGES) == [list(range(12, 18))]
    with pytest.raises(ValueError, match="21 tasks do not fit an embedding of width 20"):
        models.task_conditioned((8, 4, 3), {str(n): 1 for n in range(21)}, "tiny")
    models.task_conditioned((8, 4, 3), {str(n): 1 for n in range(20)}, "tiny")


def test_dense_models_are_small_by_default():
    for make in (models.multi_decoder, models.task_conditioned):
        assert inspect.signature(make).parameters["size"].default == "small"


def test_norms_of_small_values():
    """Small values show which epsilon a norm has.

    Instance norm adds 1e-5 and pixel norm adds 1e-8. Unit vectors only avoid a division by 0.
    """
    x = 1e-3 * draw(2, 3, 3, 2)
    np.testing.assert_allclose(dense_prediction.instance_norm(x), instance_norm(x), rtol=1e-4)
    code = 1e-4 * draw(5)
    expected = code / np.sqrt(np.mean(np.square(code)) + 1e-8)
    np.testing.assert_allclose(dense_prediction.pixel_norm(code), expected, rtol=1e-5)
    np.testing.assert_allclose(dense_prediction.unit_vectors(1e-6 * x), unit(x), rtol=1e-4)
    assert not np.asarray(dense_prediction.unit_vectors(jnp.zeros(3))).any()


@pytest.mark.parametrize("shape", [(5, 3), (1, 7)])
def test_resizing_keeps_the_corners(shape):
    x = draw(2, 3, 4, 2)
    assert_equals(dense_prediction.resize_bilinear(x, *shape), resize(x, *shape))
    one = draw(1, 1, 1, 2)
    assert_equals(
        dense_prediction.resize_bilinear(one, *shape), np.broadcast_to(one, (1, *shape, 2))
    )


# --- Parts of a split model.


def params_of(part, inputs):
    return random_params(lambda key: part.init(key, inputs))


def test_patch_embedding():
    part, x = models.patch_embedding(2, 5), draw(2, 4, 6, 3)
    params = params_of(part, x)
    patches = x.reshape(2, 2, 2, 3, 2, 3).transpose(0, 1, 3, 2, 4, 5).reshape(2, 2, 3, 12)
    projected = patches @ params["projection"]["kernel"].reshape(12, 5)
    projected = projected + params["projection"]["bias"]
    assert_equals(apply(part, params, x), layer_norm(params["norm"], projected))


def test_vit_trunk():
    """The trunk has pre-norm blocks with an MLP of twice the width.

    Every token has a learned position.
    """
    part, x = models.vit_trunk(2, 2), draw(2, 2, 3, 4)
    params = params_of(part, x)
    tokens = x.reshape(2, 6, 4) + params["positions"]
    for index in range(2):
        p = params[f"block_{index}"]
        assert p["up"]["kernel"].shape == (4, 8)
        normed = layer_norm(p["norm_0"], tokens)
        tokens = tokens + attention(p["attention"], normed, normed)
        hidden = gelu_tanh(dense(p["up"], layer_norm(p["norm_1"], tokens)))
        tokens = tokens + dense(p["down"], hidden)
    assert_equals(apply(part, params, x), layer_norm(params["norm"], tokens).reshape(x.shape))


def test_conv_trunk():
    """Every stage halves the resolution, by 2 x 2 patches.

    The first stage is widened where it needs to be.
    """
    part, x = models.conv_trunk((8, 16)), draw(2, 4, 6, 5)
    params = params_of(part, x)
    ours = apply(part, params, x)
    for index in range(2):
        if index:
            x = convolution(params["merge_1"], x, 2, "VALID")
        else:
            x = convolution(params["widen"], x)
        convs = [params[f"conv_{index}_{layer}"] for layer in range(2)]
        norms = [params[f"norm_{index}_{layer}"] for layer in range(2)]
        y = gelu_tanh(group_norm(norms[0], convolution(convs[0], x), 8))
        y = group_norm(norms[1], convolution(convs[1], y), 8)
        x = gelu_tanh(x + y)
        assert ours[index].shape == x.shape
        assert_equals(ours[index], x)
    same = params_of(part, draw(1, 4, 4, 8))
    assert "widen" not in same


def test_deformable_convolution_is_that_of_the_displaced_image():
    """The layer starts without offsets.

    With all offsets one pixel down it is the convolution of the image moved up by one. The lower
    edge, where zeros come in, is left out.
    """
    layer, x = split_parts.DeformableConv(3), draw(2, 5, 4, 2)
    params = jax.jit(layer.init)(KEY, x)["params"]
    start = jax.jit(layer.apply)({"params": params}, x)
    assert_equals(start, convolution(params, x))
    down = np.zeros(18, np.float32)
    down[0::2] = 1
    params["offsets"]["bias"] = jnp.asarray(down)
    moved = jax.jit(layer.apply)({"params": params}, x)
    assert_equals(np.asarray(moved)[:, :3], np.asarray(start)[:, 1:4])
    # Between pixels it is that of the image interpolated there.
    between = np.tile(np.array([0.25, 0.5], np.float32), 9)
    params["offsets"]["bias"] = jnp.asarray(between)
    padded = np.pad(x, ((0, 0), (1, 2), (1, 2), (0, 0)))
    rows = 0.75 * padded[:, :-1] + 0.25 * padded[:, 1:]
    interpolated = (rows[:, :, :-1] + rows[:, :, 1:]) / 2
    ours = jax.jit(layer.apply)({"params": params}, x)
    assert_equals(ours, convolution(params, interpolated, padding="VALID"))


def adapted(p, maps, depth, image_size=None):
    """The client's upper part with offsets of 0, up to its features."""
    x = np.concatenate([resize(m, *maps[0].shape[1:3]) for m in maps], axis=-1)
    x = layer_norm(p["reduce_norm"], dense(p["reduce"], x))
    for index in range(depth):
        pointwise = gelu_tanh(dense(p[f"point_{index}"], x))
        x = group_norm(p[f"point_norm_{index}"], pointwise, 8)
        y = gelu_tanh(convolution(p[f"deformable_{index}"], x))
        x = x + group_norm(p[f"deformable_norm_{index}"], y, 8)
    tokens = x.reshape(x.shape[0], -1, x.shape[-1])
    told = layer_norm(p["self_norm"], dense(p["self_out"], attention(p["self"], tokens, tokens)))
    asked = dense(p["query_out"], attention(p["query"], tokens, told))
    return (tokens + layer_norm(p["query_norm"], asked)).reshape(x.shape)


def without_offsets(params, depth):
    for index in range(depth):
        own = params[f"deformable_{index}"]
        own["offsets"] = jax.tree.map(jnp.zeros_like, own["offsets"])
    return params


def test_task_adaptation():
    """The part adapts two maps and ends in the dense head.

    The defaults are one layer, four heads and a head of 16 channels.
    """
    part = models.task_adaptation(16, 2, (8, 10))
    maps = [draw(1, 4, 5, 3), draw(1, 2, 3, 4, seed=2)]
    params = without_offsets(params_of(part, maps), 1)
    assert "point_1" not in params and params["self"]["query"]["kernel"].shape == (16, 4, 4)
    y = convolution(params["head_conv"], adapted(params, maps, 1))
    assert y.shape[-1] == 16
    y = relu(group_norm(params["head_norm"], y, 8))
    assert_equals(apply(part, params, maps), resize(convolution(params["head"], y), 8, 10))


def test_task_adaptation_that_classifies():
    part = models.task_adaptation(16, 3, (8, 8), depth=2, heads=2, classify=True)
    x = draw(2, 2, 3, 4)
    params = without_offsets(params_of(part, x), 2)
    features = adapted(params, [x], 2)
    assert_equals(apply(part, params, x), dense(params["head"], features.mean(axis=(1, 2))))
