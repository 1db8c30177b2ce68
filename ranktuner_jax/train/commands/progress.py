"""How far the scoring of tokens is: a bar on a terminal, else some lines."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

import rich.console
import rich.progress

__all__ = ["token_progress"]

Progress = Callable[[int, int, float], None]
"""Called with the tokens done, all of them, and tokens per second."""


@contextlib.contextmanager
def token_progress(what: str, *, show: bool) -> Iterator[Progress]:
    """Shows on standard error how many tokens are scored.

    Args:
      what: What is done, in a word.
      show: Whether this process shows it.
    """
    if not show:
        yield lambda *_: None
    elif not sys.stderr.isatty():
        yield _Lines(what)
    else:
        with rich.progress.Progress(
            rich.progress.TextColumn(what),
            rich.progress.BarColumn(),
            rich.progress.TextColumn("{task.completed:,} of {task.total:,} tokens"),
            rich.progress.TextColumn("{task.fields[speed]:,.0f} tokens/s"),
            rich.progress.TimeRemainingColumn(),
            console=rich.console.Console(file=sys.stderr),
        ) as bar:
            task = bar.add_task(what, total=1, visible=False, speed=0.0)
            yield lambda done, total, speed: bar.update(
                task, completed=done, total=total, visible=True, speed=speed
            )


class _Lines:
    """A line each time another tenth is done, or a minute has passed."""

    def __init__(self, what: str) -> None:
        self._what, self._tenths, self._last = what, 0, time.monotonic()

    def __call__(self, done: int, total: int, speed: float) -> None:
        tenths, now = done * 10 // max(total, 1), time.monotonic()
        if tenths == self._tenths and now - self._last < 60:
            return
        self._tenths, self._last = tenths, now
        left = (total - done) / max(speed, 1e-9) / 60
        print(
            f"{self._what}: {done:,} of {total:,} tokens  {speed:,.0f} tokens/s  "
            f"{left:,.0f} min left",
            file=sys.stderr,
            flush=True,
        )
