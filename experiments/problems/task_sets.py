"""Clients with different tasks: synthetic ones of different scale or in conflict, and rendered scenes."""

from collections.abc import Callable
from typing import Any

import numpy as np

from experiments.problems.base import PopulationProblem, Problem
from fedjax_mtl import Task, data, make_federation, tasks


def scaled_tasks(
    *,
    scales: tuple[float, ...],
    num_clusters: int,
    num_train: int,
    last_train: int,
    num_test: int,
    seed: int,
) -> Problem:
    """Related regressions whose labels differ in scale; the last task has ``last_train`` examples (0: as many as the others)."""
    sizes = [num_train] * (len(scales) - 1) + [last_train or num_train]
    splits = data.scaled_tasks(
        scales, num_clusters=num_clusters, num_train=sizes, num_test=num_test, seed=seed
    )
    return Problem(splits, tasks.mean_squared_error(), (32,), 8)


def conflicting_tasks(
    *, num_tasks: int, num_train: int, num_test: int, overlap: float, seed: int
) -> PopulationProblem:
    """Regressions and classifications that partly conflict, for one unified model with a head a task."""
    splits = data.conflicting_tasks(
        num_tasks=num_tasks, num_train=num_train, num_test=num_test, overlap=overlap, seed=seed
    )
    kinds = {"regression": tasks.mean_squared_error(), "classification": tasks.classification()}
    return PopulationProblem(splits, kinds, (32,), {name: {"heads": num_tasks} for name in kinds})


def _dense_task(name: str, domain: str, edge_weight: float) -> tuple[Task, int]:
    """A task of the rendered scenes and its output channels."""
    from fedjax_mtl.data import rendered

    if name not in rendered.TASKS[domain]:
        known = ", ".join(rendered.TASKS[domain])
        raise ValueError(
            f"unknown task {name!r} in config.data.tasks_{domain.lower()}; expected one of {known}"
        )

    dense = tasks.dense
    return {
        "semseg": lambda: (
            dense.segmentation("semseg", rendered.NUM_SEMSEG[domain]),
            rendered.NUM_SEMSEG[domain],
        ),
        "human_parts": lambda: (
            dense.segmentation("human_parts", rendered.NUM_PARTS),
            rendered.NUM_PARTS,
        ),
        "normals": lambda: (dense.normals(), 3),
        "edge": lambda: (dense.edges(positive_weight=edge_weight), 1),
        "sal": lambda: (dense.saliency(), 2),
        "depth": lambda: (dense.depth(), 1),
    }[name]()


def scenes(
    *,
    data_dir: str,
    size: str,
    profile: str,
    domains: tuple[str, ...],
    tasks_a: tuple[str, ...],
    tasks_b: tuple[str, ...],
    single_task: bool,
    clients_per_group: int,
    train_fraction: float,
    edge_weight: float,
    seed: int,
) -> PopulationProblem:
    """Rendered scenes: in each domain a group a task (``single_task``), or one group with all the domain's tasks.

    The training images of a domain are dealt evenly to all its clients; everybody is judged on the domain's whole test set.
    ``edge_weight`` is that of edge pixels in the loss: FMTL-Bench's code has 0.95 everywhere, its paper 0.8 for rooms.
    """
    from fedjax_mtl.data.scenes import load_scenes

    if not 0 < train_fraction <= 1:
        raise ValueError(f"config.data.train_fraction is {train_fraction}; give a share in (0, 1]")
    rng = np.random.default_rng(seed)
    train, test, group_tasks, outputs, shape = {}, {}, {}, {}, None
    for domain in domains:
        made = load_scenes(domain, size=size, profile=profile, data_dir=data_dir or None)
        labels = {"A": tasks_a, "B": tasks_b}[domain]
        built = {name: _dense_task(name, domain, edge_weight) for name in labels}
        sets = [(name,) for name in labels] if single_task else [labels]
        num_train, num_test = len(made["train"]["image"]), len(made["test"]["image"])
        chosen = rng.permutation(num_train)[: int(round(train_fraction * num_train))]
        dealt = np.array_split(chosen, len(sets) * clients_per_group)
        for index, names in enumerate(sets):
            group = f"{domain}_{names[0]}" if single_task else domain
            examples = {
                "inputs": np.concatenate([made[s]["image"] for s in ("train", "test")])
                / np.float32(127.5)
                - 1,
                "labels": {
                    n: np.concatenate([made[s][n] for s in ("train", "test")]) for n in names
                },
            }
            own = dealt[index * clients_per_group : (index + 1) * clients_per_group]
            train[group] = make_federation(examples, own)
            everything = num_train + np.arange(num_test)
            test[group] = make_federation(train[group].examples, [everything] * clients_per_group)
            weights = tasks.dense.LOSS_WEIGHTS[domain]
            group_tasks[group] = tasks.joint({n: (built[n][0], weights[n]) for n in names})
            outputs[group] = {n: built[n][1] for n in names}
            shape = examples["inputs"].shape[1:]
    return PopulationProblem(data.PopulationSplits(train, test), group_tasks, shape, outputs)


DATASETS: dict[str, Callable[..., Any]] = {
    "conflicting_tasks": conflicting_tasks,
    "scaled_tasks": scaled_tasks,
    "scenes": scenes,
}
