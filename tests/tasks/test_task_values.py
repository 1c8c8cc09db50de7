"""Losses and metrics by value, against plain numpy.

What they average over, what they leave out, and how models are mixed.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_mtl import tasks
from fedjax_mtl.tasks import boundaries, dense, dual

RNG = np.random.default_rng(0)
WEIGHTS = np.array([0.2, 0.5, 0.3])


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def value(fn, *arguments):
    """The value of a function that runs as one program.

    That compiles faster than the operations one by one.
    """
    return jax.device_get(jax.jit(fn)(*arguments))


def log_softmax(x):
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def pooled(metric, outputs, labels):
    """The value of a metric over an evaluation set that comes in two batches."""
    half = len(outputs) // 2

    def run(outputs, labels):
        parts = [
            metric.measure(*jax.tree.map(lambda x, own=own: x[own], (outputs, labels)))
            for own in (slice(half), slice(half, None))
        ]
        sums = jax.tree.map(lambda *x: sum(jnp.sum(own, axis=0) for own in x), *parts)
        return sums / len(outputs) if metric.finish is None else metric.finish(sums)

    return float(value(run, outputs, labels))


# --- Classification and regression.


def test_classification():
    task, outputs, labels = (
        tasks.classification(),
        RNG.normal(size=(5, 3)),
        np.array([0, 2, 1, 1, 2]),
    )
    np.testing.assert_allclose(
        value(task.loss, outputs, labels), -log_softmax(outputs)[np.arange(5), labels], rtol=1e-6
    )
    hits = value(task.metrics["accuracy"].measure, outputs, labels)
    np.testing.assert_array_equal(hits, outputs.argmax(axis=1) == labels)
    models = RNG.normal(size=(3, 5, 4))
    mixed = np.einsum("m,mbc->bc", WEIGHTS, np.exp(log_softmax(models)))
    np.testing.assert_allclose(value(task.mix, models, WEIGHTS), np.log(mixed), rtol=1e-6)


def test_binary_classification():
    """A score of 0 says class 0."""
    task = tasks.binary_classification()
    outputs, labels = np.array([[1.5], [-0.5], [0.0], [0.0]]), np.array([1, 1, 0, 1])
    probability = sigmoid(outputs[:, 0])
    expected = -np.log(np.where(labels == 1, probability, 1 - probability))
    np.testing.assert_allclose(value(task.loss, outputs, labels), expected, rtol=1e-6)
    np.testing.assert_array_equal(
        value(task.metrics["accuracy"].measure, outputs, labels), [1, 0, 1, 0]
    )
    models = RNG.normal(size=(3, 4, 1))
    mixed = np.einsum("m,mbo->bo", WEIGHTS, sigmoid(models))
    np.testing.assert_allclose(sigmoid(value(task.mix, models, WEIGHTS)), mixed, rtol=1e-6)
    # A component of weight 0 is left out.
    alone = value(task.mix, models, jnp.array([0.0, 1.0, 0.0]))
    np.testing.assert_allclose(alone, models[1], rtol=1e-6)


def test_sequences_are_means_over_positions():
    """Class weights multiply the losses and are not divided out again."""
    outputs, labels = RNG.normal(size=(2, 4, 3)), RNG.integers(0, 3, (2, 4))
    losses = -np.take_along_axis(log_softmax(outputs), labels[..., None], axis=-1)[..., 0]
    plain = tasks.sequence_classification()
    np.testing.assert_allclose(value(plain.loss, outputs, labels), losses.mean(axis=1), rtol=1e-6)
    weights = np.array([0.5, 2.0, 3.0])
    weighted = tasks.sequence_classification(class_weights=weights)
    expected = (losses * weights[labels]).mean(axis=1)
    np.testing.assert_allclose(value(weighted.loss, outputs, labels), expected, rtol=1e-6)
    hits = value(plain.metrics["accuracy"].measure, outputs, labels)
    np.testing.assert_allclose(hits, (outputs.argmax(axis=-1) == labels).mean(axis=1))


def test_regression():
    """The loss is half the summed square, and the metric is the mean square."""
    task = tasks.regression()
    outputs, labels = np.array([[1.0, 2.0]]), np.array([[0.0, 5.0]])
    assert value(task.metrics["squared_error"].measure, outputs, labels) == 5
    assert value(task.loss, outputs, labels) == 5
    outputs, labels = RNG.normal(size=(2, 3, 4))
    squares = np.square(outputs - labels)
    np.testing.assert_allclose(
        value(task.loss, outputs, labels), squares.sum(axis=1) / 2, rtol=1e-6
    )
    np.testing.assert_allclose(
        value(task.metrics["squared_error"].measure, outputs, labels),
        squares.mean(axis=1),
        rtol=1e-6,
    )
    models = RNG.normal(size=(3, 2, 2))
    np.testing.assert_allclose(value(task.mix, models, WEIGHTS), np.tensordot(WEIGHTS, models, 1))


def test_mean_squared_error():
    """The normalised error is relative to the variance of the client's labels.

    The root is that of the pooled mean.
    """
    task = tasks.mean_squared_error()
    outputs, target = RNG.normal(size=(2, 4, 3))
    labels = {"target": target, "variance": np.array([1.0, 2.0, 0.5, 4.0])}
    squares = np.square(outputs - target).mean(axis=1)
    np.testing.assert_allclose(value(task.loss, outputs, labels), squares, rtol=1e-6)
    relative = value(task.metrics["normalised_error"].measure, outputs, labels)
    np.testing.assert_allclose(relative, squares / labels["variance"], rtol=1e-6)
    root = pooled(task.metrics["rmse"], outputs, labels)
    np.testing.assert_allclose(root, np.sqrt(squares.mean()), rtol=1e-6)
    models = RNG.normal(size=(3, 2, 2))
    np.testing.assert_allclose(value(task.mix, models, WEIGHTS), np.tensordot(WEIGHTS, models, 1))


def test_joint_tasks_mix_each_by_its_own_rule():
    joined = tasks.joint({"a": (tasks.classification(), 2.0), "b": (tasks.regression(), 0.5)})
    models = {"a": RNG.normal(size=(3, 2, 3)), "b": RNG.normal(size=(3, 2, 1))}
    labels = {"a": np.array([0, 2]), "b": np.zeros((2, 1))}
    mixed = value(joined.mix, models, WEIGHTS)
    np.testing.assert_allclose(mixed["a"], value(tasks.classification().mix, models["a"], WEIGHTS))
    np.testing.assert_allclose(mixed["b"], np.tensordot(WEIGHTS, models["b"], 1))
    one = jax.tree.map(lambda x: x[0], models)
    own = (
        value(joined.metrics["a/loss"].measure, one, labels),
        value(joined.metrics["b/loss"].measure, one, labels),
    )
    np.testing.assert_allclose(value(joined.loss, one, labels), 2 * own[0] + own[1] / 2, rtol=1e-9)
    np.testing.assert_allclose(own[1], np.square(one["b"][:, 0]) / 2)
    assert joined.name == "a+b"


# --- Scores of the dual methods.


def test_scores_of_dual_tasks():
    """A score of 0 is wrong whatever the label.

    With real labels the metric is the root of the pooled mean.
    """
    task = dual.dual_task(dual.hinge())
    scores, labels = np.array([0.3, -2.0, 0.0, 0.0, 4.0]), np.array([1.0, 1, 1, -1, 1])
    np.testing.assert_array_equal(
        value(task.metrics["accuracy"].measure, scores, labels), [1, 0, 0, 0, 1]
    )
    np.testing.assert_array_equal(
        value(task.metrics["error"].measure, scores, labels), [0, 1, 1, 1, 0]
    )
    np.testing.assert_allclose(value(task.loss, scores, labels), [0.7, 3, 1, 1, 0], rtol=1e-6)
    assert task.name == "hinge" and dual.dual_task(dual.hinge(), "other").name == "other"
    real = dual.dual_task(dual.squared())
    assert set(real.metrics) == {"rmse"}
    root = pooled(real.metrics["rmse"], scores, labels)
    np.testing.assert_allclose(root, np.sqrt(np.mean(np.square(scores - labels))), rtol=1e-6)
    np.testing.assert_allclose(value(real.loss, scores, labels), np.square(scores - labels) / 2)


def test_values_of_dual_losses():
    """The corner of the smoothed hinge has a width of 1 by default.

    Conjugates belong to their losses.
    """
    z = np.array([-1.0, 0.25, 0.5, 1.0, 2.0])
    np.testing.assert_allclose(dual.smoothed_hinge().loss(z, 1.0), [1.5, 0.28125, 0.125, 0, 0])
    np.testing.assert_allclose(dual.smoothed_hinge(0.5).loss(z, 1.0), [1.75, 0.5, 0.25, 0, 0])
    np.testing.assert_allclose(dual.logistic().loss(z, -1.0), np.log1p(np.exp(z)), rtol=1e-6)
    grid = np.linspace(-30, 30, 60001)
    for loss in (dual.hinge(), dual.smoothed_hinge(0.5), dual.squared(), dual.logistic()):
        for alpha, label in ((0.3, 1.0), (-0.7, -1.0)):
            # conj(-alpha) = max_z -alpha z - loss(z)
            highest = np.max(-alpha * grid - np.asarray(value(loss.loss, grid, label)))
            ours = loss.conjugate(jnp.asarray(alpha), label)
            np.testing.assert_allclose(ours, highest, atol=1e-5, err_msg=loss.name)


@pytest.mark.parametrize("name", ["hinge", "smoothed_hinge", "squared", "logistic"])
def test_coordinate_steps_are_maximisers(name):
    """Of ``-conj(-a) - f (a - old) - c / 2 (a - old)^2``, on a grid of the domain."""
    loss = getattr(dual, name)()
    old, f = RNG.uniform(0, 1, 12), RNG.normal(size=12) * np.repeat([1, 10], 6)
    c, label = np.tile([0.2, 1.0, 20.0], 4), np.tile([1.0, -1.0], 6)
    grid = np.linspace(*((-25, 25) if name == "squared" else (0, 1)), 200_001)[:, None]
    conjugates = value(loss.conjugate, label * grid, label)
    change = label * grid - label * old
    objective = -conjugates - f * change - c / 2 * np.square(change)
    best = grid[objective.argmax(axis=0), 0] * label
    ours = value(jax.vmap(loss.ascend), label * old, label, f, c)
    np.testing.assert_allclose(ours, best, atol=3e-4)


# --- Dense prediction.


def test_a_class_that_never_occurs_counts_as_zero():
    """Two of three classes occur, and pixels marked 255 do not count."""
    labels = np.array([[[0, 0, 1, 1]], [[1, 255, 255, 0]]])[..., None]
    said = np.array([[[0, 1, 1, 1]], [[0, 0, 1, 0]]])
    outputs = np.eye(3)[said]
    metric = dense.segmentation("s", 3).metrics["miou"]
    np.testing.assert_allclose(pooled(metric, outputs, labels), (2 / 4 + 2 / 4 + 0) / 3, rtol=1e-6)
    two = dense.segmentation("s", 2).metrics["miou"]
    np.testing.assert_allclose(pooled(two, outputs[..., :2], labels), 0.5, rtol=1e-6)


def test_depth_is_judged_between_0_and_80_metres():
    """Predictions below 0 count as 0.

    The loss counts all pixels that are not marked 255.
    """
    labels = np.array([0.0, 80.0, 79.0, 10.0, 1.0, 255.0]).reshape(2, 1, 3, 1)
    outputs = np.array([9.0, 9.0, 78.0, 12.0, -5.0, 9.0]).reshape(2, 1, 3, 1)
    task = dense.depth()
    root = pooled(task.metrics["rmse"], outputs, labels)
    np.testing.assert_allclose(root, np.sqrt((1 + 4 + 1) / 3), rtol=1e-6)
    np.testing.assert_allclose(value(task.loss, outputs, labels), [(9 + 71 + 1) / 3, (2 + 6) / 2])


def test_normals_are_compared_as_unit_vectors():
    labels = np.array([[0.0, 0, 1], [1, 0, 0], [255, 255, 255], [0, 1, 0]]).reshape(2, 1, 2, 3)
    outputs = np.array([[0.0, 0, 9], [0, 3, 0], [1, 1, 1], [0, 2, 2]]).reshape(2, 1, 2, 3)
    task = dense.normals()
    half = np.sqrt(0.5)
    np.testing.assert_allclose(
        value(task.loss, outputs, labels), [(0 + 2) / 2, half + 1 - half], rtol=1e-6
    )
    np.testing.assert_allclose(
        pooled(task.metrics["angle_error"], outputs, labels), (0 + 90 + 45) / 3, atol=1e-4
    )


def test_edges_weigh_positive_pixels_by_095():
    outputs, labels = RNG.normal(size=(2, 2, 3, 1)), np.array([0, 1, 255, 1, 0, 0] * 2)
    labels = labels.reshape(2, 2, 3, 1)
    p, valid = sigmoid(outputs), labels != 255
    values = -np.where(labels == 1, 0.95 * np.log(p), 0.05 * np.log(1 - p)) * valid
    task = dense.edges()
    np.testing.assert_allclose(
        value(task.loss, outputs, labels), values.sum(axis=(1, 2, 3)) / 5, rtol=1e-6
    )
    pixel = pooled(task.metrics["pixel_loss"], outputs, labels)
    np.testing.assert_allclose(pixel, values.sum() / 10, rtol=1e-6)
    # The meter keeps its 0.95 whatever the loss weighs.
    other = dense.edges(positive_weight=0.8)
    assert pooled(other.metrics["pixel_loss"], outputs, labels) == pixel
    assert not np.allclose(value(other.loss, outputs, labels), value(task.loss, outputs, labels))


def test_saliency():
    """F with beta^2 = 0.3 and the mean IoU of both classes are those of the best threshold.

    The loss is balanced image by image.
    """
    assert dense.SALIENCY_THRESHOLDS == tuple(np.round(np.arange(0.05, 0.951, 0.05), 2))
    probability = np.array([0.9, 0.82, 0.62, 0.3, 0.2, 0.7, 0.1, 0.41]).reshape(2, 1, 4)
    labels = np.array([1, 1, 0, 0, 1, 0, 0, 255]).reshape(2, 1, 4, 1)
    outputs = np.log(np.stack([1 - probability, probability], axis=-1))
    valid = labels[..., 0] != 255
    true = labels[..., 0] == 1
    f, iou = [], []
    for threshold in dense.SALIENCY_THRESHOLDS:
        said = (probability >= threshold) & valid
        hits, rejected = (said & true).sum(), (~said & ~true & valid).sum()
        precision, recall = hits / max(said.sum(), 1), hits / true.sum()
        f.append(1.3 * precision * recall / max(0.3 * precision + recall, 1e-12))
        union = hits / (said | true).sum() + rejected / (valid.sum() - hits)
        iou.append(union / 2)
    task = dense.saliency()
    np.testing.assert_allclose(pooled(task.metrics["max_f"], outputs, labels), max(f), rtol=1e-5)
    np.testing.assert_allclose(
        pooled(task.metrics["max_iou"], outputs, labels), max(iou), rtol=1e-5
    )
    losses = []
    for own in range(2):
        p, y, counted = probability[own, 0], true[own, 0], valid[own, 0]
        background = (~y & counted).sum() / counted.sum()
        values = -np.where(y, background * np.log(p), (1 - background) * np.log(1 - p))
        losses.append(values[counted].mean())
    np.testing.assert_allclose(value(task.loss, outputs, labels), losses, rtol=1e-6)


def test_pixel_regression():
    """A pixel counts only if all of its channels do, and channels are averaged."""
    outputs, labels = RNG.normal(size=(2, 2, 2, 3, 2))
    labels[0, 0, 0] = 255
    labels[1, 1, 2, 1] = 255
    valid = np.ones((2, 2, 3), bool)
    valid[0, 0, 0] = valid[1, 1, 2] = False
    errors = outputs - labels
    task = dense.pixel_regression("r")
    means = [np.abs(errors[i]).mean(axis=-1)[valid[i]].mean() for i in range(2)]
    np.testing.assert_allclose(value(task.loss, outputs, labels), means, rtol=1e-6)
    root = np.sqrt(np.square(errors).mean(axis=-1)[valid].mean())
    np.testing.assert_allclose(pooled(task.metrics["rmse"], outputs, labels), root, rtol=1e-6)


def test_dense_models_are_mixed_as_distributions_or_means():
    models = RNG.normal(size=(3, 1, 2, 2, 2))
    mean = np.tensordot(WEIGHTS, models, 1)
    for task in (dense.depth(), dense.normals(), dense.pixel_regression("r")):
        np.testing.assert_allclose(value(task.mix, models, WEIGHTS), mean, rtol=1e-6)
    probabilities = np.tensordot(WEIGHTS, np.exp(log_softmax(models)), 1)
    for task in (dense.segmentation("s", 2), dense.saliency()):
        np.testing.assert_allclose(
            value(task.mix, models, WEIGHTS), np.log(probabilities), rtol=1e-6
        )
    edges = value(dense.edges().mix, models, WEIGHTS)
    np.testing.assert_allclose(sigmoid(edges), np.tensordot(WEIGHTS, sigmoid(models), 1), rtol=1e-6)


def test_weights_of_the_benchmarks_tasks():
    assert dense.LOSS_WEIGHTS == {
        "A": {"semseg": 1, "normals": 10, "edge": 50, "depth": 1},
        "B": {"semseg": 1, "human_parts": 2, "normals": 10, "edge": 50, "sal": 5},
    }


def test_boundary_f_by_hand():
    """Half of an edge is found, a pixel to the side.

    Eight false pixels have less confidence, and the best threshold leaves them out.
    """
    truth, said = np.zeros((1, 40, 40)), np.zeros((1, 40, 40))
    truth[0, 20] = 1
    said[0, 21, :20] = 0.9
    said[0, 2, ::5] = 0.31
    score, threshold = boundaries.boundary_f(said, truth, thinned=False)
    np.testing.assert_allclose(score, 2 * 1 * 0.5 / 1.5)
    assert threshold == pytest.approx(0.32)
    # In an image of this size the tolerance is one pixel, and two pixels are too far.
    far = np.roll(said, 1, axis=1)
    assert boundaries.boundary_f(far, truth, thinned=False)[0] == 0
    wide = boundaries.boundary_f(far, truth, max_distance=2.1 / np.hypot(40, 40), thinned=False)
    np.testing.assert_allclose(wide[0], 2 * 1 * 0.5 / 1.5)
    ignored = np.where(np.arange(40) >= 20, 255, truth[0])[None]
    wrong = said.copy()
    wrong[0, 30, 20:] = 0.9
    np.testing.assert_allclose(boundaries.boundary_f(wrong, ignored, thinned=False)[0], 1)
