"""Multi-task data in one table: School, Landmine, Human Activity, and synthetic related tasks.

The real ones come from files the user has. A task is a client. Splits are random inside each task,
as in MOCHA's experiments (arXiv 1705.10467, section 5).
"""

import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fedjax_mtl.core.checks import InputError
from fedjax_mtl.core.federation import Splits, make_federation

Path = str | pathlib.Path


class TaskTable(NamedTuple):
    """Examples of all tasks.

    Attributes:
        inputs: ``[n, features]``.
        labels: ``[n]``.
        rows: the rows of each task.
    """

    inputs: np.ndarray
    labels: np.ndarray
    rows: list[np.ndarray]


def _table(inputs: np.ndarray, labels: np.ndarray, sizes: Sequence[int] | np.ndarray) -> TaskTable:
    ends = np.cumsum(sizes)
    return TaskTable(
        np.asarray(inputs, float),
        np.asarray(labels, float).reshape(-1),
        np.split(np.arange(ends[-1]), ends[:-1]),
    )


def load_task_table(path: Path) -> TaskTable:
    """Reads tasks from a file.

    An ``.npz`` file has arrays ``X [n, features]``, ``y [n]`` and ``task_sizes [tasks]``, tasks one
    after the other. A ``.mat`` file has cells of one matrix a task, ``X`` and ``Y`` (School, as
    MALSAR ships it) or ``feature`` and ``label`` (Landmine, as LandmineData.mat). Classification
    labels 0 and 1 become -1 and 1.

    Raises:
        FileNotFoundError: no such file.
        InputError: another kind of file, or fields that are missing or do not fit together.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist; name a .npz with X, y and task_sizes, or a .mat with cells X "
            "and Y or feature and label"
        )
    if path.suffix == ".npz":
        with np.load(path) as stored:
            missing = sorted({"X", "y", "task_sizes"} - set(stored))
            if missing:
                raise InputError(
                    f"{path} has no array {missing[0]!r}; it needs X, y and task_sizes"
                )
            table = stored["X"], stored["y"], stored["task_sizes"]
        if not len(table[0]) == len(table[1]) == table[2].sum():
            raise InputError(
                f"{path} has {len(table[0])} rows of X, {len(table[1])} of y and task_sizes that "
                f"sum to {table[2].sum()}; all three must agree"
            )
        table = _table(*table)
    elif path.suffix == ".mat":
        table = _from_cells(path)
    else:
        raise InputError(f"{path} is neither .npz nor .mat")
    if set(np.unique(table.labels)) == {0.0, 1.0}:
        table = table._replace(labels=2 * table.labels - 1)
    return table


def _from_cells(path: pathlib.Path) -> TaskTable:
    import scipy.io

    stored = scipy.io.loadmat(path)
    for names in (("X", "Y"), ("feature", "label")):
        if all(name in stored for name in names):
            inputs, labels = (list(np.ravel(stored[name])) for name in names)
            return _table(
                np.concatenate(inputs),
                np.concatenate([np.ravel(y) for y in labels]),
                [len(x) for x in inputs],
            )
    raise InputError(
        f"{path} has fields {sorted(k for k in stored if not k.startswith('__'))}; it needs cells "
        "X and Y, or feature and label"
    )


def load_human_activity(directory: Path, positive: int = 4) -> TaskTable:
    """Reads the UCI smartphone recordings, a task for each person.

    It reads ``{train,test}/X_*.txt`` (561 columns), ``y_*.txt`` (1..6) and ``subject_*.txt``
    (1..30) of the unpacked archive.

    Args:
        directory: of the unpacked archive.
        positive: the activity that is told from all others; the default 4 is sitting.

    Raises:
        FileNotFoundError: a file that is not there.
    """
    directory = pathlib.Path(directory)
    parts: dict[str, list[np.ndarray]] = {"X": [], "y": [], "subject": []}
    for part in ("train", "test"):
        for name, arrays in parts.items():
            file = directory / part / f"{name}_{part}.txt"
            if not file.exists():
                raise FileNotFoundError(
                    f"{file} does not exist; name the folder of the unpacked UCI HAR Dataset"
                )
            arrays.append(np.loadtxt(file))
    inputs, activity, subject = (np.concatenate(parts[name]) for name in ("X", "y", "subject"))
    order = np.argsort(subject, kind="stable")
    sizes = np.unique(subject, return_counts=True)[1]
    return _table(inputs[order], np.where(activity[order] == positive, 1.0, -1.0), sizes)


def related_tasks(
    *,
    num_tasks: int = 30,
    features: int = 20,
    num_clusters: int = 3,
    spread: float = 0.5,
    smallest: int = 20,
    largest: int = 120,
    noise: float = 0.1,
    regression: bool = False,
    seed: int = 0,
) -> TaskTable:
    """Draws linear tasks whose models lie in clusters.

    The models are ``w_t = centre + spread * own``, both standard normal. Inputs are standard
    normal. Sizes are log-uniform in ``[smallest, largest]``.

    Args:
        num_tasks: how many tasks.
        features: values of an input.
        num_clusters: how many clusters of tasks.
        spread: how far a task is from its cluster's centre.
        smallest: the fewest examples of a task.
        largest: the most examples of a task.
        noise: relative size of the Gaussian noise on the score.
        regression: labels are the noisy score itself, not its sign.
        seed: of the draw.

    Raises:
        InputError: counts or sizes that make no sense.
    """
    if num_tasks < 1 or not 1 <= num_clusters <= num_tasks or not 4 <= smallest <= largest:
        raise InputError(
            f"related_tasks got {num_tasks} tasks in {num_clusters} clusters of "
            f"{smallest}..{largest} examples; give clusters in 1..tasks and at least 4 examples"
        )
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(num_clusters, features))
    sizes = np.exp(rng.uniform(np.log(smallest), np.log(largest + 1), num_tasks)).astype(int)
    inputs, labels = [], []
    for task, size in enumerate(sizes):
        weights = centres[task % num_clusters] + spread * rng.normal(size=features)
        x = rng.normal(size=(size, features))
        clean = x @ weights
        score = clean + noise * np.linalg.norm(weights) * rng.normal(size=size)
        inputs.append(x)
        labels.append(score if regression else np.where(score > 0, 1.0, -1.0))
    return _table(np.concatenate(inputs), np.concatenate(labels), sizes)


def split_tasks(
    table: TaskTable,
    *,
    train_share: float = 0.75,
    seed: int = 0,
    skewed: bool = False,
    keep_order: bool = False,
) -> Splits:
    """Shuffles every task and cuts it into train and test.

    There are ``ceil(train_share n) - 1`` training examples (at least 1), as in MOCHA's released
    code.

    Args:
        table: the examples of all tasks.
        train_share: of each task's examples.
        seed: of the shuffle.
        skewed: cuts a random half of the tasks down to 1..20 % of their training examples (at least
            3). It is a re-creation of the paper's skewed data, whose exact sizes are not known.
        keep_order: leaves the examples of each part in the table's order, as the released code
            does. It matters to cyclic passes where neighbours in the table resemble each other, as
            in Landmine.

    Raises:
        InputError: a share outside (0, 1), or a task of fewer than two examples.
    """
    if not 0 < train_share < 1:
        raise InputError(f"train_share is {train_share}; give a share between 0 and 1")
    rng = np.random.default_rng(seed)
    train, test = [], []
    for task, own in enumerate(table.rows):
        if len(own) < 2:
            raise InputError(
                f"task {task} has {len(own)} example; it needs one to learn from and one to test"
            )
        shuffled = rng.permutation(len(own))
        cut = max(1, int(np.ceil(train_share * len(own))) - 1)
        first, rest = shuffled[:cut], shuffled[cut:]
        if keep_order:
            first, rest = np.sort(first), np.sort(rest)
        train.append(own[first])
        test.append(own[rest])
    if skewed:
        for task in rng.permutation(len(train))[: len(train) // 2]:
            keep = max(3, int(rng.uniform(0.01, 0.2) * len(train[task])))
            train[task] = _both_classes(train[task], table.labels, keep)
    examples = {"inputs": table.inputs, "labels": table.labels}
    learned = make_federation(examples, train)
    return Splits(learned, make_federation(learned.examples, test))


def _both_classes(rows: np.ndarray, labels: np.ndarray, keep: int) -> np.ndarray:
    """Returns the first ``keep`` rows.

    The last of them is exchanged if otherwise only one of two classes would be left.
    """
    kept = rows[:keep].copy()
    others = rows[keep:][labels[rows[keep:]] != labels[kept[0]]]
    if set(np.unique(labels[rows])) == {-1.0, 1.0} and len(set(labels[kept])) == 1 and len(others):
        kept[-1] = others[0]
    return kept
