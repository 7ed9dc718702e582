"""Orbax checkpoints of what training changes; frozen weights are loaded from their source again."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from rapidfire_jax.algorithms.train_state import TrainState
from rapidfire_jax.errors import InputError

logging.getLogger("absl").setLevel(logging.ERROR)  # orbax reports every save at WARNING


class Checkpoints:
    """Checkpoints of one run, by iteration."""

    def __init__(self, folder: Path, keep: int):
        self._folder = folder
        self._manager = ocp.CheckpointManager(
            folder,
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=False),
        )

    @property
    def latest(self) -> int | None:
        """Iteration of the newest complete checkpoint."""
        return self._manager.latest_step()

    def save(self, iteration: int, state: TrainState, record: dict[str, Any]) -> None:
        """Saves everything but `state.frozen`, and a JSON record beside it."""
        if iteration != self.latest:
            arrays, note = ocp.args.StandardSave(_flatten(state)), ocp.args.JsonSave(record)
            self._manager.save(iteration, args=ocp.args.Composite(state=arrays, record=note))

    def restore(self, state: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The newest checkpoint, in the shape of `state`, with its record.

        Raises:
          InputError: the checkpoint is damaged or belongs to a model of other shapes.
        """
        like = _flatten(state)
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        arguments = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), record=ocp.args.JsonRestore())
        try:
            restored = self._manager.restore(self.latest, args=arguments)
        except Exception as error:  # orbax raises many kinds
            raise InputError(f"{self._folder / str(self.latest)}: cannot be restored: {error}") from error
        leaves = [restored.state[name] for name in like]
        changed = jax.tree.unflatten(jax.tree.structure(_changing(state)), leaves)
        return dataclasses.replace(state, **changed), restored.record

    def close(self) -> None:
        """Waits for what is being written."""
        self._manager.close()


def _changing(state: TrainState) -> dict[str, Any]:
    fields = dataclasses.fields(state)
    return {field.name: getattr(state, field.name) for field in fields if field.name != "frozen"}


def _flatten(state: TrainState) -> dict[str, jax.Array]:
    """Leaves by name, in a fixed order: plain names outlive changes of library classes."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(_changing(state))
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
