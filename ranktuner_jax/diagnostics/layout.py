"""How an audit lays out conversations: in parts in the order of the data, each packed into rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ranktuner_jax.data import Batch, Rows
from ranktuner_jax.data.packing import best_fit

__all__ = ["batches", "cut", "owners", "pack"]

Groups = list[list[int]]


def pack(
    conversations: Sequence[int], lengths: np.ndarray, row_length: int, *, packing: bool = True
) -> Groups:
    """Rows of conversations: the longest are placed first.

    Args:
      conversations: Their numbers.
      lengths: The positions that each conversation of the data takes.
      row_length: Positions of a row.
      packing: Whether several conversations may share a row.

    Example:
      >>> pack([1, 2, 3], np.array([9, 2, 5, 3]), 8)
      [[2, 3], [1]]
    """
    if not packing:
        return [[int(number)] for number in conversations]
    chosen = [int(lengths[number]) for number in conversations]
    order = sorted(range(len(chosen)), key=lambda item: -chosen[item])
    rows = best_fit(chosen, row_length, order)
    return [[int(conversations[item]) for item in row] for row in rows]


def cut(lengths: np.ndarray, row_length: int, rows: int, *, packing: bool = True) -> list[int]:
    """Cuts the data into parts of successive conversations that fill at most `rows` rows.

    Returns:
      Where each part ends: one more than its last conversation.

    Example:
      >>> cut(np.array([5, 3, 8, 2, 2, 2]), row_length=8, rows=1)
      [2, 3, 6]
    """
    ends = np.cumsum(lengths)
    stops: list[int] = []
    while (first := stops[-1] if stops else 0) < len(lengths):
        room = rows * row_length + (ends[first - 1] if first else 0)
        last = max(first + 1, int(np.searchsorted(ends, room, side="right")))
        while last > first + 1:
            needed = len(pack(range(first, last), lengths, row_length, packing=packing))
            if needed <= rows:
                break
            last = max(first + 1, first + (last - first) * rows // needed)
        stops.append(last)
    return stops


def batches(
    rows: Rows, groups: Groups, batch_size: int
) -> Iterator[tuple[Groups, Batch[np.ndarray]]]:
    """Batches of the given rows, each with its rows; the last is filled with padding."""
    for start in range(0, len(groups), batch_size):
        here = groups[start : start + batch_size]
        here += [[] for _ in range(batch_size - len(here))]
        yield here, rows.lay_out(here)


def owners(groups: Groups, batch: Batch[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """For each position of a batch, the conversation and the index in it of the position's label.

    Args:
      groups: The conversations of each row.
      batch: Their batch, from `Rows.lay_out`.

    Returns:
      int64 and int32 arrays [B, T]; the conversation is -1 at padding.
    """
    most = max(map(len, groups), default=0)
    table = np.full((len(groups), most + 1), -1, np.int64)  # Segment 0 is padding.
    for b, group in enumerate(groups):
        table[b, 1 : len(group) + 1] = group
    return np.take_along_axis(table, batch.segment_ids, axis=1), batch.positions + np.int32(1)
