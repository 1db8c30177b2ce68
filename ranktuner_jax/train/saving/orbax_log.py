"""Reduces Orbax's errors and log output to one line, and frees what failed saves hold."""

from __future__ import annotations

import contextlib
import gc
import logging
import re
import threading
import traceback
from collections.abc import Iterator

__all__ = ["clear_frames", "one_line", "quiet_orbax", "root_cause"]

# Warnings that Orbax logs for read-only managers.
_NOTES_ON_READ_ONLY = ("CheckpointManagerOptions.read_only=", "Given directory is read only")
_SECONDS_FOR_THREADS = 30.0


@contextlib.contextmanager
def quiet_orbax() -> Iterator[None]:
    """Hides Orbax's warnings, and errors that its threads log although they are raised here too."""
    hidden: list[BaseException] = []

    def is_not_from_orbax(record: logging.LogRecord) -> bool:
        if record.getMessage().startswith(_NOTES_ON_READ_ONLY):
            return False
        error = record.exc_info[1] if record.exc_info else None
        if error is None or not _is_from_orbax(error):
            return True
        hidden.append(error)
        return False

    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    for logger in loggers:
        logger.addFilter(is_not_from_orbax)
    try:
        yield
    finally:
        # A failed save leaves threads that are never joined, and futures that log their unretrieved
        # errors when they are deleted, which the frames of the errors delay.
        for thread in threading.enumerate():
            if type(thread).__module__.startswith("orbax."):
                threading.Thread.join(thread, _SECONDS_FOR_THREADS)
        for error in hidden:
            clear_frames(error)
        if hidden:
            gc.collect()
        for logger in loggers:
            logger.removeFilter(is_not_from_orbax)


def clear_frames(error: BaseException | None) -> None:
    """Frees the local variables in the frames of an error and of its causes."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _is_from_orbax(error: BaseException) -> bool:
    """Whether an error comes from Orbax, or from TensorStore, whose errors have no frames."""
    frames = list(traceback.walk_tb(error.__traceback__))
    modules = (frame.f_globals.get("__name__", "") for frame, _ in frames)
    return any(name.startswith("orbax.") for name in modules) or (
        not frames and "tensorstore" in str(error)
    )


def root_cause(error: BaseException) -> BaseException:
    """The first error in a chain of causes."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def one_line(error: BaseException) -> str:
    """An error in one line, without the specification of the array that TensorStore appends."""
    error = root_cause(error)
    lines = str(error).strip().splitlines() or [""]
    # "[tensorstore_spec=..." and "[source locations=..." are pages of JSON.
    text = re.split(r" \[(?:tensorstore_spec|source locations)=", lines[0])[0]
    # Long paths are in the middle; the reason is at the end.
    text = text if len(text) <= 200 else f"{text[:80]} ... {text[-115:]}"
    return f"{type(error).__name__}: {text}"
