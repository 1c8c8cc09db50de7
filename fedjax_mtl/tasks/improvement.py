"""Average per-task improvement over a reference, by which multi-task methods are compared."""

from collections.abc import Sequence

import numpy as np

from fedjax_mtl.core.checks import InputError


def average_improvement(
    values: Sequence[float],
    reference: Sequence[float],
    higher_is_better: Sequence[bool],
    weights: Sequence[float] | None = None,
) -> tuple[float, np.ndarray]:
    """Delta_m in percent, and each task's part of it.

    It is ``100 sum_t w_t (-1)^{l_t} (M_t - M_t^ref) / M_t^ref``, where l_t is 1 if lower is better
    (FMTL-Bench, arXiv 2402.12876, equation 5).

    Args:
        values: one metric a task.
        reference: the same metrics of the method that is compared with.
        higher_is_better: the direction of each task's metric.
        weights: of the tasks in the sum; default 1 / tasks.

    Raises:
        InputError: different lengths, or a reference of 0.
    """
    own, base = np.asarray(values, float), np.asarray(reference, float)
    signs = np.where(np.asarray(higher_is_better, bool), 1.0, -1.0)
    if not own.shape == base.shape == signs.shape:
        raise InputError(
            f"{len(values)} values, {len(reference)} references and {len(signs)} directions; "
            "give one of each a task"
        )
    if (base == 0).any():
        raise InputError(
            f"the reference of task {int(np.argmax(base == 0))} is 0; "
            "its relative improvement is not defined"
        )
    shares = np.full(len(own), 1 / len(own)) if weights is None else np.asarray(weights, float)
    per_task = 100 * signs * (own - base) / base
    return float(shares @ per_task), per_task
