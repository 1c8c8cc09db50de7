"""Losses of one score with their convex conjugates, for methods in the dual (MOCHA and its kin)."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import xlogy

from fedjax_mtl.core.checks import InputError
from fedjax_mtl.core.task import SHARE, Metric, Task
from fedjax_mtl.tasks._regression import root_mean_square

_MOST_REFINEMENTS = 100


class DualLoss(NamedTuple):
    """A convex loss of a score z and a label y; every function works elementwise.

    Attributes:
        name: names it in tasks and messages.
        loss: ``(z, y) -> loss``.
        conjugate: ``(alpha, y) -> conj(-alpha)``, the convex conjugate in the score at minus the
            dual variable. It is finite only in the loss's domain, which :attr:`ascend` never
            leaves.
        ascend: ``(alpha, y, f, c) -> new alpha``, the exact maximiser of one coordinate of the
            dual, where f is the current score of the example and c > 0 the curvature.
        labels: ``signs`` (-1 and 1) or ``real``.
    """

    name: str
    loss: Callable[[jax.Array, jax.Array], jax.Array]
    conjugate: Callable[[jax.Array, jax.Array], jax.Array]
    ascend: Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]
    labels: str


def hinge() -> DualLoss:
    """``max(0, 1 - y z)``; ``0 <= alpha y <= 1``. MOCHA's experiments use it (arXiv 1705.10467)."""

    def ascend(alpha, y, f, c):
        return y * jnp.clip(y * alpha + (1 - y * f) / c, 0, 1)

    return DualLoss(
        "hinge",
        lambda z, y: jnp.maximum(0, 1 - y * z),
        lambda alpha, y: -alpha * y,
        ascend,
        "signs",
    )


def smoothed_hinge(smoothing: float = 1.0) -> DualLoss:
    """The hinge with a quadratic corner of width ``smoothing``; ``0 <= alpha y <= 1``.

    See Shalev-Shwartz and Zhang, JMLR 2013.

    Raises:
        InputError: a width that is not positive.
    """
    if smoothing <= 0:
        raise InputError(f"smoothing is {smoothing}; give a positive width, or use hinge()")

    def loss(z, y):
        margin = 1 - y * z
        corner = jnp.square(margin) / (2 * smoothing)
        return jnp.where(
            margin <= 0, 0, jnp.where(margin >= smoothing, margin - smoothing / 2, corner)
        )

    def conjugate(alpha, y):
        return -alpha * y + smoothing * jnp.square(alpha) / 2

    def ascend(alpha, y, f, c):
        return y * jnp.clip(y * alpha + (1 - y * f - smoothing * y * alpha) / (c + smoothing), 0, 1)

    return DualLoss("smoothed_hinge", loss, conjugate, ascend, "signs")


def squared() -> DualLoss:
    """``(z - y)^2 / 2``; any alpha."""

    def ascend(alpha, y, f, c):
        return alpha + (y - f - alpha) / (1 + c)

    return DualLoss(
        "squared",
        lambda z, y: jnp.square(z - y) / 2,
        lambda alpha, y: jnp.square(alpha) / 2 - alpha * y,
        ascend,
        "real",
    )


def logistic() -> DualLoss:
    """``log(1 + exp(-y z))``; ``0 <= alpha y <= 1``.

    A coordinate's maximiser has no closed form: with ``a = alpha y = sigmoid(s)`` it solves
    ``s + y f + c (sigmoid(s) - a_old) = 0``, which increases in s, by Newton steps that are
    safeguarded by bisection.
    """

    def conjugate(alpha, y):
        a = alpha * y
        return xlogy(a, a) + xlogy(1 - a, 1 - a)

    def ascend(alpha, y, f, c):
        old = y * alpha

        def refine(carry):
            count, low, high, s, step = carry
            a = jax.nn.sigmoid(s)
            value = s + y * f + c * (a - old)
            low, high = jnp.where(value < 0, s, low), jnp.where(value < 0, high, s)
            newton = value / (1 + c * a * (1 - a))
            # Between its flat ends and its steep middle the function sends plain Newton steps to
            # and fro; halving ends that.
            good = (s - newton > low) & (s - newton < high) & (2 * jnp.abs(newton) <= jnp.abs(step))
            moved = jnp.where(good, s - newton, (low + high) / 2)
            return count + 1, low, high, moved, moved - s

        def unfinished(carry):
            count, _, _, s, step = carry
            precise = jnp.abs(step) <= jnp.finfo(s.dtype).eps * (1 + jnp.abs(s))
            return (count < _MOST_REFINEMENTS) & jnp.any(~precise)

        # Beyond these scores a sigmoid is 0 or 1 in the precision at hand.
        far = -2 * jnp.log(jnp.finfo(f.dtype).tiny)
        low = jnp.clip(-y * f - c * (1 - old), -far, far)
        high = jnp.clip(-y * f + c * old, -far, far)
        start = (jnp.zeros((), jnp.int32), low, high, (low + high) / 2, high - low + 1)
        return y * jax.nn.sigmoid(jax.lax.while_loop(unfinished, refine, start)[3])

    return DualLoss("logistic", lambda z, y: jnp.logaddexp(0, -y * z), conjugate, ascend, "signs")


def dual_task(loss: DualLoss, name: str | None = None) -> Task:
    """The task of judging scores by a dual loss: outputs ``[batch]``, labels ``[batch]``.

    With labels of sign the metrics are ``accuracy`` and ``error``, where a score of 0 is wrong as
    in MOCHA's released code; with real labels ``rmse`` over all examples.

    Args:
        loss: judges the scores, and says of which kind the labels are.
        name: names the task; default: the loss's name.
    """

    def right(outputs, labels):
        return (jnp.sign(outputs) == labels).astype(jnp.float32)

    def wrong(outputs, labels):
        return 1 - right(outputs, labels)

    def mix(outputs, weights):
        return jnp.tensordot(weights, outputs, 1)

    metrics = {"rmse": root_mean_square(lambda z, y: jnp.square(z - y))}
    if loss.labels == "signs":
        metrics = {
            "accuracy": Metric(right, higher_is_better=True, unit=SHARE, primary=True),
            "error": Metric(wrong, higher_is_better=False, unit=SHARE),
        }
    return Task(name or loss.name, loss.loss, metrics, mix)
