"""The folder that an audit leaves, opened for reading."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ranktuner_jax.errors import UserError

__all__ = ["Audit", "label", "open_audit"]

BATCH_ROWS = 65536

# How methods are written in sentences and on axes; one that is not here keeps its name.
_LABELS = {
    "sft": "SFT",
    "dft": "DFT",
    "eaft": "EAFT",
    "talr": "TALR",
    "profit": "ProFit",
    "deft": "DEFT",
    "idft": "IDFT",
    "entropy": "Entropy",
    "ranktuner": "RankTuner",
    "ranktuner_one": "RankTuner w=1",
    "ranktuner_exact": "RankTuner exact",
    "ranktuner_one_exact": "RankTuner w=1 exact",
    "config": "your config",
}


def label(method: str) -> str:
    """How a method is written for people.

    Example:
      >>> label("ranktuner"), label("focal")
      ('RankTuner', 'focal')
    """
    return _LABELS.get(method, method)


@dataclasses.dataclass(frozen=True)
class Audit:
    """An audit on disk.

    Attributes:
      folder: Where it is.
      about: The contents of audit.json.
    """

    folder: pathlib.Path
    about: dict[str, Any]

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods whose weights were recorded."""
        return tuple(self.about["methods"])

    @property
    def rows(self) -> int:
        """Supervised tokens in tokens.parquet."""
        return int(pq.read_metadata(self.folder / "tokens.parquet").num_rows)

    def batches(self, columns: Sequence[str], rows: int = BATCH_ROWS) -> Iterator[pa.RecordBatch]:
        """Some columns of tokens.parquet, at most `rows` rows at a time and in their order."""
        with pq.ParquetFile(self.folder / "tokens.parquet") as file:
            yield from file.iter_batches(batch_size=rows, columns=list(columns))

    def conversations(self) -> list[dict[str, Any]]:
        """The conversations of conversations.jsonl."""
        lines = (self.folder / "conversations.jsonl").read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines if line.strip()]


def open_audit(folder: str | os.PathLike[str]) -> Audit:
    """Opens the folder of a finished audit.

    Raises:
      UserError: If a file is missing, or another version wrote them.
    """
    folder = pathlib.Path(folder)
    for name in ("audit.json", "tokens.parquet", "conversations.jsonl"):
        if not (folder / name).is_file():
            raise UserError(
                f"{folder}: expected the folder of a finished audit, got one without {name}; "
                "run `ranktuner audit` with this --output first"
            )
    about = json.loads((folder / "audit.json").read_text(encoding="utf-8"))
    if about.get("version") != 1:
        raise UserError(
            f"{folder}/audit.json: expected version 1, got {about.get('version')!r}; "
            "repeat the audit with this version"
        )
    return Audit(folder, about)
