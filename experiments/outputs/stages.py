"""Runs of several stages: what is kept at their boundaries, and how they are taken up again."""

import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from experiments.outputs.checkpoints import Checkpoints
from fedjax_mtl import Algorithm, Stage
from fedjax_mtl.core.checks import InputError
from fedjax_mtl.simulation import stage_of

PyTree = Any


def as_stages(made: Algorithm | list[Stage], num_rounds: int) -> list[Stage]:
    """The stages of a run; an algorithm alone is one stage.

    Raises:
        InputError: stages that have not ``num_rounds`` rounds together.
    """
    if isinstance(made, Algorithm):
        return [Stage(lambda _: (made, None), num_rounds)]
    total = sum(stage.rounds for stage in made)
    if total != num_rounds:
        raise InputError(
            f"the stages have {total} rounds together but config.num_rounds is {num_rounds}; set "
            f"--config.num_rounds={total}, or the stages' own rounds"
        )
    return made


def stage_name(stages: Sequence[Stage], index: int) -> str:
    """A stage's name in metrics: its own, or its number."""
    return stages[index].name or str(index)


def ends(stages: Sequence[Stage]) -> list[int]:
    """The rounds after which a stage is over, in all stages together."""
    total, rounds = 0, []
    for stage in stages:
        total += stage.rounds
        rounds.append(total)
    return rounds


def first_shapes(algorithm: Algorithm, num_seeds: int) -> PyTree:
    """The shapes of an algorithm's states, with a leading axis of seeds."""
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), num_seeds))
    return jax.eval_shape(jax.vmap(algorithm.init), keys)


class Begun(NamedTuple):
    """A stage that has begun.

    Attributes:
        algorithm: what it runs.
        shapes: of its states, ``[seeds, ...]``.
    """

    algorithm: Algorithm
    shapes: PyTree


def begin(stage: Stage, previous: PyTree | None, num_seeds: int) -> Begun:
    """Builds a stage, for its algorithm and the shapes of its states."""
    algorithm, state = stage.build(previous)
    if state is None:
        return Begun(algorithm, first_shapes(algorithm, num_seeds))
    return Begun(algorithm, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state))


class TakenUp(NamedTuple):
    """Where a run goes on.

    Attributes:
        done: the rounds behind it; None for a run from the start.
        state: there, ``[seeds, ...]``; None where a stage begins.
        previous: the last state of the stage before; None in the first.
        spent: the seconds that the rounds behind it took.
    """

    done: int | None
    state: PyTree | None
    previous: PyTree | None
    spent: dict[str, float]


class StageCheckpoints:
    """The checkpoints of a run: the newest two, and the last state of every stage that is over."""

    def __init__(self, directory: pathlib.Path, stages: Sequence[Stage], num_seeds: int) -> None:
        """Opens the checkpoints of a work directory."""
        self._stages, self._num_seeds = stages, num_seeds
        self._newest = Checkpoints(directory / "checkpoints")
        # What a stage was built from is needed to build it again.
        several = len(stages) > 1
        self._ends = Checkpoints(directory / "stages", keep=len(stages)) if several else None

    def take_up(self) -> TakenUp:
        """The state that the newest checkpoint holds, and what its stage was built from.

        Raises:
            DamagedCheckpoint: one of them cannot be read.
        """
        done = self._newest.latest_round()
        if done is None:
            return TakenUp(None, None, None, {"wall_seconds": 0.0, "compile_seconds": 0.0})
        index, first = stage_of(self._stages, done)
        previous, rounds = None, ends(self._stages)
        if self._ends is not None:
            for earlier in range(index):
                begun = begin(self._stages[earlier], previous, self._num_seeds)
                previous, _ = self._ends.restore(rounds[earlier], begun.shapes)
        if index and done == first:  # the state is the last one of the stage before
            shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), previous)
            _, spent = self._newest.restore(done, shapes)
            return TakenUp(done, None, previous, spent)
        begun = begin(self._stages[index], previous, self._num_seeds)
        state, spent = self._newest.restore(done, begun.shapes)
        return TakenUp(done, state, previous, spent)

    def save(self, done: int, state: PyTree, spent: dict[str, float]) -> None:
        """Saves a checkpoint; where a stage is over, its last state is kept for good."""
        if self._ends is not None and done in ends(self._stages)[:-1]:
            if done not in self._ends.rounds():  # an interrupted run may have got as far
                self._ends.save(done, state, spent)
        self._newest.save(done, state, spent)

    def close(self) -> None:
        """Waits for whatever is being written."""
        self._newest.close()
        if self._ends is not None:
            self._ends.close()
