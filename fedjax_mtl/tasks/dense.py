"""Dense prediction: segmentation, depth, surface normals, edges, saliency, pixel-wise regression.

Losses and metrics are as in FMTL-Bench (arXiv 2402.12876, sections on losses and metrics), or as in
its released code where that is said. Labels are ``[batch, height, width, channels]`` with 255
where they are to be ignored. A loss is the mean over an image's own valid pixels and every image
weighs the same; the released code pools the pixels of a batch.
"""

import jax
import jax.numpy as jnp
import optax

from fedjax_mtl.core.checks import check_fidelity
from fedjax_mtl.core.task import SHARE, Metric, Task
from fedjax_mtl.tasks._classification import mix_binary, mix_classes
from fedjax_mtl.tasks._regression import root_mean_square

IGNORE = 255
SALIENCY_THRESHOLDS = tuple(round(0.05 * k, 2) for k in range(1, 20))
SALIENCY_BETA_SQUARED = 0.3
LARGEST_DEPTH = 80.0


def _image_sum(values: jax.Array) -> jax.Array:
    return jnp.sum(values.reshape(values.shape[0], -1), axis=1)


def _image_mean(values: jax.Array, valid: jax.Array) -> jax.Array:
    """Mean over each image's valid pixels, ``[batch, h, w] -> [batch]``; 0 where there are none."""
    return _image_sum(jnp.where(valid, values, 0)) / jnp.maximum(_image_sum(valid), 1)


def _pooled_mean(sums: dict[str, jax.Array]) -> jax.Array:
    """The mean over all valid pixels of the evaluation set."""
    return sums["sum"] / jnp.maximum(sums["count"], 1)


def _mean_over_models(outputs: jax.Array, weights: jax.Array) -> jax.Array:
    return jnp.tensordot(weights, outputs, 1)


def _unit(vectors: jax.Array) -> jax.Array:
    """Vectors of length 1 along the last axis; the gradient at 0 is finite."""
    squared = jnp.sum(jnp.square(vectors), axis=-1, keepdims=True)
    return vectors * jax.lax.rsqrt(jnp.maximum(squared, 1e-24))


def segmentation(name: str, num_classes: int) -> Task:
    """Semantic segmentation, with cross entropy.

    Outputs are logits ``[batch, h, w, num_classes]``, labels class numbers ``[batch, h, w, 1]``.
    ``miou`` is the intersection over union of the pooled pixels of each class, plainly averaged
    over all classes; a class that never occurs counts as 0.

    Args:
        name: names the task.
        num_classes: the classes are 0 to ``num_classes - 1``.
    """

    def loss(outputs, labels):
        target = labels[..., 0].astype(jnp.int32)
        valid = target != IGNORE
        target = jnp.where(valid, target, 0)
        return _image_mean(
            optax.losses.softmax_cross_entropy_with_integer_labels(outputs, target), valid
        )

    def overlaps(outputs, labels):
        target = labels[..., 0].astype(jnp.int32)
        predicted = jnp.argmax(outputs, axis=-1)
        valid = target != IGNORE

        def per_class(c):
            said, true = valid & (predicted == c), valid & (target == c)
            return _image_sum(said & true), _image_sum(said | true)

        both, either = jax.vmap(per_class, out_axes=1)(jnp.arange(num_classes))
        return {"intersection": both, "union": either}

    def mean_iou(sums):
        union = sums["union"]
        return jnp.mean(jnp.where(union > 0, sums["intersection"] / jnp.maximum(union, 1), 0))

    miou = Metric(overlaps, higher_is_better=True, unit=SHARE, primary=True, finish=mean_iou)
    return Task(name, loss, {"miou": miou}, mix_classes)


