"""Conversations written as a TFDS data set, for random access."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from ranktuner_jax.files import whole_folder

__all__ = ["to_record", "write_dataset"]

_VERSION = "1.0.0"
_COLUMNS = ("role", "content", "weight")


class _Conversations(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Conversations with weights; the source's row is kept in `row`, as JSON."""

    VERSION = tfds.core.Version(_VERSION)
    # Nothing is downloaded. To look for checksums of downloads beside the code, TFDS 4.9.10 would
    # import importlib_resources, which it does not install.
    code_path = None

    def __init__(self, name: str, splits: Mapping[str, Iterable[Mapping[str, Any]]], folder: Path):
        self.name = name
        self._splits = splits
        # array_record has random access and needs no TensorFlow.
        super().__init__(data_dir=str(folder), file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        weight = tfds.features.Scalar(dtype=np.float32)
        return tfds.core.DatasetInfo(
            builder=self,
            description="Conversations for supervised fine-tuning.",
            features=tfds.features.FeaturesDict(
                {
                    "messages": tfds.features.Sequence(
                        # Tool calls and the like, as JSON, are in `more`.
                        {"role": text, "content": text, "weight": weight, "more": text}
                    ),
                    "weight": weight,
                    "row": text,
                }
            ),
            disable_shuffling=True,  # so that index i is row i of the source
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        del dl_manager  # nothing is downloaded
        return {
            split: (
                (i, {**record, "messages": [_stored(turn) for turn in record["messages"]]})
                for i, record in enumerate(records)
            )
            for split, records in self._splits.items()
        }

    def _generate_examples(self) -> None:  # the generators come with the splits
        raise NotImplementedError


def _stored(turn: Mapping[str, Any]) -> dict[str, Any]:
    more = {key: value for key, value in turn.items() if key not in _COLUMNS}
    return {**{key: turn[key] for key in _COLUMNS}, "more": json.dumps(more)}


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
      >>> turns = [{"role": "user", "content": "2 + 2", "weight": 1.0},
      ...          {"role": "assistant", "content": "4", "weight": 1.0}]
      >>> with tempfile.TemporaryDirectory() as tmp:
      ...     record = {"messages": turns, "weight": 1.0, "row": "{}"}
      ...     path = write_dataset(f"{tmp}/sums", {"train": [record]}, name="sums")
      ...     len(tfds.builder_from_directory(path).as_data_source("train"))
      1
    """
    folder = Path(folder)
    # TFDS appends the name and the version to the folder that it is given.
    with whole_folder(folder, inside=f"{name}/{_VERSION}") as scratch:
        builder = _Conversations(name, splits, scratch)
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
