"""Average per-task improvement over a reference, the number by which multi-task methods are compared."""

from collections.abc import Sequence

import numpy as np


def average_improvement(
    values: Sequence[float],
    reference: Sequence[float],
    lower_is_better: Sequence[bool],
    weights: Sequence[float] | None = None,
) -> tuple[float, np.ndarray]:
    """Delta_m in percent, and each task's part of it: ``100 sum_t w_t (-1)^{l_t} (M_t - M_t^ref) / M_t^ref`` (FMTL-Bench, arXiv 2402.12876, equation 5).

    Args:
        values, reference: one metric a task. lower_is_better: by task. weights: default 1 / tasks.

    Raises:
        ValueError: different lengths, or a reference of 0.
    """
    values, reference = np.asarray(values, float), np.asarray(reference, float)
    signs = np.where(np.asarray(lower_is_better, bool), -1.0, 1.0)
    if not values.shape == reference.shape == signs.shape:
        raise ValueError(
            f"{len(values)} values, {len(reference)} references and {len(signs)} directions; give one of each a task"
        )
    if (reference == 0).any():
        raise ValueError(
            f"the reference of task {int(np.argmax(reference == 0))} is 0; its relative improvement is not defined"
        )
    shares = (
        np.full(len(values), 1 / len(values)) if weights is None else np.asarray(weights, float)
    )
    per_task = 100 * signs * (values - reference) / reference
    return float(shares @ per_task), per_task
