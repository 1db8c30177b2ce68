"""Notices that the run is to stop: SIGTERM or Ctrl-C, to any of its processes."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils

__all__ = ["StopNotice", "Stopped"]


class Stopped(KeyboardInterrupt):
    """The run ends here, with all that it has to keep on disk; says how, where that matters."""


class StopNotice:
    """Whether the run is to stop; the second Ctrl-C acts as ever.

    A run of one process is stopped at once by `Stopped`, wherever it is, but for the `deferred`
    block, in which it asks. Where `jax.distributed` is initialized, SIGTERM is JAX's preemption
    notice: the run goes on until it asks, and all processes get the same answer to the same
    question. So all have to ask equally often.
    """

    def __init__(self) -> None:
        self._noticed = threading.Event()
        self._deferred = self._distributed = jax.distributed.is_initialized()
        self._asked = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopNotice:
        # Python's handler would take the place of JAX's.
        numbers = [signal.SIGINT] if self._distributed else [signal.SIGINT, signal.SIGTERM]
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in numbers}
        return self

    def __exit__(self, *error: object) -> None:
        for number, before in self._previous.items():
            signal.signal(number, before)

    def reached(self) -> bool:
        """Whether the run is to stop at this point."""
        if not self._distributed:
            return self._noticed.is_set()
        self._asked += 1
        return multihost_utils.reached_preemption_sync_point(self._asked)

    def check(self) -> None:
        """Stops here if it is to.

        Raises:
          Stopped: If it is so.
        """
        if self.reached():
            raise Stopped

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """A block in which the run stops only where it asks; after it, at once."""
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
