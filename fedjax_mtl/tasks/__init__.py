"""Tasks: per-example losses and metrics of (outputs, labels)."""

from fedjax_mtl.tasks.base import Task, example_losses
from fedjax_mtl.tasks.classification import (
    binary_classification,
    classification,
    sequence_classification,
)
from fedjax_mtl.tasks.regression import regression

__all__ = [
    "Task",
    "binary_classification",
    "classification",
    "example_losses",
    "regression",
    "sequence_classification",
]
