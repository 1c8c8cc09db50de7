"""MOCHA as its released code does it, one coordinate after the other in numpy: slow, and independent of the library."""

import numpy as np

RULES = {
    "hinge": lambda a, y, f, c: y * min(max(y * a + (1 - y * f) / c, 0.0), 1.0),
    "squared": lambda a, y, f, c: a + (y - f - a) / (1 + c),
}
LOSSES = {
    "hinge": lambda z, y: np.maximum(0, 1 - y * z),
    "squared": lambda z, y: (z - y) ** 2 / 2,
}
CONJUGATES = {"hinge": lambda a, y: -a * y, "squared": lambda a, y: a**2 / 2 - a * y}


class Twin:
    """The W step for a fixed Sigma."""

    def __init__(self, loss, inputs, labels, covariance, penalty):
        self.rule, self.loss, self.conjugate = RULES[loss], LOSSES[loss], CONJUGATES[loss]
        self.inputs, self.labels, self.covariance, self.penalty = (
            inputs,
            labels,
            covariance,
            penalty,
        )
        self.num_tasks, self.features = len(inputs), inputs[0].shape[1]
        self.alpha = [np.zeros(len(y)) for y in labels]
        self.weights = np.zeros((self.num_tasks, self.features))
        self.sigma_prime = (np.abs(covariance).sum(1) / np.diag(covariance)).max()

    def round(self, steps):
        """One federated round, ``steps[t]`` coordinates of task t in storage order."""
        sums = np.zeros_like(self.weights)
        for t in range(self.num_tasks):
            own, n = self.covariance[t, t], len(self.labels[t])
            moved = np.zeros(self.features)
            for k in range(steps[t]):
                i = k % n
                x, y = self.inputs[t][i], self.labels[t][i]
                score = x @ (self.weights[t] + self.sigma_prime * moved)
                curvature = self.sigma_prime * own * (x @ x) / (self.penalty * n)
                new = self.rule(self.alpha[t][i], y, score, curvature)
                change = new - self.alpha[t][i]
                moved += own * change * x / (self.penalty * n)
                sums[t] += change * x / n
                self.alpha[t][i] = new
        self.weights += self.covariance @ sums / self.penalty

    def objective(self):
        """Primal and dual value."""
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
