"""Problems of clients with different tasks: of different scale, in conflict, on scenes."""

import numpy as np

from fedjax_mtl import tasks
from fedjax_mtl.core.checks import InputError
from fedjax_mtl.core.federation import Splits, make_federation
from fedjax_mtl.core.task import Task
from fedjax_mtl.data.problem import Problem, ProblemGroup, one_group
from fedjax_mtl.data.synthetic_tasks import conflicting_tasks, scaled_tasks


def scaled_tasks_problem(
    *,
    scales: tuple[float, ...] = (0.3, 1.0, 2.0, 4.0),
    num_clusters: int = 1,
    num_train: int = 800,
    last_train: int | None = None,
    num_test: int = 500,
    seed: int = 0,
) -> Problem:
    """Related regressions whose labels differ in scale, after GradNorm's toy problem.

    Args:
        scales: of the labels, one for each task.
        num_clusters: how many clients have each task.
        num_train: training examples of a client.
        last_train: those of the last task's clients; default as many as the others.
        num_test: test examples of a client.
        seed: of the draw.
    """
    sizes = [num_train] * (len(scales) - 1) + [num_train if last_train is None else last_train]
    splits = scaled_tasks(
        scales, num_clusters=num_clusters, num_train=sizes, num_test=num_test, seed=seed
    )
    return one_group(ProblemGroup(splits, tasks.mean_squared_error(), (32,), 8))


def conflicting_tasks_problem(
    *,
    num_tasks: int = 8,
    num_train: int = 300,
    num_test: int = 1000,
    overlap: float = 0.2,
    seed: int = 0,
) -> Problem:
    """Regressions and classifications that partly conflict, for one model with a head a task.

    Args:
        num_tasks: as for :func:`fedjax_mtl.data.conflicting_tasks`.
        num_train: as for :func:`fedjax_mtl.data.conflicting_tasks`.
        num_test: as for :func:`fedjax_mtl.data.conflicting_tasks`.
        overlap: as for :func:`fedjax_mtl.data.conflicting_tasks`.
        seed: as for :func:`fedjax_mtl.data.conflicting_tasks`.
    """
    made = conflicting_tasks(
        num_tasks=num_tasks, num_train=num_train, num_test=num_test, overlap=overlap, seed=seed
    )
    kinds = {
        "regression": tasks.mean_squared_error(primary="rmse"),
        "classification": tasks.classification(),
    }
    return Problem(
        {
            name: ProblemGroup(
                Splits(made.train[name], made.test[name]), task, (32,), 6, num_heads=num_tasks
            )
            for name, task in kinds.items()
        }
    )


def dense_task(name: str, domain: str, edge_weight: float = 0.95) -> tuple[Task, int]:
    """A task of the rendered scenes, and its output channels.

    Args:
        name: ``semseg``, ``human_parts``, ``normals``, ``edge``, ``sal`` or ``depth``.
        domain: ``A`` or ``B``.
        edge_weight: of edge pixels in the loss.

    Raises:
        InputError: a task that the domain does not have.
    """
    from fedjax_mtl.data import rendered

    if name not in rendered.TASKS[domain]:
        known = ", ".join(rendered.TASKS[domain])
        raise InputError(
            f"unknown task {name!r} in config.data.tasks_{domain.lower()}; expected one of {known}"
        )
    dense = tasks.dense
    classes, parts = rendered.NUM_SEMSEG[domain], rendered.NUM_PARTS
    return {
        "semseg": lambda: (dense.segmentation("semseg", classes), classes),
        "human_parts": lambda: (dense.segmentation("human_parts", parts), parts),
        "normals": lambda: (dense.normals(), 3),
        "edge": lambda: (dense.edges(positive_weight=edge_weight), 1),
        "sal": lambda: (dense.saliency(), 2),
        "depth": lambda: (dense.depth(), 1),
    }[name]()


def scenes_problem(
    *,
    data_dir: str | None = None,
    size: str = "tiny",
    profile: str = "small",
    domains: tuple[str, ...] = ("A", "B"),
    tasks_a: tuple[str, ...] = ("semseg", "normals", "edge", "depth"),
    tasks_b: tuple[str, ...] = ("semseg", "human_parts", "normals", "edge"),
    single_task: bool = True,
    clients_per_group: int = 1,
    train_fraction: float = 1.0,
    edge_weight: float = 0.95,
    seed: int = 0,
) -> Problem:
    """Rendered scenes: rooms (domain A) and figures outdoors (domain B).

    The training images of a domain are dealt evenly to all its clients; everybody is judged on the
    domain's whole test set.

    Args:
        data_dir: where scenes are kept once they are rendered; default as in TFDS.
        size: as for :func:`fedjax_mtl.data.scenes.load_scenes`.
        profile: as for :func:`fedjax_mtl.data.scenes.load_scenes`.
        domains: which there are.
        tasks_a: of domain A.
        tasks_b: of domain B.
        single_task: a group for each task; otherwise one for each domain, with all its tasks.
        clients_per_group: clients of each group.
        train_fraction: share of the training images that is used.
        edge_weight: of edge pixels in the loss: FMTL-Bench's code has 0.95 everywhere, its paper
            0.8 for rooms.
        seed: of the deal.

    Raises:
        InputError: a task that a domain does not have, or a share that is out of range.
    """
    if not 0 < train_fraction <= 1:
        raise InputError(f"train_fraction is {train_fraction}; give a share in (0, 1]")
    rng = np.random.default_rng(seed)
    groups: dict[str, ProblemGroup] = {}
    for domain in domains:
        names = {"A": tasks_a, "B": tasks_b}[domain]
        sets = [(name,) for name in names] if single_task else [tuple(names)]
        built = {name: dense_task(name, domain, edge_weight) for name in names}
        images = _load_domain(domain, size, profile, data_dir)
        chosen = rng.permutation(images.num_train)
        chosen = chosen[: int(round(train_fraction * images.num_train))]
        dealt = np.array_split(chosen, len(sets) * clients_per_group)
        for index, own in enumerate(sets):
            name = f"{domain}_{own[0]}" if single_task else domain
            rows = dealt[index * clients_per_group : (index + 1) * clients_per_group]
            groups[name] = images.group(domain, rows, {task: built[task] for task in own})
    return Problem(groups)


class _Images:
    """The images and labels of a domain, those to train on first."""

    def __init__(self, parts: dict[str, dict[str, np.ndarray]]):
        self.num_train = len(parts["train"]["image"])
        self._num_test = len(parts["test"]["image"])
        self._values = {
            name: np.concatenate([parts["train"][name], parts["test"][name]])
            for name in parts["train"]
        }

    def group(
        self, domain: str, rows: list[np.ndarray], own: dict[str, tuple[Task, int]]
    ) -> ProblemGroup:
        """Clients who own these training images and have these tasks, with their channels."""
        inputs = self._values["image"] / np.float32(127.5) - 1
        labels = {name: self._values[name] for name in own}
        train = make_federation({"inputs": inputs, "labels": labels}, rows)
        everything = self.num_train + np.arange(self._num_test)
        test = make_federation(train.examples, [everything] * len(rows))
        weights = tasks.dense.LOSS_WEIGHTS[domain]
        return ProblemGroup(
            Splits(train, test),
            tasks.joint({name: (task, weights[name]) for name, (task, _) in own.items()}),
            inputs.shape[1:],
            {name: channels for name, (_, channels) in own.items()},
        )


def _load_domain(domain: str, size: str, profile: str, data_dir: str | None) -> _Images:
    from fedjax_mtl.data.scenes import load_scenes

    return _Images(load_scenes(domain, size=size, profile=profile, data_dir=data_dir))
