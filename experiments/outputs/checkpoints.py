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


class Checkpoints:
    """The checkpoints of one work directory, the newest two kept; a kill while saving leaves the one before."""

    def __init__(self, directory: pathlib.Path):
        self._directory = directory.absolute()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=2, cleanup_tmp_directories=True, enable_async_checkpointing=False
        )
        self._manager = ocp.CheckpointManager(self._directory, options=options)

    def save(self, round_index: int, state: PyTree, meta: dict[str, Any]) -> None:
        """Saves the state after this many rounds."""
        self._manager.save(
            round_index,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(_by_path(state)), meta=ocp.args.JsonSave(meta)
            ),
        )

    def latest_round(self) -> int | None:
        """The round of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def restore(self, round_index: int, like: PyTree) -> tuple[PyTree, dict[str, Any]]:
        """The state (of the shapes of ``like``) and JSON saved after this round.

        Raises:
            RuntimeError: the checkpoint is damaged or has other shapes; the message says what to delete.
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
            raise RuntimeError(
                f"checkpoint {self._directory / str(round_index)} cannot be read ({type(error).__name__}); delete that "
                "directory to continue from the checkpoint before it, or from the start"
            ) from error
        leaves, treedef = jax.tree.flatten(like)
        values = [restored.state[name] for name in targets]
        assert len(values) == len(leaves)
        return jax.tree.unflatten(treedef, values), restored.meta

    def close(self) -> None:
        """Waits for whatever is being written."""
        self._manager.close()
