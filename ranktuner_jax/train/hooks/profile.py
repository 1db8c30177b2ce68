"""A profiler trace of a few steps, for TensorBoard, XProf or Perfetto."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import jax

from ranktuner_jax.train.hooks.hook import Hook

if TYPE_CHECKING:
    from ranktuner_jax.train.trainer import Trainer

__all__ = ["Profile"]


class Profile(Hook):
    """Traces the steps `first` to `last` on process 0.

    Args:
      first: The first step to trace.
      last: The last step to trace.
      folder: A local folder for the trace; `profile` in the workdir if left out.

    Raises:
      ValueError: If not `1 <= first <= last`, or the trainer has no workdir and no folder is given.
    """

    at_end = False

    def __init__(self, first: int, last: int, folder: str | os.PathLike[str] | None = None) -> None:
        if not 1 <= first <= last:
            raise ValueError(f"first and last must be steps, in order: got {first} and {last}.")
        super().__init__()
        self._first, self._last, self._folder = first, last, folder
        self._running = False

    def start(self, trainer: Trainer) -> None:
        """Determines the output folder."""
        self._folder = self._folder or trainer.profile_path
        if self._folder is None:
            raise ValueError("Profile needs a folder, since the trainer has no workdir.")

    def before_step(self, trainer: Trainer, step: int) -> None:
        """Starts or ends the trace between steps, so that it holds complete steps."""
        if self._running and step > self._last:
            trainer.read_metrics()
            self.close()
        if step == self._first and jax.process_index() == 0:
            trainer.read_metrics()
            assert self._folder is not None
            jax.profiler.start_trace(self._folder)
            self._running = True

    def close(self) -> None:
        """Ends the trace."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
