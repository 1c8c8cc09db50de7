"""Tasks: per-example losses and metrics of (outputs, labels)."""

from fedjax_mtl.core.task import PooledMetric, Task, example_losses, lower_is_better
from fedjax_mtl.tasks import dense, dual, rouge
from fedjax_mtl.tasks.classification import (
    binary_classification,
    classification,
    sequence_classification,
)
from fedjax_mtl.tasks.improvement import average_improvement
from fedjax_mtl.tasks.joint import joint
from fedjax_mtl.tasks.language import language_modelling
from fedjax_mtl.tasks.regression import mean_squared_error, regression

__all__ = [
    "PooledMetric",
    "Task",
    "average_improvement",
    "binary_classification",
    "classification",
    "dense",
    "dual",
    "example_losses",
    "joint",
    "language_modelling",
    "lower_is_better",
    "mean_squared_error",
    "regression",
    "rouge",
    "sequence_classification",
]
