"""Conversations written as a TFDS data set, for random access."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ranktuner_jax.files import whole_folder

__all__ = ["to_record", "write_dataset"]


def write_dataset(
    folder: str | Path, splits: Mapping[str, Iterable[Mapping[str, Any]]], *, name: str
) -> Path:
    """Writes records as a TFDS data set, whole or not at all.

    See `files.whole_folder` for what happens when the process is killed, or when two processes
    write the same data set.

    Args:
      folder: The data set's folder; if it exists already, it is kept.
      splits: Split name to records with `messages` (role, content, weight, and anything else
        that is JSON), `weight` and `row` (JSON text).
      name: The data set's TFDS name, in snake_case.

    Returns:
      `folder`, which `tfds.builder_from_directory` reads.

    Example:
      >>> import tempfile
      >>> import tensorflow_datasets as tfds
      >>> turns = [{"role": "user", "content": "2 + 2", "weight": 1.0},
      ...          {"role": "assistant", "content": "4", "weight": 1.0}]
      >>> with tempfile.TemporaryDirectory() as tmp:
      ...     record = {"messages": turns, "weight": 1.0, "row": "{}"}
      ...     path = write_dataset(f"{tmp}/sums", {"train": [record]}, name="sums")
      ...     len(tfds.builder_from_directory(path).as_data_source("train"))
      1
    """
    # Imported here, so that a command is refused before it has waited for TFDS.
    import tensorflow_datasets as tfds

    from ranktuner_jax.data.builder import VERSION, Conversations

    folder = Path(folder)
    # TFDS appends the name and the version to the folder that it is given.
    with whole_folder(folder, inside=f"{name}/{VERSION}") as scratch:
        builder = Conversations(name, splits, scratch)
        tfds.disable_progress_bar()
        with contextlib.redirect_stdout(io.StringIO()):  # Messages about downloads.
            builder.download_and_prepare()
    return folder


def to_record(
    messages: Iterable[Mapping[str, Any]], row: Mapping[str, Any], weight: float = 1.0
) -> dict[str, Any]:
    """A record of `write_dataset`: messages, the row's weight, and the source's own row.

    Example:
      >>> to_record([{"role": "user", "content": "hi"}], {"id": 7})["row"]
      '{"id": 7}'
    """
    turns = [{**turn, "weight": turn.get("weight", 1.0)} for turn in messages]
    return {
        "messages": turns,
        "weight": weight,
        "row": json.dumps(row, default=str),
    }
