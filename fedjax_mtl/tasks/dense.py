"""Dense prediction: losses and metrics of segmentation, depth, surface normals, edges, saliency and pixel-wise regression.

As in FMTL-Bench (arXiv 2402.12876, sections on losses and metrics; released code where it says so). Labels are ``[batch, height, width, channels]`` with 255 where they are to be
ignored. A loss is the mean over an image's own valid pixels and every image weighs the same; the released code pools the pixels of a batch.
"""

import jax
import jax.numpy as jnp
import optax

from fedjax_mtl.core.task import PooledMetric, Task
from fedjax_mtl.tasks.classification import mix_binary, mix_classes
from fedjax_mtl.tasks.regression import root_mean_square

IGNORE = 255
SALIENCY_THRESHOLDS = tuple(round(0.05 * k, 2) for k in range(1, 20))
SALIENCY_BETA_SQUARED = 0.3
LARGEST_DEPTH = 80.0


def _image_sum(values: jax.Array) -> jax.Array:
    return jnp.sum(values.reshape(values.shape[0], -1), axis=1)


def _image_mean(values: jax.Array, valid: jax.Array) -> jax.Array:
    """Mean over each image's valid pixels, ``[batch, h, w] -> [batch]``; 0 for an image without any."""
    return _image_sum(jnp.where(valid, values, 0)) / jnp.maximum(_image_sum(valid), 1)


def _mean_over_models(outputs, weights):
    return jnp.tensordot(weights, outputs, 1)


def _unit(vectors: jax.Array) -> jax.Array:
    """Vectors of length 1 along the last axis; the gradient at 0 is finite."""
    squared = jnp.sum(jnp.square(vectors), axis=-1, keepdims=True)
    return vectors * jax.lax.rsqrt(jnp.maximum(squared, 1e-24))


def segmentation(name: str, num_classes: int) -> Task:
    """Semantic segmentation: outputs logits ``[batch, h, w, num_classes]``, labels class numbers ``[batch, h, w, 1]``.

    ``miou``: intersection over union of the pooled pixels of each class, plain mean over all classes; a class that never occurs counts as 0.
    """

    def loss(outputs, labels):
        target = labels[..., 0].astype(jnp.int32)
        valid = target != IGNORE
        target = jnp.where(valid, target, 0)
        return _image_mean(
            optax.losses.softmax_cross_entropy_with_integer_labels(outputs, target), valid
        )

    def statistics(outputs, labels):
        target = labels[..., 0].astype(jnp.int32)
        predicted = jnp.argmax(outputs, axis=-1)
        valid = target != IGNORE

        def per_class(c):
            said, true = valid & (predicted == c), valid & (target == c)
            return _image_sum(said & true), _image_sum(said | true)

        both, either = jax.vmap(per_class, out_axes=1)(jnp.arange(num_classes))
        return {"intersection": both, "union": either}

    def miou(totals):
        return jnp.mean(
            jnp.where(
                totals["union"] > 0, totals["intersection"] / jnp.maximum(totals["union"], 1), 0
            )
        )

    return Task(name, loss, {"miou": PooledMetric(statistics, miou)}, mix_classes)


