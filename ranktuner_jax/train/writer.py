"""Where a run's numbers go: metrics.jsonl, TensorBoard, and the terminal."""

from __future__ import annotations

import json
import math
import os
import pathlib
import sys
from collections.abc import Mapping
from types import TracebackType
from typing import TextIO

import jax
import rich.console
import rich.progress
import tensorboardX

__all__ = ["Writer"]


class Writer:
    """Writes metrics on process 0; the others stay silent.

    Lines of metrics.jsonl beyond `start` are dropped first: they belong to steps of an
    interrupted run that are done again.

    Args:
      workdir: The folder of the run; metrics.jsonl and tensorboard/ lie in it.
      start: The step from which the run goes on.
      steps: The steps of the whole run, for the progress bar.
      stream: Where progress is shown; standard error by default.
    """

    def __init__(
        self, workdir: pathlib.Path, start: int, steps: int, stream: TextIO | None = None
    ) -> None:
        self.metrics_path = workdir / "metrics.jsonl"
        self.tensorboard_path = workdir / "tensorboard"
        self._active = jax.process_index() == 0
        self._stream = stream or sys.stderr
        self._steps = steps
        self._bar: rich.progress.Progress | None = None
        self._evaluation: rich.progress.TaskID | None = None
        if not self._active:
            return
        _drop_after(self.metrics_path, start)
        self._file = self.metrics_path.open("a")
        self._board = tensorboardX.SummaryWriter(
            str(self.tensorboard_path), purge_step=start + 1, write_to_disk=True
        )
        if self._stream.isatty():
            self._bar = rich.progress.Progress(
                rich.progress.TextColumn("{task.description}"),
                rich.progress.BarColumn(),
                rich.progress.MofNCompleteColumn(),
                rich.progress.TextColumn("{task.fields[numbers]}"),
                rich.progress.TimeRemainingColumn(),
                console=rich.console.Console(file=self._stream),
            )
            self._task = self._bar.add_task("train", total=steps, completed=start, numbers="")
            self._bar.start()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Records metrics of a step by their names, such as "train/nll"."""
        if not self._active:
            return
        record = {name: float(value) for name, value in metrics.items()}
        # JSON has no NaN or infinity; null is what every reader takes.
        line = {name: value if math.isfinite(value) else None for name, value in record.items()}
        self._file.write(json.dumps({"step": step, **line}) + "\n")
        self._file.flush()
        for name, value in record.items():
            self._board.add_scalar(name, value, step)

    def progress(self, step: int, loss: float, nll: float, speed: float, left: float) -> None:
        """Shows how far the run is: a bar on a terminal, a line elsewhere.

        Args:
          step: Steps done.
          loss: The loss of the last one.
          nll: Its plain negative log-likelihood.
          speed: Tokens a second.
          left: Seconds left.
        """
        numbers = f"loss {loss:.4f}  nll {nll:.4f}  {speed:,.0f} tokens/s"
        if not self._active:
            return
        if self._bar is not None:
            self._bar.update(self._task, completed=step, numbers=numbers)
        else:
            self.say(f"step {step}/{self._steps}  {numbers}  {_duration(left)} left")

    def evaluating(self, done: int, total: int) -> None:
        """Shows how far an evaluation is; only a terminal's bar says so."""
        if self._bar is None:
            return
        if self._evaluation is None:
            self._evaluation = self._bar.add_task("evaluate", total=total, numbers="")
        self._bar.update(self._evaluation, completed=done, total=total)
        if done >= total:
            self._bar.remove_task(self._evaluation)
            self._evaluation = None

    def say(self, text: str) -> None:
        """Shows a line of text."""
        if not self._active:
            return
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Flushes everything."""
        if not self._active:
            return
        if self._bar is not None:
            self._bar.stop()
        self._file.close()
        self._board.close()

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _drop_after(path: pathlib.Path, step: int) -> None:
    """Keeps the lines of steps up to `step`; a torn last line goes too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(kept))
    os.replace(partial, path)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
