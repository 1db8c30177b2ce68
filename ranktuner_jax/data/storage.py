"""Conversations written once as a TFDS data set that is read by random access."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

__all__ = ["cache_dir", "to_record", "write_dataset"]

_VERSION = "1.0.0"


def cache_dir() -> Path:
    """The user's cache: `RANKTUNER_CACHE`, or `~/.cache/ranktuner_jax`.

    Example:
      >>> cache_dir().is_absolute()
      True
    """
    folder = os.environ.get("RANKTUNER_CACHE") or "~/.cache/ranktuner_jax"
    return Path(folder).expanduser().resolve()


class _Conversations(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Rows of messages and weights; what else the source had stays in `row`, as JSON."""

    VERSION = tfds.core.Version(_VERSION)
    # Nothing is downloaded, so there are no checksums beside the code; to look for them
    # TFDS 4.9.10 would import importlib_resources, which it does not install.
    code_path = None

    def __init__(self, name: str, splits: Mapping[str, Iterable[Mapping[str, Any]]], folder: Path):
        self.name = name
        self._splits = splits
        # array_record needs no TensorFlow, and reads any row at once.
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
                        {"role": text, "content": text, "weight": weight}
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
            split: ((i, dict(record)) for i, record in enumerate(records))
            for split, records in self._splits.items()
        }

    def _generate_examples(self) -> None:  # the generators come with the splits
        raise NotImplementedError


def write_dataset(
    folder: str | Path, splits: Mapping[str, Iterable[Mapping[str, Any]]], *, name: str
) -> Path:
    """Writes records as a TFDS data set, whole or not at all.

    Everything is written beside `folder` first and then moved there in one
    step. A process that is killed leaves no half data set, and of two that
    write at once the first to finish wins; the other's work is thrown away.

    Args:
      folder: Where the data set will lie; kept as it is when it exists.
      splits: Split name to records with `messages` (role, content, weight),
        `weight` and `row` (JSON text).
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
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        builder = _Conversations(name, splits, scratch)
        tfds.disable_progress_bar()
        with contextlib.redirect_stdout(io.StringIO()):  # it speaks of downloads; there are none
            builder.download_and_prepare()
        try:
            os.rename(builder.data_dir, folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was faster
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def to_record(
    messages: Iterable[Mapping[str, Any]], row: Mapping[str, Any], weight: float = 1.0
) -> dict[str, Any]:
    """A record of `write_dataset`: messages, the row's weight, and the source's own row.

    Example:
      >>> to_record([{"role": "user", "content": "hi"}], {"id": 7})["row"]
      '{"id": 7}'
    """
    turns = [
        {
            "role": turn["role"],
            "content": turn["content"],
            "weight": turn.get("weight", 1.0),
        }
        for turn in messages
    ]
    return {
        "messages": turns,
        "weight": weight,
        "row": json.dumps(row, default=str),
    }