def depth(name: str = "depth") -> Task:
    """Depth: outputs and labels ``[batch, h, w, 1]`` in metres; L1 loss, pooled ``rmse`` over pixels with 0 < label < 80.

    Missing depth must be marked 255 in the labels (0 enters the loss, as in the released code). Predictions are clamped at 0 for the metric.
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

    return Task(name, loss, {"rmse": root_mean_square(squares, counts)}, _mean_over_models)


def normals(name: str = "normals") -> Task:
    """Surface normals: outputs ``[batch, h, w, 3]``, normalised here, labels unit vectors or 255.

    Loss: L1 summed over the channels. ``angle_error``: mean angle in degrees over all valid pixels, ``2 atan2(||p - g||, ||p + g||)``.
    """

    def valid_pixels(labels):
        return jnp.all(labels != IGNORE, axis=-1)

    def loss(outputs, labels):
        return _image_mean(jnp.sum(jnp.abs(_unit(outputs) - labels), axis=-1), valid_pixels(labels))

    def statistics(outputs, labels):
        valid = valid_pixels(labels)
        predicted, true = _unit(outputs), _unit(labels)
        apart = jnp.linalg.norm(predicted - true, axis=-1)
        angles = jnp.degrees(2 * jnp.arctan2(apart, jnp.linalg.norm(predicted + true, axis=-1)))
        return {"sum": _image_sum(jnp.where(valid, angles, 0)), "count": _image_sum(valid)}

    metric = PooledMetric(statistics, lambda t: t["sum"] / jnp.maximum(t["count"], 1))
    return Task(name, loss, {"angle_error": metric}, _mean_over_models)


def edges(name: str = "edge", positive_weight: float = 0.95, fidelity: str = "paper") -> Task:
    """Edges: outputs one logit ``[batch, h, w, 1]``, labels in {0, 1} or 255; weighted binary cross entropy.

    ``pixel_loss`` is that loss pooled over pixels with weight 0.95; with ``fidelity="released"`` of the probability where the logit belongs, as the released meter does,
    which squeezes all values into a narrow band. Positive weight: the paper says 0.8 for NYUD, the released code 0.95 everywhere. For odsF see
    :mod:`fedjax_mtl.tasks.boundaries`.
    """
    if fidelity not in ("paper", "released"):
        raise ValueError(f"unknown fidelity {fidelity!r}; expected 'paper' or 'released'")

    def weighted(logits, labels, weight):
        return weight * labels * jax.nn.softplus(-logits) + (1 - weight) * (
            1 - labels
        ) * jax.nn.softplus(logits)

    def loss(outputs, labels):
        target = labels[..., 0]
        return _image_mean(weighted(outputs[..., 0], target, positive_weight), target != IGNORE)

    def statistics(outputs, labels):
        target, logits = labels[..., 0], outputs[..., 0]
        logits = jax.nn.sigmoid(logits) if fidelity == "released" else logits
        valid = target != IGNORE
        values = weighted(logits, target, 0.95)
        return {"sum": _image_sum(jnp.where(valid, values, 0)), "count": _image_sum(valid)}

    metric = PooledMetric(statistics, lambda t: t["sum"] / jnp.maximum(t["count"], 1))
    return Task(name, loss, {"pixel_loss": metric}, mix_binary)


def saliency(name: str = "sal", fidelity: str = "paper") -> Task:
    """Saliency: outputs two logits ``[batch, h, w, 2]``, labels in {0, 1} or 255.

    Loss: cross entropy whose class weights are ``(1 - f, f)``, f the share of the image's valid pixels that are not salient, divided by the pixel count.
    ``max_f``: F with beta^2 = 0.3 at the best of the thresholds 0.05, ..., 0.95 on pooled counts; ``max_iou``: likewise the mean IoU of both classes. The released FMTL-Bench meter applies
    another sigmoid to the probability (``fidelity="released"``).
    """
    if fidelity not in ("paper", "released"):
        raise ValueError(f"unknown fidelity {fidelity!r}; expected 'paper' or 'released'")

    def loss(outputs, labels):
        target = labels[..., 0]
        valid = target != IGNORE
        salient = valid & (target > 0.5)
        background = _image_mean(~salient, valid)[:, None, None]
        values = optax.losses.softmax_cross_entropy_with_integer_labels(
            outputs, salient.astype(jnp.int32)
        )
        return _image_mean(jnp.where(salient, background, 1 - background) * values, valid)

    def statistics(outputs, labels):
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

    def max_f(t):
        precision = t["hits"] / jnp.maximum(t["said"], 1)
        recall = t["hits"] / jnp.maximum(t["true"], 1)
        bottom = SALIENCY_BETA_SQUARED * precision + recall
        score = (1 + SALIENCY_BETA_SQUARED) * precision * recall / jnp.where(bottom > 0, bottom, 1)
        return jnp.max(score)

    def max_iou(t):
        salient = t["hits"] / jnp.maximum(t["said"] + t["true"] - t["hits"], 1)
        background = t["rejected"] / jnp.maximum(t["valid"] - t["hits"], 1)
        return jnp.max((salient + background) / 2)

    metrics = {
        "max_f": PooledMetric(statistics, max_f),
        "max_iou": PooledMetric(statistics, max_iou),
    }
    return Task(name, loss, metrics, mix_classes)


def pixel_regression(name: str) -> Task:
    """Any other map of real values: L1 loss and pooled ``rmse`` over pixels that are not 255; ``[batch, h, w, channels]``."""

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

    return Task(name, loss, {"rmse": root_mean_square(squares, counts)}, _mean_over_models)


# FMTL-Bench's weights of the tasks in a client's loss (released code), by domain.
LOSS_WEIGHTS = {
    "A": {"semseg": 1.0, "normals": 10.0, "edge": 50.0, "depth": 1.0},
    "B": {"semseg": 1.0, "human_parts": 2.0, "normals": 10.0, "edge": 50.0, "sal": 5.0},
}
"""Rooms (NYUD-v2's place) and figures outdoors (PASCAL-Context's)."""
