"""Any source rewritten as a TFDS data set, which training reads by random access."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ranktuner_jax.data import storage
from ranktuner_jax.data.config import DataConfig
from ranktuner_jax.data.encode import conversations
from ranktuner_jax.data.summary import Summary
from ranktuner_jax.errors import UserError

__all__ = ["prepare"]

# Columns that the written messages replace: their weights include the row's.
_WRITTEN = ("messages", "weight", "train")


def prepare(
    config: DataConfig, output: str | os.PathLike[str], splits: Mapping[str, str]
) -> dict[str, Summary]:
    r"""Writes splits of a source, whole or not at all.

    Conversations are checked: a bad row raises, or is counted and left out, according to
    `config.on_bad_row`. `config.holdout` is ignored; it applies when the result is trained on.

    Args:
      config: What to read.
      output: The folder to write; it must not exist yet.
      splits: The name of each split, and the part of the source it takes (`train[:1000]`).

    Returns:
      The counts of each split.

    Raises:
      UserError: If `output` exists or cannot be written, the source or a split does not exist,
        or a row is bad and `config.on_bad_row` is `error`.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as tmp:
      ...     path = Path(tmp, "sums.jsonl")
      ...     _ = path.write_text('{"prompt": "2 + 2", "completion": "4"}\n' * 3)
      ...     summaries = prepare(DataConfig(str(path)), f"{tmp}/sums", {"train": "train[:2]"})
      >>> summaries["train"].kept
      2
    """
    output = Path(output)
    if output.exists():
        raise UserError(f"--output: expected a folder that does not exist, got {output}")
    config = dataclasses.replace(config, holdout=0.0)
    summaries = {name: Summary(config.row_length) for name in splits}
    try:
        storage.write_dataset(
            output,
            {name: _records(config, splits[name], summaries[name]) for name in splits},
            name=re.sub(r"\W+", "_", output.name).lower(),
        )
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        raise UserError(f"--output: cannot write to {output.parent}: {error.strerror}") from error
    return summaries


def _records(config: DataConfig, split: str, summary: Summary) -> Iterator[dict[str, Any]]:
    for conversation in conversations(config, config.source, split, summary):
        summary.kept += 1
        turns = [
            {**message, "weight": weight}
            for message, weight in zip(conversation.messages, conversation.weights, strict=True)
        ]
        own = {key: value for key, value in conversation.row.items() if key not in _WRITTEN}
        yield storage.to_record(turns, own)
    if not summary.kept:
        raise UserError(f"data: nothing to write of {config.source}, split {split}: {summary}")
