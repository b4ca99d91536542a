"""Saving and restoring a TrainState at a step, atomically, with orbax.

The only place that imports orbax, and only when a directory is opened.
"""

from pathlib import Path
from typing import Any

import jax

from w2s_jax.train.step import TrainState


class Checkpoints:
    """The states saved in a directory; one that is cut off leaves the one before as latest."""

    def __init__(self, directory: str | Path, *, keep: int = 2):
        import orbax.checkpoint as ocp

        self._ocp: Any = ocp
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self._manager = ocp.CheckpointManager(Path(directory).absolute(), options=options)

    def save(self, state: TrainState) -> None:
        """Write the state under its step number and return once it is committed."""
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        self._manager.save(step, args=self._ocp.args.StandardSave(state._asdict()))
        self._manager.wait_until_finished()

    def restore(self, like: TrainState) -> TrainState | None:
        """The latest state, in the shapes, dtypes and shardings of `like`; else None."""
        step = self._manager.latest_step()
        if step is None:
            return None
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like._asdict()
        )
        saved = self._manager.restore(step, args=self._ocp.args.StandardRestore(abstract))
        return TrainState(**saved)

    def close(self) -> None:
        """Let go of the directory."""
        self._manager.close()
