"""What a run learns: groups of clients with their data, tasks and shapes, before any model."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from fedjax_mtl.core.federation import Federation, Population, Splits
from fedjax_mtl.core.task import Task
from fedjax_mtl.data.instructions import Tokenizer
from fedjax_mtl.tasks.dual import DualLoss

ALONE = ""
"""The name of the only group of clients that do not come in groups."""


class PopulationSplits(NamedTuple):
    """The :class:`Splits` of clients that come in groups, each by group.

    Attributes:
        train: what the clients train on.
        test: what the same clients are judged by.
        unseen_train: of the groups that hold clients out; None where no group does.
        unseen_test: of the same groups.
    """

    train: Population
    test: Population
    unseen_train: Population | None = None
    unseen_test: Population | None = None


class Generation(NamedTuple):
    """Prompts to answer when a run is over.

    Attributes:
        federation: each client's test prompts; examples are ``prompts`` int32 ``[n, capacity]`` and
            ``lengths`` int32 ``[n]``.
        references: the right answers, by row.
        tokenizer: turns tokens into text.
        max_new_tokens: of an answer.
    """

    federation: Federation
    references: list[str]
    tokenizer: Tokenizer
    max_new_tokens: int


class ProblemGroup(NamedTuple):
    """Clients with the same task.

    Attributes:
        splits: their data.
        task: what they are trained and judged on.
        input_shape: of one input.
        outputs: values that a model must put out for an example; output channels by task name where
            a model has a decoder for each task.
        num_heads: where one model has a head for each client, how many heads that are; an example
            then says which is its own. None where a model has one head.
    """

    splits: Splits
    task: Task
    input_shape: tuple[int, ...]
    outputs: int | dict[str, int]
    num_heads: int | None = None


class Problem(NamedTuple):
    """What a run learns.

    Attributes:
        groups: by name. One group is the ordinary case; it is called :data:`ALONE`, and then
            everything below is a plain value instead of a dict by group.
        alike: ``[clients]``, numbers that are equal where clients are alike; None where the data do
            not know.
        dual_loss: of problems for methods in the dual.
        pretraining: examples that a base model is trained on before adapters are, leaves
            ``[n, ...]``.
        generation: prompts to answer, of instruction data.
    """

    groups: dict[str, ProblemGroup]
    alike: np.ndarray | None = None
    dual_loss: DualLoss | None = None
    pretraining: dict[str, np.ndarray] | None = None
    generation: Generation | None = None

    @property
    def grouped(self) -> bool:
        """Whether clients come in groups."""
        return set(self.groups) != {ALONE}

    def plain(self, values: Mapping[str, Any]) -> Any:
        """Values by group as algorithms take them: bare where clients do not come in groups."""
        return dict(values) if self.grouped else values[ALONE]

    def each(self, attribute: str) -> Any:
        """An attribute of the groups, as algorithms take it."""
        return self.plain({name: getattr(own, attribute) for name, own in self.groups.items()})

    @property
    def task(self) -> Task | dict[str, Task]:
        """What the clients are trained and judged on."""
        return self.each("task")

    @property
    def splits(self) -> Splits | PopulationSplits:
        """The clients' data."""
        if not self.grouped:
            return self.groups[ALONE].splits
        return PopulationSplits(
            train=self._part("train"),
            test=self._part("test"),
            unseen_train=self._part("unseen_train") or None,
            unseen_test=self._part("unseen_test") or None,
        )

    def _part(self, part: str) -> Population:
        """A part of the splits, of the groups that have it."""
        parts = {name: getattr(own.splits, part) for name, own in self.groups.items()}
        return {name: own for name, own in parts.items() if own is not None}

    @property
    def num_clients(self) -> int | dict[str, int]:
        """How many clients train."""
        return self.plain({n: own.splits.train.num_clients for n, own in self.groups.items()})


def one_group(
    group: ProblemGroup,
    *,
    alike: np.ndarray | None = None,
    dual_loss: DualLoss | None = None,
    pretraining: dict[str, np.ndarray] | None = None,
    generation: Generation | None = None,
) -> Problem:
    """The problem of clients that do not come in groups.

    Args:
        group: the clients.
        alike: as in :class:`Problem`.
        dual_loss: as in :class:`Problem`.
        pretraining: as in :class:`Problem`.
        generation: as in :class:`Problem`.
    """
    return Problem({ALONE: group}, alike, dual_loss, pretraining, generation)
