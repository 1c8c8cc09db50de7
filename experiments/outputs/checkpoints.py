"""Checkpoints through orbax: the state's leaves by path, and a little JSON."""

import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

PyTree = Any


def _by_path(tree: PyTree) -> dict[str, Any]:
    return {
        jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


class DamagedCheckpoint(RuntimeError):
    """A checkpoint that cannot be read; the message says what to delete."""


class Checkpoints:
    """The checkpoints of one directory, of which the newest are kept.

    A kill while one is being saved leaves the one before.
    """

    def __init__(self, directory: pathlib.Path, keep: int = 2) -> None:
        """Opens the checkpoints in a directory, which is made if it is not there.

        Args:
            directory: where they lie.
            keep: how many.
        """
        self._directory = directory.absolute()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, cleanup_tmp_directories=True, enable_async_checkpointing=False
        )
        self._manager = ocp.CheckpointManager(self._directory, options=options)

    def save(self, round_index: int, state: PyTree, meta: dict[str, Any]) -> None:
        """Saves a state.

        Args:
            round_index: how many rounds led to it.
            state: a pytree of arrays.
            meta: what goes with it, as JSON.
        """
        self._manager.save(
            round_index,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(_by_path(state)), meta=ocp.args.JsonSave(meta)
            ),
        )

    def rounds(self) -> list[int]:
        """The rounds of all complete checkpoints."""
        return list(self._manager.all_steps())

    def latest_round(self) -> int | None:
        """The round of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def restore(self, round_index: int, like: PyTree) -> tuple[PyTree, dict[str, Any]]:
        """Returns the state and the JSON that were saved after a round.

        Args:
            round_index: which checkpoint.
            like: a state of the same structure and shapes, or their ``jax.ShapeDtypeStruct``.

        Raises:
            DamagedCheckpoint: the checkpoint is damaged or has other shapes.
        """
        targets = _by_path(like)
        try:
            restored = self._manager.restore(
                round_index,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(targets), meta=ocp.args.JsonRestore()
                ),
            )
        except Exception as error:  # orbax and tensorstore raise many types for damaged files
            raise DamagedCheckpoint(
                f"checkpoint {self._directory / str(round_index)} cannot be read "
                f"({type(error).__name__}); delete that directory to continue from the checkpoint "
                "before it, or from the start"
            ) from error
        values = [restored.state[name] for name in targets]
        return jax.tree.unflatten(jax.tree.structure(like), values), restored.meta

    def close(self) -> None:
        """Waits for whatever is being written."""
        self._manager.close()
