"""What a run learns: data, tasks and shapes, before any model or algorithm."""

from typing import NamedTuple

import numpy as np

from fedjax_mtl import Federation, Splits, Task, data, tasks
from fedjax_mtl.data.instructions import Tokenizer


class Generation(NamedTuple):
    """Prompts to answer when a run is over.

    Attributes:
        federation: each client's test prompts; examples are ``prompts`` int32 ``[n, capacity]`` and ``lengths`` int32 ``[n]``.
        references: the right answers, by row. tokenizer: turns tokens into text. max_new_tokens: of an answer.
    """

    federation: Federation
    references: list[str]
    tokenizer: Tokenizer
    max_new_tokens: int


class Problem(NamedTuple):
    """What a run learns: the clients' data, the task, and the shapes a model must have.

    Attributes:
        splits, task, input_shape, num_outputs: always.
        groups: ``[clients]``, which clients are alike, where the data know.
        dual_loss: of problems for methods in the dual.
        pretraining: examples that a base model is trained on before adapters are.
        generation: prompts to answer, of instruction data.
    """

    splits: Splits
    task: Task
    input_shape: tuple[int, ...]
    num_outputs: int
    groups: np.ndarray | None = None
    dual_loss: tasks.dual.DualLoss | None = None
    pretraining: dict[str, np.ndarray] | None = None
    generation: Generation | None = None


class PopulationProblem(NamedTuple):
    """What a run on a heterogeneous population learns; everything by group.

    Attributes:
        splits: the groups' data.
        tasks: what each group is trained and judged on.
        input_shape: of one input, the same in all groups.
        outputs: output channels by task name, for each group.
    """

    splits: data.PopulationSplits
    tasks: dict[str, Task]
    input_shape: tuple[int, ...]
    outputs: dict[str, dict[str, int]]
