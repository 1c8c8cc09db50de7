"""The boundary F-score at the optimal data-set scale (odsF), on the host.

A stand-in for the MATLAB tool (SEISM) that the papers use: predictions are thinned by non-maximum
suppression, and matching within the tolerance is by distance transforms instead of one-to-one
assignment, which is more lenient for thick predictions.
"""

import numpy as np
from scipy import ndimage

THRESHOLDS = np.arange(0.02, 1.0, 0.02)


def thin(probability: np.ndarray) -> np.ndarray:
    """Keeps the pixels that are maximal across the edge, ``[h, w] -> [h, w]``; others become 0.

    Across is the direction, out of four, in which the blurred map curves down most.
    """
    dy, dx = np.gradient(ndimage.gaussian_filter(probability, 1.0))
    dyy, dyx = np.gradient(dy)
    dxx = np.gradient(dx, axis=1)
    middle = (dxx + dyy) / 2
    sector = np.argmin([dxx, middle + dyx, dyy, middle - dyx], axis=0)
    padded = np.pad(probability, 1)
    keep = np.zeros(probability.shape, bool)
    height, width = probability.shape
    for number, (y, x) in enumerate(((0, 1), (1, 1), (1, 0), (1, -1))):
        ahead = padded[1 + y : 1 + y + height, 1 + x : 1 + x + width]
        behind = padded[1 - y : 1 - y + height, 1 - x : 1 - x + width]
        keep |= (sector == number) & (probability >= ahead) & (probability >= behind)
    return np.where(keep, probability, 0)


def boundary_f(
    probabilities: np.ndarray, labels: np.ndarray, max_distance: float = 0.011, thinned: bool = True
) -> tuple[float, float]:
    """The best data-set F over thresholds, and the threshold.

    Args:
        probabilities: of an edge, ``[images, h, w]``.
        labels: ``[images, h, w]``, 0, 1, or 255 where to be ignored.
        max_distance: the tolerance as a share of the image diagonal: 0.011 on NYUD-v2, 0.0075 on
            PASCAL-Context.
        thinned: thin the predictions first.
    """
    hits = np.zeros((len(THRESHOLDS), 4))
    for probability, label in zip(probabilities, labels, strict=True):
        valid, true = label != 255, label == 1
        reach = max(1.0, max_distance * np.hypot(*label.shape))
        score = thin(probability) if thinned else probability
        near_truth = (
            ndimage.distance_transform_edt(~true) <= reach if true.any() else np.zeros_like(true)
        )
        for index, threshold in enumerate(THRESHOLDS):
            said = (score >= threshold) & valid
            near_said = (
                ndimage.distance_transform_edt(~said) <= reach
                if said.any()
                else np.zeros_like(said)
            )
            hits[index] += (
                (said & near_truth).sum(),
                said.sum(),
                (true & near_said).sum(),
                true.sum(),
            )
    precision, recall = (
        hits[:, 0] / np.maximum(hits[:, 1], 1),
        hits[:, 2] / np.maximum(hits[:, 3], 1),
    )
    score = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    best = int(np.argmax(score))
    return float(score[best]), float(THRESHOLDS[best])
