"""Dense models: parameter counts, golden operations, shapes; each part trains only its own."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_mtl import models
from fedjax_mtl.models import dense_prediction as dp

GOLDEN = json.loads((pathlib.Path(__file__).parents[1] / "golden" / "dense_ops.json").read_text())
KEY = jax.random.key(0)


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    "size, side, encoder, decoders, conditioned",
    [("tiny", 32, 18440, (22425, 22560), 27004), ("small", 64, 77432, (103100, 103300), 125656)],
)
def test_parameter_counts(size, side, encoder, decoders, conditioned):
    tasks = {"semseg": 12, "normals": 3, "edge": 1, "depth": 1}
    params = jax.eval_shape(dp.multi_decoder((side, side, 3), tasks, size).init, KEY)
    assert count(params["encoder"]) == encoder
    for task in tasks:
        assert decoders[0] - 50 <= count(params["decoders"][task]) <= decoders[1]
    params = jax.eval_shape(dp.task_conditioned((side, side, 3), tasks, size).init, KEY)
    assert count(params["encoder"]) == encoder and count(params["decoder"]) == conditioned
    width, layers = dp.SIZES[size].embedding_width, dp.SIZES[size].embedding_layers
    assert count(params["task_embedding"]) == layers * (width * width + width)


@pytest.mark.parametrize("make", [dp.multi_decoder, dp.task_conditioned])
def test_outputs(make):
    model = make((32, 32, 3), {"semseg": 12, "normals": 3, "depth": 1}, "tiny")
    params = jax.jit(model.init)(KEY)
    outputs = jax.jit(model.apply)(params, jax.random.normal(KEY, (2, 32, 32, 3)), None)
    assert {k: v.shape for k, v in outputs.items()} == {
        "semseg": (2, 32, 32, 12),
        "normals": (2, 32, 32, 3),
        "depth": (2, 32, 32, 1),
    }
    lengths = np.linalg.norm(outputs["normals"], axis=-1)
    one = np.isclose(lengths, 1, rtol=1e-4)
    assert one.mean() > 0.9 and not lengths[~one].any()  # 0 where all channels are dead


def test_a_task_trains_only_its_decoder():
    model = dp.multi_decoder((16, 16, 3), {"depth": 1, "edge": 1}, "tiny")
    params = jax.jit(model.init)(KEY)
    images = jax.random.normal(KEY, (1, 16, 16, 3))
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(model.apply(p, images, None)["depth"] ** 2)))(
        params
    )
    assert not any(leaf.any() for leaf in jax.tree.leaves(gradient["decoders"]["edge"]))
    assert any(leaf.any() for leaf in jax.tree.leaves(gradient["encoder"]))


def test_golden_operations():
    with jax.enable_x64(True):
        given = GOLDEN["task_conditioned_channel_pooling"]
        for bins, expected in given["outputs"].items():
            ours = dp.pool_channels(jnp.asarray(given["inputs"]["channels"]), int(bins))
            np.testing.assert_allclose(ours, expected, rtol=1e-9)
        given = GOLDEN["pixel_norm"]
        np.testing.assert_allclose(
            dp.pixel_norm(jnp.asarray(given["inputs"])), given["output"], rtol=1e-8
        )
        given = GOLDEN["bilinear_upsample_x2_align_corners"]
        ours = dp.resize_bilinear(jnp.asarray(given["inputs"])[None, ..., None], 4, 4)
        np.testing.assert_allclose(ours[0, ..., 0], given["output"], rtol=1e-7)


def test_conditioned_block_golden():
    given = GOLDEN["condition_block_1x1"]["inputs"]
    with jax.enable_x64(True):
        arrays = {name: jnp.asarray(value) for name, value in given.items()}
        params = {
            "conv": {"kernel": arrays["conv_weight_OI"].T[None, None], "bias": arrays["conv_bias"]},
            "scale": {"kernel": arrays["gamma_weight"].T, "bias": arrays["gamma_bias"]},
            "shift": {"kernel": arrays["beta_weight"].T, "bias": arrays["beta_bias"]},
        }
        x = jnp.moveaxis(arrays["x_CHW"], 0, -1)[None]
        ours = dp.ConvBlock(2, 1).apply({"params": params}, x, arrays["embedding"])
        expected = np.moveaxis(GOLDEN["condition_block_1x1"]["output"], 0, -1)
        np.testing.assert_allclose(ours[0], expected, rtol=1e-7, atol=1e-9)


def test_bad_arguments():
    with pytest.raises(
        ValueError, match="unknown size 'huge' of a dense model; expected one of tiny, small"
    ):
        models.multi_decoder((32, 32, 3), {"depth": 1}, "huge")
    with pytest.raises(ValueError, match="task 'sal' has no block"):
        models.task_conditioned((32, 32, 3), {"sal": 2}, "tiny", ("depth",))
