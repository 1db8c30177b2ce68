"""Counts of what was read, kept and left out."""

from __future__ import annotations

import collections
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

__all__ = ["Summary"]

# What is counted while a source is read.
_COUNTS = ("read", "bad", "first_bad", "held_out", "dropped", "truncated", "supervised")


@dataclass
class Summary:
    """Counts of a source's conversations, and of the rows they were packed into.

    Attributes:
      read: Rows of the source.
      bad: Number of skipped rows by reason; empty unless `on_bad_row=skip`.
      first_bad: The first skipped row, with the reason.
      held_out: Conversations that `data.holdout` keeps out of training.
      dropped: Conversations longer than a row that were left out: all of them with
        `too_long=drop`, with `truncate` those whose supervised tokens would all be cut off.
      truncated: Conversations cut to the length of a row.
      kept: Training samples. A conversation yields several if the chat template renders its
        earlier turns differently once later turns follow.
      tokens: Positions of these samples.
      supervised: Positions whose label is supervised.
      rows: Rows that hold the samples.
      unpacked: Whether packing was requested but not done, because packed rows would not fill
        a batch.
      row_length: Positions per row.
      lengths: Positions of each sample.
      widths: The number of rows of each width, if rows have several.
    """

    row_length: int
    read: int = 0
    bad: collections.Counter[str] = field(default_factory=collections.Counter)
    first_bad: str = ""
    held_out: int = 0
    dropped: int = 0
    truncated: int = 0
    kept: int = 0
    tokens: int = 0
    supervised: int = 0
    rows: int = 0
    unpacked: bool = False
    lengths: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    widths: Mapping[int, int] = field(default_factory=dict)

    def counts(self) -> dict[str, Any]:
        """The counts of the source's rows, as JSON types."""
        return {name: getattr(self, name) for name in ("row_length", *_COUNTS)}

    @classmethod
    def of(cls, counts: Mapping[str, Any]) -> Summary:
        """A summary with these counts.

        Example:
          >>> Summary.of(Summary(8, read=3, bad=collections.Counter(long=1)).counts()).bad
          Counter({'long': 1})
        """
        return cls(**{**counts, "bad": collections.Counter(counts["bad"])})

    def add(self, other: Summary) -> None:
        """Adds the counts of later rows of the same source, or of another source."""
        for name in _COUNTS:
            mine, others = getattr(self, name), getattr(other, name)
            setattr(self, name, (mine or others) if name == "first_bad" else mine + others)

    @property
    def fill(self) -> float:
        """Fraction of all positions that hold a token."""
        widths = self.widths or {self.row_length: self.rows}
        return self.tokens / max(1, sum(width * rows for width, rows in widths.items()))

    def __str__(self) -> str:
        widths, padded = [*self.widths] or [self.row_length], ""
        if len(widths) > 1:
            alone = self.tokens / (self.rows * self.row_length)
            padded = f", {alone:.1%} if all had {self.row_length:,}"
        parts = [
            f"{self.read - self.held_out:,} conversations"
            + f" and {self.held_out:,} held out" * bool(self.held_out),
            f"{self.rows:,} rows of {' / '.join(f'{width:,}' for width in widths)} "
            f"({self.fill:.1%} filled{padded})",
            f"{self.tokens:,} tokens ({self.supervised / max(1, self.tokens):.1%} supervised)",
        ]
        if self.unpacked:
            parts.append("not packed, because packed rows would not fill a batch")
        if self.truncated:
            parts.append(f"{self.truncated:,} truncated")
        if self.dropped:
            parts.append(f"{self.dropped:,} too long and dropped")
        if self.bad:
            parts.append(f"{self.bad.total():,} bad and skipped, the first: {self.first_bad}")
        return ", ".join(parts)
