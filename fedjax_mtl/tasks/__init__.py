"""Tasks: per-example losses and metrics of (outputs, labels)."""

from fedjax_mtl.core.task import Description, Metric, Task, describe, example_losses
from fedjax_mtl.tasks import dense, dual, rouge
from fedjax_mtl.tasks._classification import (
    binary_classification,
    classification,
    sequence_classification,
)
from fedjax_mtl.tasks._joint import joint
from fedjax_mtl.tasks._regression import mean_squared_error, regression
from fedjax_mtl.tasks.improvement import average_improvement
from fedjax_mtl.tasks.language import language_modelling

__all__ = [
    "Description",
    "Metric",
    "Task",
    "average_improvement",
    "binary_classification",
    "classification",
    "dense",
    "describe",
    "dual",
    "example_losses",
    "joint",
    "language_modelling",
    "mean_squared_error",
    "regression",
    "rouge",
    "sequence_classification",
]
