"""A writer of TensorBoard event files."""

from __future__ import annotations

import math
import pathlib
import socket
import time
from collections.abc import Mapping

from tensorboardX import record_writer
from tensorboardX.proto import event_pb2, summary_pb2

__all__ = ["Board"]

_SECONDS_BETWEEN_FLUSHES = 10.0


class Board:
    """A TensorBoard event file, written synchronously.

    tensorboardX's writer uses a thread and a queue: if a full disk kills the thread, the queue
    fills up and the run hangs.
    """

    def __init__(self, folder: pathlib.Path, first_step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}"
        self._file = record_writer.RecordWriter(str(folder / name))
        self._flushed = -math.inf
        self._add(event_pb2.Event(file_version="brain.Event:2"))
        # Makes TensorBoard discard earlier data from that step on.
        session = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._add(event_pb2.Event(step=first_step, session_log=session))

    def write(self, step: int, record: Mapping[str, float]) -> None:
        """Records metrics of a step."""
        values = [
            summary_pb2.Summary.Value(tag=name, simple_value=value)
            for name, value in record.items()
        ]
        self._add(event_pb2.Event(step=step, summary=summary_pb2.Summary(value=values)))
        if time.monotonic() - self._flushed > _SECONDS_BETWEEN_FLUSHES:
            self._file.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        """Flushes and closes it."""
        self._file.close()

    def _add(self, event: event_pb2.Event) -> None:
        event.wall_time = time.time()
        self._file.write(event.SerializeToString())
