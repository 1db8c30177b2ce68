"""A run's checkpoints: state, data position and config, saved while training goes on."""

from __future__ import annotations

import importlib.metadata
import json
import math
import pathlib
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax.training.train_state import TrainState

from ranktuner_jax.errors import UserError
from ranktuner_jax.train.config import CheckpointConfig, TrainConfig, differences, to_dict

__all__ = ["Checkpoints", "claim_workdir"]

_PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "ranktuner-jax")
# What is compressed and written at once: without a limit it is all of the state.
_WRITE_GIGABYTES = 0.25


def claim_workdir(workdir: pathlib.Path, config: TrainConfig) -> Callable[[], None]:
    """Makes the folder of a run, and refuses one that holds a run with another config.

    Nothing is written into it yet, so that a mistake that shows up later leaves it free.

    Args:
      workdir: The folder.
      config: The run's config.

    Returns:
      A function that writes config.json: from then on the folder belongs to the run.

    Raises:
      UserError: If the folder cannot be written, or holds a run with another config.
    """
    path = workdir / "config.json"
    mine = to_dict(config)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=workdir):
            pass
        found = differences(json.loads(path.read_text()), mine) if path.exists() else []
    except OSError as error:
        raise UserError(
            f"--workdir: expected a folder that can be written, got {workdir}: {error.strerror}"
        ) from error
    except ValueError as error:
        raise UserError(f"--workdir: expected a config in {path}, got {error}") from error
    if found:
        raise UserError(
            f"--workdir: {workdir} holds a run with another config ({'; '.join(found)}); "
            "take another folder, or the same config"
        )

    def claim() -> None:
        if jax.process_index() == 0:
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(mine, indent=2) + "\n")
            partial.replace(path)

    return claim


class Checkpoints:
    """Saves without blocking, keeps the newest and every n-th, restores the newest that is whole.

    Args:
      workdir: The folder of the run; checkpoints lie in its `checkpoints`.
      config: When to save and what to keep.
      run: The config of the run, saved with each checkpoint.
      params: The parameters, or their shapes and shardings: no array of the state is larger.
    """

    def __init__(
        self, workdir: pathlib.Path, config: CheckpointConfig, run: Mapping[str, Any], params: Any
    ) -> None:
        self.folder = workdir.absolute() / "checkpoints"
        self._run = {"config": run, "versions": _versions()}
        # Orbax refuses an array that is larger than the limit.
        largest = max(map(_shard_bytes, jax.tree.leaves(params)))
        gigabytes = max(_WRITE_GIGABYTES, 1.01e-9 * largest)
        self._manager = ocp.CheckpointManager(
            self.folder,
            item_handlers={
                "state": ocp.StandardCheckpointHandler(save_concurrent_gb=gigabytes),
                "data": ocp.JsonCheckpointHandler(),
                "run": ocp.JsonCheckpointHandler(),
            },
            options=ocp.CheckpointManagerOptions(
                max_to_keep=config.keep_last,
                keep_period=config.keep_every or None,
                enable_async_checkpointing=config.asynchronous,
            ),
        )

    def save(self, step: int, state: TrainState, data: Mapping[str, Any]) -> None:
        """Starts to save; the arrays are copied before it returns, so that they may be donated."""
        if step == self._manager.latest_step():
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(_arrays(state)),
                data=ocp.args.JsonSave(dict(data)),
                run=ocp.args.JsonSave(self._run),
            ),
            force=True,
        )

    @property
    def steps(self) -> list[int]:
        """The steps of the checkpoints that are whole, in order."""
        return sorted(self._manager.all_steps())

    def restore(self, state: TrainState, step: int) -> tuple[TrainState, dict[str, Any]]:
        """A checkpoint and its data position.

        Args:
          state: A state with the structure and the shardings to restore into. Its arrays are
            deleted first: two states need not fit into memory.
          step: Which of `steps`.
        """
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, _arrays(state))
        jax.tree.map(lambda array: array.delete(), _arrays(state))
        saved = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(shapes), data=ocp.args.JsonRestore()
            ),
        )
        return state.replace(**saved["state"]), saved["data"]

    def path(self, step: int) -> pathlib.Path:
        """The folder of a step's checkpoint."""
        return self.folder / str(step)

    def wait(self) -> None:
        """Returns once everything that `save` started is on disk; raises what went wrong there."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then frees the threads."""
        self._manager.close()


def _arrays(state: TrainState) -> dict[str, Any]:
    """What of a state is saved: its arrays, not its functions."""
    return {"step": state.step, "params": state.params, "opt_state": state.opt_state}


def _shard_bytes(array: jax.Array | jax.ShapeDtypeStruct) -> int:
    """The bytes that one device holds of an array."""
    shape = array.sharding.shard_shape(array.shape) if array.sharding else array.shape
    # Moments and accumulators are never wider than float32.
    return math.prod(shape) * max(4, array.dtype.itemsize)


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
