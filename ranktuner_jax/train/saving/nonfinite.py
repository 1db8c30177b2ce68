"""Saves a step with a non-finite loss or gradient, so that it can be replayed."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from ranktuner_jax import files
from ranktuner_jax.data import Batch
from ranktuner_jax.errors import UserError
from ranktuner_jax.train.config import CheckpointConfig
from ranktuner_jax.train.saving.checkpoint import Checkpoints
from ranktuner_jax.train.step.state import TrainState

__all__ = ["gather", "keep_step", "load_step"]


def gather(batch: Batch) -> Batch:
    """A placed batch as NumPy arrays, with the rows of all processes."""
    return jax.tree.map(
        lambda array: np.asarray(multihost_utils.process_allgather(array, tiled=True)), batch
    )


def keep_step(
    workdir: epath.Path, step: int, state: TrainState, batch: Batch, run: Mapping[str, Any]
) -> None:
    """Writes the batch of a step and the state before it to `nonfinite/step_N` of the workdir.

    Args:
      workdir: The folder of the run.
      step: The step.
      state: The state before it.
      batch: The result of `gather`, the same in every process.
      run: The config of the run.

    Raises:
      OSError, RunError: If the files cannot be written.
    """
    folder = _folder(workdir, step)
    if jax.process_index() == 0:
        with io.BytesIO() as file:
            np.savez(file, **vars(batch))
            files.write_whole(folder / "batch.npz", file.getvalue())
    with contextlib.closing(
        Checkpoints(folder, CheckpointConfig(asynchronous=False), run, state.params)
    ) as checkpoints:
        checkpoints.save(step - 1, state, {})


def load_step(
    workdir: epath.Path, step: int, state: TrainState, run: Mapping[str, Any]
) -> tuple[TrainState, Batch]:
    """The state and the batch, split into micro-batches, that `keep_step` wrote.

    Args:
      workdir: The folder of the run.
      step: The step.
      state: A state with the structure and the shardings to restore into; its arrays are deleted.
      run: The config of the run.

    Raises:
      UserError: If no such step was saved.
    """
    folder = _folder(workdir, step)
    if not (folder / "batch.npz").exists():
        raise UserError(f"expected a saved non-finite step in {folder}, found none")
    with contextlib.closing(
        Checkpoints(folder, CheckpointConfig(), run, state.params, read_only=True)
    ) as checkpoints:
        state = checkpoints.restore(state).state
    with np.load(io.BytesIO((folder / "batch.npz").read_bytes())) as kept:
        return state, Batch(**{field.name: kept[field.name] for field in dataclasses.fields(Batch)})


def _folder(workdir: epath.Path, step: int) -> epath.Path:
    return workdir / "nonfinite" / f"step_{step}"