def depth(name: str = "depth") -> Task:
    """Depth: outputs and labels ``[batch, h, w, 1]`` in metres.

    The loss is L1; ``rmse`` pools the pixels with 0 < label < 80. Missing depth must be marked 255
    in the labels (0 enters the loss, as in the released code). Predictions are clamped at 0 for
    the metric.
    """

    def loss(outputs, labels):
        return _image_mean(jnp.abs(outputs - labels)[..., 0], labels[..., 0] != IGNORE)

    def known(outputs, labels):
        del outputs
        return (labels[..., 0] > 0) & (labels[..., 0] < LARGEST_DEPTH)

    def squares(outputs, labels):
        errors = jnp.square(jnp.maximum(outputs, 1e-9) - labels)[..., 0]
        return _image_sum(jnp.where(known(outputs, labels), errors, 0))

    def counts(outputs, labels):
        return _image_sum(known(outputs, labels)).astype(jnp.float32)

    rmse = root_mean_square(squares, counts, unit="m")
    return Task(name, loss, {"rmse": rmse}, _mean_over_models)


def normals(name: str = "normals") -> Task:
    """Surface normals: outputs ``[batch, h, w, 3]``, normalised here, labels unit vectors or 255.

    The loss is L1, summed over the channels. ``angle_error`` is the mean angle over all valid
    pixels, in degrees, by ``2 atan2(||p - g||, ||p + g||)``.
    """

    def valid_pixels(labels):
        return jnp.all(labels != IGNORE, axis=-1)

    def loss(outputs, labels):
        return _image_mean(jnp.sum(jnp.abs(_unit(outputs) - labels), axis=-1), valid_pixels(labels))

    def angles(outputs, labels):
        valid = valid_pixels(labels)
        predicted, true = _unit(outputs), _unit(labels)
        apart = jnp.linalg.norm(predicted - true, axis=-1)
        degrees = jnp.degrees(2 * jnp.arctan2(apart, jnp.linalg.norm(predicted + true, axis=-1)))
        return {"sum": _image_sum(jnp.where(valid, degrees, 0)), "count": _image_sum(valid)}

    error = Metric(
        angles, higher_is_better=False, unit="degrees", primary=True, finish=_pooled_mean
    )
    return Task(name, loss, {"angle_error": error}, _mean_over_models)


def edges(name: str = "edge", positive_weight: float = 0.95, fidelity: str = "paper") -> Task:
    """Edges: outputs one logit ``[batch, h, w, 1]``, labels in {0, 1} or 255.

    The loss is a weighted binary cross entropy. ``pixel_loss`` is that loss, pooled over pixels
    and always with weight 0.95. For odsF see :mod:`fedjax_mtl.tasks.boundaries`.

    Args:
        name: names the task.
        positive_weight: of the pixels on an edge, in the loss; the others weigh one minus it. The
            paper says 0.8 for NYUD, the released code 0.95 everywhere.
        fidelity: with ``released`` the metric takes the probability where the logit belongs, as
            the released meter does, which squeezes all values into a narrow band.

    Raises:
        InputError: an unknown fidelity.
    """
    check_fidelity(fidelity)

    def weighted(logits, labels, weight):
        return weight * labels * jax.nn.softplus(-logits) + (1 - weight) * (
            1 - labels
        ) * jax.nn.softplus(logits)

    def loss(outputs, labels):
        target = labels[..., 0]
        return _image_mean(weighted(outputs[..., 0], target, positive_weight), target != IGNORE)

    def pixel_losses(outputs, labels):
        target, logits = labels[..., 0], outputs[..., 0]
        logits = jax.nn.sigmoid(logits) if fidelity == "released" else logits
        valid = target != IGNORE
        values = weighted(logits, target, 0.95)
        return {"sum": _image_sum(jnp.where(valid, values, 0)), "count": _image_sum(valid)}

    pixel_loss = Metric(pixel_losses, higher_is_better=False, primary=True, finish=_pooled_mean)
    return Task(name, loss, {"pixel_loss": pixel_loss}, mix_binary)


