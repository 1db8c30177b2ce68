"""Hooks that track the best value of a metric: keep the best model, or stop early."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import jax
from etils import epath
from jax.experimental import multihost_utils

from ranktuner_jax import files, models
from ranktuner_jax.errors import UserError
from ranktuner_jax.train.hooks.hook import Hook

if TYPE_CHECKING:
    from ranktuner_jax.train.trainer import Trainer

__all__ = ["KeepBest", "StopEarly"]

_RECORD = "best.json"

SaveModel = Callable[[models.Decoder, os.PathLike[str]], None]


class _Best(Hook):
    """Tracks the best value of a metric."""

    def __init__(self, metric: str, *, mode: Literal["min", "max"], every: int) -> None:
        if mode not in ("min", "max"):
            raise ValueError(f"mode must be 'min' or 'max': got {mode!r}.")
        super().__init__(every=every)
        self.metric, self._sign = metric, 1.0 if mode == "min" else -1.0
        self.best: float | None = None
        self.best_step = 0

    def improved(self, trainer: Trainer) -> bool:
        """Whether the metric is better than its best value so far; NaN never is."""
        if trainer.metric_steps.get(self.metric) != trainer.steps_done:
            raise ValueError(
                f"{type(self).__name__}: no value of {self.metric!r} at step {trainer.steps_done}; "
                f"available are {', '.join(sorted(trainer.metrics))}. Put the hook that logs it "
                "before this one, due at the same steps."
            )
        value = trainer.metrics[self.metric]
        if not self._sign * value < (float("inf") if self.best is None else self._sign * self.best):
            return False
        self.best, self.best_step = value, trainer.steps_done
        return True


class KeepBest(_Best):
    """Keeps the best model by a metric as a Hugging Face folder.

    `best.json` in it holds the metric, its value and its step. The folder is replaced only once a
    better model is completely written.

    Args:
      metric: Name of the metric, such as "eval/nll"; a hook before this one must log it.
      mode: Whether a lower ("min") or higher ("max") value is better.
      every: Steps between comparisons; the last step is compared too.
      folder: The output folder; `best` in the workdir if left out.
      save: Writes a model to a folder that does not exist yet; `models.save_pretrained` if left
        out, which writes no tokenizer.

    Example:
      >>> KeepBest("eval/nll", mode="min", every=100).best is None
      True
    """

    def __init__(
        self,
        metric: str,
        *,
        mode: Literal["min", "max"],
        every: int = 0,
        folder: str | os.PathLike[str] | None = None,
        save: SaveModel = models.save_pretrained,
    ) -> None:
        super().__init__(metric, mode=mode, every=every)
        self._folder, self._save = folder, save

    def start(self, trainer: Trainer) -> None:
        """Reads what the folder holds of an earlier part of the run.

        Raises:
          UserError: If the folder holds something else.
          ValueError: If there is none.
        """
        if self._folder is None and trainer.workdir is None:
            raise ValueError("KeepBest needs a folder, since the trainer has no workdir.")
        self._path = epath.Path(self._folder or trainer.workdir / "best")  # type: ignore[operator]
        record = self._path / _RECORD
        if record.exists():
            found = json.loads(record.read_text())
            if found["metric"] == self.metric:
                self.best, self.best_step = found["value"], found["step"]
        elif self._path.exists():
            raise UserError(
                f"KeepBest: expected a new folder, or one that it wrote, got {self._path} without "
                f"{_RECORD}; move it away"
            )

    def __call__(self, trainer: Trainer) -> None:
        """Saves the model if it is the best so far."""
        if not self.improved(trainer):
            return
        folder = self._path
        new, old = (folder.with_name(f"{folder.name}.{part}") for part in ("new", "old"))
        _remove(new)  # Left by a process that was killed.
        self._save(trainer.model, new)
        found = {"metric": self.metric, "value": self.best, "step": self.best_step}
        # At any moment a complete model exists under one of the three names.
        if jax.process_index() == 0:
            files.write_whole(new / _RECORD, json.dumps(found) + "\n")
            if folder.exists():
                if old.exists():
                    old.rmtree()
                folder.rename(old)
            new.rename(folder)
        _remove(old)
        trainer.say(f"best {self.metric} so far, {self.best:.4f}: saved to {folder}")


def _remove(folder: epath.Path) -> None:
    """Removes a folder if it exists; all processes wait for process 0 to do so."""
    if jax.process_index() == 0 and folder.exists():
        folder.rmtree()
    multihost_utils.sync_global_devices(f"{folder} is removed")


class StopEarly(_Best):
    """Stops training once a metric no longer improves.

    Args:
      metric: Name of the metric, such as "eval/nll"; a hook before this one must log it.
      mode: Whether a lower ("min") or higher ("max") value is better.
      patience: Comparisons without improvement before training stops.
      every: Steps between comparisons.

    Example:
      >>> StopEarly("eval/accuracy", mode="max", patience=2, every=50).every
      50
    """

    at_end = False

    def __init__(
        self, metric: str, *, mode: Literal["min", "max"], patience: int = 3, every: int = 1
    ) -> None:
        if patience < 1:
            raise ValueError(f"patience must be at least 1: got {patience}.")
        super().__init__(metric, mode=mode, every=every)
        self._patience, self._stale = patience, 0

    def start(self, trainer: Trainer) -> None:
        """Stops a resumed run that had already stopped early."""
        self._stop_if_exhausted(trainer)

    def __call__(self, trainer: Trainer) -> None:
        """Compares, and stops training if the patience is exhausted."""
        self._stale = 0 if self.improved(trainer) else self._stale + 1
        self._stop_if_exhausted(trainer)

    def _stop_if_exhausted(self, trainer: Trainer) -> None:
        if self._stale >= self._patience:
            trainer.stop(
                f"{self.metric} has not improved since step {self.best_step} ({self.best:.4f})"
                if self.best is not None
                else f"{self.metric} is not a number"
            )

    def get_state(self) -> dict[str, Any]:
        """The best value, its step, and the number of comparisons without improvement."""
        return {"best": self.best, "best_step": self.best_step, "stale": self._stale}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Restores them."""
        self.best, self.best_step = state["best"], state["best_step"]
        self._stale = state["stale"]
