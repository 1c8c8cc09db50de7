"""MOCHA as its released code does it, one coordinate after the other in numpy.

It is slow, and independent of the library.
"""

from collections.abc import Callable, Sequence

import numpy as np

RULES: dict[str, Callable[[float, float, float, float], float]] = {
    "hinge": lambda a, y, f, c: y * min(max(y * a + (1 - y * f) / c, 0.0), 1.0),
    "squared": lambda a, y, f, c: a + (y - f - a) / (1 + c),
}
"""The new dual variable, from the old one, the label, the score and the curvature."""

LOSSES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "hinge": lambda z, y: np.maximum(0, 1 - y * z),
    "squared": lambda z, y: (z - y) ** 2 / 2,
}
"""From scores and labels."""

CONJUGATES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "hinge": lambda a, y: -a * y,
    "squared": lambda a, y: a**2 / 2 - a * y,
}
"""Of the losses, from dual variables and labels."""


class Twin:
    """The W step for a fixed Sigma."""

    def __init__(
        self,
        loss: str,
        inputs: Sequence[np.ndarray],
        labels: Sequence[np.ndarray],
        covariance: np.ndarray,
        penalty: float,
    ) -> None:
        """Starts from zero.

        Args:
            loss: ``hinge`` or ``squared``.
            inputs: of each task, ``[examples, features]``.
            labels: of each task, ``[examples]``.
            covariance: Sigma, ``[tasks, tasks]``.
            penalty: of the regulariser.
        """
        self.rule, self.loss, self.conjugate = RULES[loss], LOSSES[loss], CONJUGATES[loss]
        self.inputs, self.labels = inputs, labels
        self.covariance, self.penalty = covariance, penalty
        self.num_tasks, self.features = len(inputs), inputs[0].shape[1]
        self.alpha = [np.zeros(len(y)) for y in labels]
        self.weights = np.zeros((self.num_tasks, self.features))
        self.sigma_prime = (np.abs(covariance).sum(1) / np.diag(covariance)).max()

    def round(self, steps: Sequence[int] | np.ndarray) -> None:
        """One federated round.

        Args:
            steps: how many coordinates of each task are visited, in storage order, ``[tasks]``.
        """
        sums = np.stack([self._local_work(task, count) for task, count in enumerate(steps)])
        self.weights += self.covariance @ sums / self.penalty

    def _local_work(self, task: int, steps: int) -> np.ndarray:
        """Moves a task's dual variables; returns what it sends, ``[features]``."""
        own, n = self.covariance[task, task], len(self.labels[task])
        moved, total = np.zeros(self.features), np.zeros(self.features)
        for k in range(steps):
            i = k % n
            x, y = self.inputs[task][i], self.labels[task][i]
            score = x @ (self.weights[task] + self.sigma_prime * moved)
            curvature = self.sigma_prime * own * (x @ x) / (self.penalty * n)
            new = self.rule(self.alpha[task][i], y, score, curvature)
            change = new - self.alpha[task][i]
            moved += own * change * x / (self.penalty * n)
            total += change * x / n
            self.alpha[task][i] = new
        return total

    def objective(self) -> tuple[float, float]:
        """The primal and the dual value."""
        precision = np.linalg.inv(self.covariance)
        regulariser = self.penalty / 2 * np.sum(self.weights * (precision @ self.weights))
        primal = sum(
            self.loss(x @ w, y).mean()
            for x, y, w in zip(self.inputs, self.labels, self.weights, strict=True)
        )
        dual = -sum(
            self.conjugate(a, y).mean() for a, y in zip(self.alpha, self.labels, strict=True)
        )
        return primal + regulariser, dual - regulariser
