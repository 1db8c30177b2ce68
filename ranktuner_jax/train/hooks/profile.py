"""A profiler's trace of a few steps, for TensorBoard, XProf or Perfetto."""

from __future__ import annotations

import os
from collections.abc import Callable

import jax

__all__ = ["Profile"]


class Profile:
    """Traces the steps `first` to `last` on process 0.

    Args:
      folder: Where the trace goes; a local path.
      steps: `(first, last)`; empty for no trace.
    """

    def __init__(self, folder: str | os.PathLike[str], steps: tuple[int, ...]) -> None:
        self._folder = folder
        self._steps = steps if jax.process_index() == 0 else ()
        self._running = False

    def before(self, step: int, wait: Callable[[], None]) -> None:
        """Called before each step: starts or ends the trace.

        Args:
          step: The step that comes.
          wait: Waits for the one before it, so that the trace holds whole steps.
        """
        if self._running and step > self._steps[1]:
            wait()
            self._stop()
        if not self._running and self._steps and step == self._steps[0]:
            wait()
            jax.profiler.start_trace(self._folder)
            self._running = True

    def _stop(self) -> None:
        if self._running:
            self._running = False
            jax.profiler.stop_trace()

    def __enter__(self) -> Profile:
        return self

    def __exit__(self, *error: object) -> None:
        self._stop()
