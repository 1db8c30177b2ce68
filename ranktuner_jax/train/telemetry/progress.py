"""The progress of a run: a bar on a terminal, otherwise lines."""

from __future__ import annotations

import sys
from typing import TextIO

import rich.console
import rich.progress

__all__ = ["Progress"]


class Progress:
    """Shows steps, evaluations and lines of text.

    Args:
      steps: The steps of the whole run.
      stream: The output stream; standard error by default.
      silent: Whether to show nothing, as on all processes but the first.
      bar: Whether to show a bar if the stream is a terminal.
    """

    def __init__(
        self,
        steps: int,
        stream: TextIO | None = None,
        *,
        silent: bool = False,
        bar: bool = True,
    ) -> None:
        self._stream = stream or sys.stderr
        self._steps, self._silent = steps, silent
        self._bar: rich.progress.Progress | None = None
        self._evaluation: rich.progress.TaskID | None = None
        if bar and not silent and self._stream.isatty():
            self._bar = rich.progress.Progress(
                rich.progress.TextColumn("{task.description}"),
                rich.progress.BarColumn(),
                rich.progress.MofNCompleteColumn(),
                rich.progress.TextColumn("{task.fields[status]}"),
                rich.progress.TimeRemainingColumn(),
                console=rich.console.Console(file=self._stream),
            )
            self._task = self._bar.add_task("train", total=steps, status="")
            self._bar.start()

    def step(self, step: int, loss: float, nll: float, speed: float, left: float) -> None:
        """Shows the progress of training.

        Args:
          step: Steps done.
          loss: The loss of the last step.
          nll: Its plain negative log-likelihood.
          speed: Tokens per second.
          left: Estimated seconds left.
        """
        status = f"loss {loss:.4f}  nll {nll:.4f}  {speed:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, status=status)
        else:
            self.say(f"step {step}/{self._steps}  {status}  {_duration(left)} left")

    def evaluation(self, done: int, total: int) -> None:
        """Shows the progress of an evaluation, on a terminal only."""
        if self._bar is None:
            return
        if self._evaluation is None:
            self._evaluation = self._bar.add_task("evaluate", total=total, status="")
        self._bar.update(self._evaluation, completed=done, total=total)
        if done >= total:
            self._bar.remove_task(self._evaluation)
            self._evaluation = None

    def say(self, text: str) -> None:
        """Shows a line of text."""
        if self._silent:
            return
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Ends the bar."""
        if self._bar is not None:
            self._bar.stop()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
