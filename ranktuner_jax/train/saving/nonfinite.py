"""Saves a step with a non-finite loss or gradient, so that it can be replayed."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from ranktuner_jax import files
from ranktuner_jax.data import Batch
from ranktuner_jax.errors import DivergedError, RunError, UserError
from ranktuner_jax.train.config import CheckpointConfig
from ranktuner_jax.train.saving.checkpoint import Checkpoints
from ranktuner_jax.train.step.state import TrainState
from ranktuner_jax.train.telemetry.step_log import NonFiniteError

__all__ = ["load_step", "stop_at"]


def stop_at(
    found: NonFiniteError, state: TrainState, workdir: epath.Path | None, run: Mapping[str, Any]
) -> DivergedError:
    """Saves a non-finite step, its batch and the state before it, to `nonfinite/step_N`.

    Args:
      found: The step.
      state: The state before it.
      workdir: The folder of the run; None saves nothing.
      run: The config of the run.

    Returns:
      The error to raise, which names the rows of all processes.
    """
    batch = jax.tree.map(
        lambda array: np.asarray(multihost_utils.process_allgather(array, tiled=True)), found.batch
    )
    saved, skip = "without a workdir it was not saved", "a nonfinite_limit above 0"
    if workdir is not None:
        replay = f"trainer.replay({found.step})"
        if (workdir / "config.json").exists():
            replay = f"ranktuner_jax.train.replay({os.fspath(workdir)!r}, {found.step})"
            skip = "--config.train.on_nonfinite=skip"
        try:
            _save(_folder(workdir, found.step), found.step, state, batch, run)
            saved = f"`{replay}` repeats it"
        except (OSError, RunError) as error:
            saved = f"it could not be saved in {workdir}: {error}"
    return DivergedError(
        f"step {found.step}: the loss is {found.loss} and the gradient norm {found.grad_norm}, on "
        f"rows {batch.row_index.ravel().tolist()} of the data set; {saved}; {skip} skips such steps"
    )


def _save(
    folder: epath.Path, step: int, state: TrainState, batch: Batch, run: Mapping[str, Any]
) -> None:
    if jax.process_index() == 0:
        with io.BytesIO() as file:
            np.savez(file, **vars(batch))
            files.write_whole(folder / "batch.npz", file.getvalue())
    with contextlib.closing(
        Checkpoints(
            folder, CheckpointConfig(asynchronous=False), run, state.params, base=state.base
        )
    ) as checkpoints:
        checkpoints.save(step - 1, state, {})


def load_step(
    workdir: epath.Path, step: int, state: TrainState, run: Mapping[str, Any]
) -> tuple[TrainState, Batch]:
    """The state and the batch, split into micro-batches, that `stop_at` saved.

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
        Checkpoints(folder, CheckpointConfig(), run, state.params, read_only=True, base=state.base)
    ) as checkpoints:
        state = checkpoints.restore(state).state
    with np.load(io.BytesIO((folder / "batch.npz").read_bytes())) as kept:
        return state, Batch(**{field.name: kept[field.name] for field in dataclasses.fields(Batch)})


def _folder(workdir: epath.Path, step: int) -> epath.Path:
    return workdir / "nonfinite" / f"step_{step}"