def saliency(name: str = "sal", fidelity: str = "paper") -> Task:
    """Saliency: outputs two logits ``[batch, h, w, 2]``, labels in {0, 1} or 255.

    The loss is a cross entropy whose class weights are ``(1 - f, f)``, with f the share of the
    image's valid pixels that are not salient, divided by the pixel count. ``max_f`` is F with
    beta^2 = 0.3 at the best of the thresholds 0.05, ..., 0.95, on pooled counts; ``max_iou`` is
    likewise the mean IoU of both classes.

    Args:
        name: names the task.
        fidelity: with ``released`` another sigmoid is applied to the probability, as in
            FMTL-Bench's released meter.

    Raises:
        InputError: an unknown fidelity.
    """
    check_fidelity(fidelity)

    def loss(outputs, labels):
        target = labels[..., 0]
        valid = target != IGNORE
        salient = valid & (target > 0.5)
        background = _image_mean(~salient, valid)[:, None, None]
        values = optax.losses.softmax_cross_entropy_with_integer_labels(
            outputs, salient.astype(jnp.int32)
        )
        return _image_mean(jnp.where(salient, background, 1 - background) * values, valid)

    def hits_by_threshold(outputs, labels):
        target = labels[..., 0]
        valid = target != IGNORE
        true = valid & (target > 0.5)
        probability = jax.nn.softmax(outputs)[..., 1]
        probability = jax.nn.sigmoid(probability) if fidelity == "released" else probability

        def at(threshold):
            said = valid & (probability >= threshold)
            return _image_sum(said & true), _image_sum(said), _image_sum(valid & ~said & ~true)

        hits, said, rejected = jax.vmap(at, out_axes=1)(jnp.asarray(SALIENCY_THRESHOLDS))
        return {
            "hits": hits,
            "said": said,
            "rejected": rejected,
            "true": _image_sum(true),
            "valid": _image_sum(valid),
        }

    def max_f(sums):
        precision = sums["hits"] / jnp.maximum(sums["said"], 1)
        recall = sums["hits"] / jnp.maximum(sums["true"], 1)
        bottom = SALIENCY_BETA_SQUARED * precision + recall
        score = (1 + SALIENCY_BETA_SQUARED) * precision * recall / jnp.where(bottom > 0, bottom, 1)
        return jnp.max(score)

    def max_iou(sums):
        hits = sums["hits"]
        salient = hits / jnp.maximum(sums["said"] + sums["true"] - hits, 1)
        background = sums["rejected"] / jnp.maximum(sums["valid"] - hits, 1)
        return jnp.max((salient + background) / 2)

    share = Metric(hits_by_threshold, higher_is_better=True, unit=SHARE)
    metrics = {
        "max_f": share._replace(finish=max_f, primary=True),
        "max_iou": share._replace(finish=max_iou),
    }
    return Task(name, loss, metrics, mix_classes)


def pixel_regression(name: str, unit: str = "") -> Task:
    """Any other map of real values, ``[batch, h, w, channels]``, over pixels that are not 255.

    The loss is L1, the metric the pooled ``rmse``.

    Args:
        name: names the task.
        unit: of the values.
    """

    def valid_pixels(labels):
        return jnp.all(labels != IGNORE, axis=-1)

    def loss(outputs, labels):
        return _image_mean(jnp.mean(jnp.abs(outputs - labels), axis=-1), valid_pixels(labels))

    def squares(outputs, labels):
        return _image_sum(
            jnp.where(valid_pixels(labels), jnp.mean(jnp.square(outputs - labels), axis=-1), 0)
        )

    def counts(outputs, labels):
        del outputs
        return _image_sum(valid_pixels(labels)).astype(jnp.float32)

    rmse = root_mean_square(squares, counts, unit=unit)
    return Task(name, loss, {"rmse": rmse}, _mean_over_models)


# FMTL-Bench's weights of the tasks in a client's loss (released code), by domain.
LOSS_WEIGHTS = {
    "A": {"semseg": 1.0, "normals": 10.0, "edge": 50.0, "depth": 1.0},
    "B": {"semseg": 1.0, "human_parts": 2.0, "normals": 10.0, "edge": 50.0, "sal": 5.0},
}
"""Rooms (NYUD-v2's place) and figures outdoors (PASCAL-Context's)."""
