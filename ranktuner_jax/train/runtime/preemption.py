"""Requests to stop a run: SIGTERM or Ctrl-C, sent to any of its processes."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils

__all__ = ["PREEMPTED", "StopNotice", "Stopped"]

PREEMPTED = 75
"""The exit code of a command that was stopped with everything saved (EX_TEMPFAIL)."""


class Stopped(KeyboardInterrupt):
    """The run was stopped with everything saved; the message, if any, gives details."""


class StopNotice:
    """Records a request to stop the run; a second Ctrl-C interrupts as usual. May be nested.

    In a run of one process, a signal raises `Stopped` immediately, except in a `deferred` block,
    where the run polls with `reached`. With `jax.distributed`, SIGTERM is JAX's preemption notice:
    the run continues until it polls, and the n-th call of `reached` returns the same in all
    processes, so all must call it equally often.
    """

    _polls = 0  # Of all notices in this process: JAX needs a new number for each.

    def __init__(self) -> None:
        self._noticed = threading.Event()
        self._deferred = self._distributed = jax.distributed.is_initialized()
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopNotice:
        # With jax.distributed, SIGTERM is left to JAX's handler.
        numbers = [signal.SIGINT] if self._distributed else [signal.SIGINT, signal.SIGTERM]
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in numbers}
        return self

    def __exit__(self, *error: object) -> None:
        for number, before in self._previous.items():
            signal.signal(number, before)

    def reached(self) -> bool:
        """Whether the run should stop at this point."""
        if not self._distributed:
            return self._noticed.is_set()
        StopNotice._polls += 1
        return multihost_utils.reached_preemption_sync_point(StopNotice._polls)

    def check(self) -> None:
        """Raises `Stopped` if the run should stop.

        Raises:
          Stopped: If `reached` is true.
        """
        if self.reached():
            raise Stopped

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """A block in which a signal raises `Stopped` only at `check`, or at its end."""
        before, self._deferred = self._deferred, True
        try:
            yield
        finally:
            self._deferred = before
        self.check()

    def _handle(self, number: int, frame: Any) -> None:
        signal.signal(number, self._previous[number])
        if self._distributed:
            os.kill(os.getpid(), signal.SIGTERM)
            return
        self._noticed.set()
        if not self._deferred:
            raise Stopped
