"""Notices that the run is to stop: SIGTERM, or Ctrl-C."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

__all__ = ["stop_notice"]


@contextlib.contextmanager
def stop_notice() -> Iterator[threading.Event]:
    """An event that SIGTERM or the first Ctrl-C sets; the second acts as ever."""
    event = threading.Event()
    previous: dict[int, Any] = {}

    def handler(number: int, frame: Any) -> None:
        event.set()
        signal.signal(number, previous[number])

    if threading.current_thread() is threading.main_thread():
        previous = {n: signal.signal(n, handler) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield event
    finally:
        for number, before in previous.items():
            signal.signal(number, before)
