"""How far a comparison is: a bar on a terminal, else a line for each run."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence

import rich.console
import rich.progress

from ranktuner_jax.compare.comparison import Planned
from ranktuner_jax.train import Hook, Trainer

__all__ = ["RunProgress", "run_progress"]


class RunProgress:
    """Shows the run that is being done; called before each with its number and how many there are.

    Args:
      bar: A bar on the terminal; None writes a line for each run.
    """

    def __init__(self, bar: rich.progress.Progress | None) -> None:
        self._bar = bar
        self._task = None if bar is None else bar.add_task("", total=None, status="")
        self._start, self._first = time.monotonic(), 0

    def __call__(self, run: Planned, number: int, total: int) -> Sequence[Hook]:
        """Shows the run; returns the hooks that show its steps."""
        self._first = self._first or number
        divided = ", by weights" * (run.variant.normalize == "weights")
        name = f"{run.variant.method}{divided}, rate {run.rate:g}, {run.role} seed {run.seed}"
        if self._bar is None:
            left = ""
            if number > self._first:
                seconds = (time.monotonic() - self._start) / (number - self._first)
                left = f"  {(total - number + 1) * seconds / 60:,.0f} min left"
            print(f"run {number} of {total}: {name}{left}", file=sys.stderr, flush=True)
            return []
        assert self._task is not None
        self._bar.update(self._task, description=name, completed=number - 1, total=total, status="")
        return [Hook(self._step, every=1)]

    def _step(self, trainer: Trainer) -> None:
        assert self._bar is not None
        assert self._task is not None
        nll = trainer.metrics.get("train/nll", float("nan"))
        self._bar.update(self._task, status=f"step {trainer.steps_done}  nll {nll:.3f}")


@contextlib.contextmanager
def run_progress() -> Iterator[RunProgress]:
    """Shows the progress of a comparison on standard error."""
    if not sys.stderr.isatty():
        yield RunProgress(None)
        return
    with rich.progress.Progress(
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TextColumn("{task.fields[status]}"),
        rich.progress.TimeRemainingColumn(),
        console=rich.console.Console(file=sys.stderr),
    ) as bar:
        yield RunProgress(bar)
