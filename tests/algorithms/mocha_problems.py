"""Related tasks for MOCHA's tests, and the reference's data where the user has them."""

import os
import pathlib

import numpy as np
import pytest

from fedjax_mtl import make_federation


def federate(inputs, labels, capacity=None):
    """Puts lists of ``[n_t, features]`` and ``[n_t]`` into a Federation, in their own precision."""
    sizes = [len(y) for y in labels]
    rows = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
    examples = {"inputs": np.concatenate(inputs), "labels": np.concatenate(labels)}
    return make_federation(examples, rows, capacity)


def related_tasks(num_tasks=6, features=4, seed=0, regression=False, low=5, high=12):
    """Tasks whose models scatter around two centres; lists of inputs and labels."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(2, features))
    inputs, labels = [], []
    for task in range(num_tasks):
        n = int(rng.integers(low, high))
        x = rng.normal(size=(n, features))
        z = x @ (centres[task % 2] + 0.3 * rng.normal(size=features)) + 0.3 * rng.normal(size=n)
        inputs.append(x)
        labels.append(z if regression else np.where(z > 0, 1.0, -1.0))
    return inputs, labels


def reference_data(name):
    """``NAME.npz`` of the folder that the environment variable FEDJAX_MTL_DATA names.

    Without that file the test is skipped.
    """
    folder = os.environ.get("FEDJAX_MTL_DATA")
    if not folder or not (pathlib.Path(folder) / f"{name}.npz").exists():
        pytest.skip(
            f"needs {name}.npz in the folder that FEDJAX_MTL_DATA names "
            "(research data, not redistributed here)"
        )
    return np.load(pathlib.Path(folder) / f"{name}.npz")


def every_fourth_is_test(data, inputs=None):
    """The training and the test Federation of a table.

    Inside each task every fourth example is a test example.
    """
    inputs = data["X"].astype(float) if inputs is None else inputs
    ends = np.cumsum(data["task_sizes"])
    tasks = np.split(np.arange(len(inputs)), ends[:-1])
    examples = {"inputs": inputs, "labels": data["y"].astype(float)}
    fourth = [np.arange(1, len(rows) + 1) % 4 == 0 for rows in tasks]
    return tuple(
        make_federation(
            examples, [rows[pick == test] for rows, pick in zip(tasks, fourth, strict=True)]
        )
        for test in (False, True)
    )
