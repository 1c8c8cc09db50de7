"""Synthetic clients with tasks of their own: regressions of different scale, and conflicts."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from fedjax_mtl.core.checks import InputError
from fedjax_mtl.core.federation import Federation, Splits, make_federation
from fedjax_mtl.data.problem import PopulationSplits


def _rows(sizes: Sequence[int]) -> list[np.ndarray]:
    return np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])


def scaled_tasks(
    scales: Sequence[float] = (0.3, 1.0, 2.0, 4.0),
    *,
    num_clusters: int = 1,
    num_train: int | Sequence[int] = 800,
    num_test: int = 500,
    features: int = 32,
    targets: int = 8,
    seed: int = 0,
) -> Splits:
    """Draws related regressions whose labels differ in scale.

    They follow GradNorm's toy problem (Chen et al., arXiv 1711.02257, section 4). Task i is
    ``y = scale_i tanh(0.5 (B + E_i) x)`` in ``targets`` dimensions, with x standard normal; B
    (shared) and E_i (own) have variances 10 and 3.5 over the number of features. Client
    ``l * tasks + i`` has task i in cluster l. Labels are ``{"target", "variance"}``, where the
    variance is that of the task's test labels.

    Args:
        scales: one a task.
        num_clusters: repetitions of all tasks with data of their own.
        num_train: training examples of a client, or one number for each task.
        num_test: test examples of a client.
        features: values of an input.
        targets: values of a label.
        seed: of the draw.

    Raises:
        InputError: a scale that is 0, or the wrong number of sizes.
    """
    if not scales or min(map(abs, scales)) == 0:
        raise InputError(f"scales is {tuple(scales)}; give at least one, none of them 0")
    sizes = [num_train] * len(scales) if isinstance(num_train, int) else list(num_train)
    if len(sizes) != len(scales):
        raise InputError(f"num_train has {len(sizes)} sizes for {len(scales)} tasks")
    rng = np.random.default_rng(seed)
    common = rng.normal(0, np.sqrt(10.0 / features), (targets, features))
    own = rng.normal(0, np.sqrt(3.5 / features), (len(scales), targets, features))
    inputs, target, variance = [], [], []
    train_sizes: list[int] = []
    test_sizes: list[int] = []
    for part in ("train", "test"):
        for _ in range(num_clusters):
            for task, scale in enumerate(scales):
                count = sizes[task] if part == "train" else num_test
                x = rng.normal(size=(count, features))
                inputs.append(x)
                target.append(scale * np.tanh(0.5 * x @ (common + own[task]).T))
                (train_sizes if part == "train" else test_sizes).append(count)
    num_train_clients = len(train_sizes)
    for client in range(num_train_clients):
        variance.append(np.full(train_sizes[client], target[num_train_clients + client].var()))
    for client in range(num_train_clients):
        variance.append(np.full(test_sizes[client], target[num_train_clients + client].var()))
    examples = {
        "inputs": np.concatenate(inputs).astype(np.float32),
        "labels": {
            "target": np.concatenate(target).astype(np.float32),
            "variance": np.concatenate(variance).astype(np.float32),
        },
    }
    rows = _rows(train_sizes + test_sizes)
    train = make_federation(examples, rows[:num_train_clients])
    return Splits(train, make_federation(train.examples, rows[num_train_clients:]))


def conflicting_tasks(
    *,
    num_tasks: int = 8,
    num_train: int = 300,
    num_test: int = 1000,
    features: int = 32,
    outputs: int = 6,
    overlap: float = 0.2,
    seed: int = 0,
) -> PopulationSplits:
    """Draws tasks for one unified model that partly conflict, one client a task.

    The groups are ``regression`` and ``classification``. ``u = tanh(1.5 M_i x)`` with
    ``M_i = overlap B + (1 - overlap) E_i``, and ``t = 2 u Q_i``; even tasks regress t, odd ones
    classify its largest entry. Inputs are ``{"features", "head"}`` (head = task), labels of
    regression are ``{"target", "variance"}``.

    Args:
        num_tasks: at least 2, one of each kind.
        num_train: training examples of a client.
        num_test: test examples of a client.
        features: values of an input.
        outputs: values of t, and classes.
        overlap: the share of B in M_i.
        seed: of the draw.

    Raises:
        InputError: fewer than 2 tasks.
    """
    if num_tasks < 2:
        raise InputError(f"num_tasks is {num_tasks}; give at least 2, one of each kind")
    rng = np.random.default_rng(seed)

    def matrix(*shape: int, fan: int) -> np.ndarray:
        return rng.normal(0, 1 / np.sqrt(fan), shape)

    common = matrix(outputs, features, fan=features)
    made: dict[str, list[Any]] = {"regression": [], "classification": []}
    for task in range(num_tasks):
        mixing = overlap * common + (1 - overlap) * matrix(outputs, features, fan=features)
        rotation = matrix(outputs, outputs, fan=outputs)
        x = rng.normal(size=(num_train + num_test, features))
        t = 2 * np.tanh(1.5 * x @ mixing.T) @ rotation
        made["regression" if task % 2 == 0 else "classification"].append((task, x, t))
    splits = {name: _conflicting_group(name, clients, num_train) for name, clients in made.items()}
    return PopulationSplits(
        {n: s[0] for n, s in splits.items()}, {n: s[1] for n, s in splits.items()}
    )


def _conflicting_group(
    name: str, clients: list[Any], num_train: int
) -> tuple[Federation, Federation]:
    heads = np.concatenate([np.full(len(x), task, np.int32) for task, x, _ in clients])
    features = np.concatenate([x for _, x, _ in clients]).astype(np.float32)
    labels: Any
    if name == "classification":
        labels = np.concatenate([t.argmax(1) for _, _, t in clients]).astype(np.int32)
    else:
        variances = [np.full(len(t), t[num_train:].var(), np.float32) for _, _, t in clients]
        target = np.concatenate([t for _, _, t in clients]).astype(np.float32)
        labels = {"target": target, "variance": np.concatenate(variances)}
    own = _rows([len(x) for _, x, _ in clients])
    examples = {"inputs": {"features": features, "head": heads}, "labels": labels}
    train = make_federation(examples, [rows[:num_train] for rows in own])
    return train, make_federation(train.examples, [rows[num_train:] for rows in own])
