"""Dense losses and metrics against golden values, pooled evaluation, average improvement."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_mtl import tasks
from fedjax_mtl.tasks import boundaries, dense

GOLDEN_DIR = pathlib.Path(__file__).parents[1] / "golden"
GOLDEN = json.loads((GOLDEN_DIR / "dense_ops.json").read_text())
DELTA = json.loads((GOLDEN_DIR / "aggregation.json").read_text())["delta_m"]["cases"]


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def channels_last(values):
    return jnp.moveaxis(jnp.asarray(values, jnp.float64), 0, -1)[None]


def flat(values):
    return jnp.asarray(values, jnp.float64)[None, ..., None]


def pooled(metric, outputs, labels):
    totals = jax.tree.map(lambda x: x.sum(0), metric.measure(outputs, labels))
    return metric.finish(totals)


def case(name):
    return GOLDEN[name]["inputs"]


def test_segmentation():
    given = case("cross_entropy")
    loss = dense.segmentation("s", 3).loss(
        channels_last(given["logits_CHW"]), flat(given["label_HW"])
    )
    np.testing.assert_allclose(loss, [GOLDEN["cross_entropy"]["output"]], rtol=1e-9)
    given = case("miou_percent")
    for classes in (7, 21):
        logits = jax.nn.one_hot(jnp.asarray(given["pred_HW"]), classes)[None]
        ours = pooled(
            dense.segmentation("s", classes).metrics["miou"], logits, flat(given["gt_HW"])
        )
        np.testing.assert_allclose(
            100 * ours, GOLDEN["miou_percent"][f"miou_{classes}_classes"], rtol=1e-9
        )


def test_saliency():
    given = case("balanced_cross_entropy_saliency")
    loss = dense.saliency().loss(channels_last(given["logits_CHW"]), flat(given["label_HW"]))
    np.testing.assert_allclose(
        loss, [GOLDEN["balanced_cross_entropy_saliency"]["output"]], rtol=1e-8
    )
    given = case("saliency_maxF_percent")
    probability = jnp.asarray(given["prob_HW"])[None]
    logits = jnp.stack([jnp.log(1 - probability), jnp.log(probability)], axis=-1)
    for fidelity, name in (
        ("paper", "fedhca2_repository"),
        ("released", "fmtl_bench_released_extra_sigmoid"),
    ):
        ours = pooled(
            dense.saliency(fidelity=fidelity).metrics["max_f"], logits, flat(given["gt_HW"])
        )
        np.testing.assert_allclose(100 * ours, GOLDEN["saliency_maxF_percent"][name], rtol=1e-6)
    assert pooled(dense.saliency().metrics["max_iou"], logits, flat(given["gt_HW"])) == 1.0


@pytest.mark.parametrize("weight", ["0.95", "0.8"])
def test_edge_loss(weight):
    given = case("edge_weighted_bce")
    loss = dense.edges(positive_weight=float(weight)).loss(
        flat(given["logit_HW"]), flat(given["label_HW"])
    )
    np.testing.assert_allclose(
        loss, [GOLDEN["edge_weighted_bce"]["outputs_by_pos_weight"][weight]], rtol=1e-8
    )


def test_edge_metric():
    given = case("edge_test_loss_metric")
    for fidelity, name in (("paper", "plain_logit_version"), ("released", "released_code")):
        metric = dense.edges(fidelity=fidelity).metrics["pixel_loss"]
        ours = pooled(metric, flat(given["logit_HW"]), flat(given["label_HW"]))
        np.testing.assert_allclose(ours, GOLDEN["edge_test_loss_metric"][name], rtol=1e-8)


def test_depth():
    given = case("depth_l1")
    loss = dense.depth().loss(flat(given["pred_HW"]), flat(given["label_HW"]))
    np.testing.assert_allclose(loss, [GOLDEN["depth_l1"]["output"]], rtol=1e-9)
    given = case("depth_rmse")
    ours = pooled(dense.depth().metrics["rmse"], flat(given["pred_HW"]), flat(given["gt_HW"]))
    np.testing.assert_allclose(ours, GOLDEN["depth_rmse"]["output"], rtol=1e-9)


def test_normals():
    given = case("normals_l1")
    predicted, labels = channels_last(given["pred_CHW"]), channels_last(given["label_CHW"])
    np.testing.assert_allclose(
        dense.normals().loss(predicted, labels), [GOLDEN["normals_l1"]["output"]], rtol=1e-9
    )
    given = case("normals_mean_angle_error_deg")
    predicted, labels = channels_last(given["pred_CHW"]), channels_last(given["gt_CHW"])
    ours = pooled(dense.normals().metrics["angle_error"], predicted, labels)
    np.testing.assert_allclose(ours, GOLDEN["normals_mean_angle_error_deg"]["output"], rtol=1e-8)
    gradient = jax.grad(lambda p: dense.normals().loss(p, labels).sum())(jnp.zeros_like(predicted))
    assert np.isfinite(gradient).all()


def test_nothing_valid_is_a_loss_of_zero_with_a_finite_gradient():
    for task, channels in (
        (dense.segmentation("s", 3), 3),
        (dense.depth(), 1),
        (dense.normals(), 3),
        (dense.edges(), 1),
        (dense.saliency(), 2),
        (dense.pixel_regression("r"), 2),
    ):
        labels = jnp.full(
            (
                2,
                4,
                4,
                3 if task.name == "normals" else 1 if channels != 2 or task.name == "sal" else 2,
            ),
            255.0,
        )
        outputs = jnp.ones((2, 4, 4, channels))
        value, gradient = jax.value_and_grad(lambda o, t=task, y=labels: t.loss(o, y).sum())(
            outputs
        )
        assert value == 0 and not gradient.any()
        for metric in task.metrics.values():
            assert np.isfinite(pooled(metric, outputs, labels))


def test_joint_task():
    task = tasks.joint({"depth": (dense.depth(), 2.0), "edge": (dense.edges(), 0.5)})
    outputs = {"depth": jnp.ones((1, 2, 2, 1)), "edge": jnp.zeros((1, 2, 2, 1))}
    labels = {
        "depth": jnp.full((1, 2, 2, 1), 3.0),
        "edge": jnp.ones((1, 2, 2, 1)),
        "other": jnp.zeros((1,)),
    }
    expected = 2.0 * 2 + 0.5 * 0.95 * np.log(2)
    np.testing.assert_allclose(task.loss(outputs, labels), [expected], rtol=1e-9)
    assert set(task.metrics) == {"depth/loss", "depth/rmse", "edge/loss", "edge/pixel_loss"}
    np.testing.assert_allclose(pooled(task.metrics["depth/rmse"], outputs, labels), 2.0)
    with pytest.raises(ValueError, match="needs at least one task"):
        tasks.joint({})
    with pytest.raises(ValueError, match="task 'depth' has weight 0"):
        tasks.joint({"depth": (dense.depth(), 0)})


@pytest.mark.parametrize("index", range(len(DELTA)))
def test_average_improvement(index):
    given, expected = DELTA[index]["inputs"], DELTA[index]["outputs"]
    total, per_task = tasks.average_improvement(
        given["method"],
        given["baseline"],
        [not lower for lower in given["lower_is_better"]],
        given["weights"],
    )
    np.testing.assert_allclose(total, expected["delta_percent"], rtol=1e-6)
    np.testing.assert_allclose(per_task, expected["per_task_percent"], rtol=1e-6)


def test_average_improvement_refuses_what_has_no_answer():
    with pytest.raises(ValueError, match="the reference of task 1 is 0"):
        tasks.average_improvement([1, 1], [1, 0], [False, True])
    with pytest.raises(ValueError, match="2 values, 1 references"):
        tasks.average_improvement([1, 1], [1], [False])


def test_boundary_f():
    truth = np.zeros((2, 32, 32))
    truth[0, 16], truth[1, :, 8] = 1, 1
    assert boundaries.boundary_f(truth, truth) == (1.0, pytest.approx(0.02))
    shifted = np.roll(truth, 6, axis=(1, 2))
    assert boundaries.boundary_f(shifted, truth)[0] < 0.2
    # A thick ramp around the edge is thinned to its ridge.
    rows = np.abs(np.arange(32) - 16)[:, None]
    ramp = np.broadcast_to(np.clip(1 - rows / 4, 0, 1), (32, 32))
    kept = boundaries.thin(ramp)
    assert (kept[16] > 0).mean() > 0.9 and (kept[14] > 0).mean() < 0.2
    noise = np.random.default_rng(0).random((2, 32, 32))
    assert boundaries.boundary_f(noise, truth)[0] < 0.6


def test_bad_fidelity():
    with pytest.raises(ValueError, match="fidelity must be 'paper' or 'released', got 'code'"):
        dense.edges(fidelity="code")
    with pytest.raises(ValueError, match="fidelity must be 'paper' or 'released', got 'code'"):
        dense.saliency(fidelity="code")
