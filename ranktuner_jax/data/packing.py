"""Which conversations share a row: best fit, in a given order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Int

__all__ = ["Groups", "best_fit", "packing_order"]

# On GSM8K in rows of 512, sorting windows of 1, 64, 256 and all items fills 93.8, 96.1, 96.4 and
# 96.5 % of the positions.
_WINDOW = 256


@dataclass(frozen=True, eq=False)
class Groups:
    """Lists of items, one after the other in one array: a list of lists takes ten times as much.

    Attributes:
      items: The items of all groups.
      stops: Where each group ends in `items`.

    Example:
      >>> groups = Groups.of([[0, 3, 4], [1, 2]])
      >>> len(groups), groups[1].tolist(), groups.items.tolist()
      (2, [1, 2], [0, 3, 4, 1, 2])
    """

    items: Int[np.ndarray, " items"]
    stops: Int[np.ndarray, " groups"]

    @classmethod
    def of(cls, groups: Sequence[Sequence[int]]) -> Groups:
        """Groups from a list of lists."""
        arrays = (np.asarray(group, np.int64) for group in groups)
        stops = np.cumsum(np.fromiter(map(len, groups), np.int64))
        return cls(np.concatenate([np.zeros(0, np.int64), *arrays]), stops)

    @classmethod
    def alone(cls, count: int) -> Groups:
        """Each item in a group of its own."""
        return cls(np.arange(count), np.arange(1, count + 1))

    @classmethod
    def join(cls, parts: Sequence[Groups]) -> Groups:
        """Groups one after the other, whose items are numbered on."""
        firsts = np.cumsum([0, *(len(part.items) for part in parts)])[:-1]
        pairs = list(zip(parts, firsts, strict=True))
        return cls(
            np.concatenate([part.items + first for part, first in pairs]),
            np.concatenate([part.stops + first for part, first in pairs]),
        )

    def __len__(self) -> int:
        return len(self.stops)

    def __getitem__(self, index: int) -> Int[np.ndarray, " group"]:
        stop = self.stops[index]  # Raises an IndexError, which ends a loop.
        return self.items[self.stops[index - 1] if index else 0 : stop]

    def __iter__(self) -> Iterator[Int[np.ndarray, " group"]]:
        return (self[i] for i in range(len(self)))


def best_fit(lengths: Sequence[int] | np.ndarray, capacity: int, order: Iterable[int]) -> Groups:
    """Packs items into rows: each goes into the fullest row that still has room for it.

    The fullest row with room is found in O(capacity / 64): bit f of an integer
    says that there is a row with f free positions.

    Args:
      lengths: Length of each item, at most `capacity`.
      capacity: Length of a row.
      order: Indices of items, in the order in which they are placed.

    Returns:
      Rows of indices; within a row in the order of placement.

    Raises:
      ValueError: If an item is longer than a row.

    Example:
      >>> [row.tolist() for row in best_fit([3, 6, 2, 4, 1], capacity=8, order=range(5))]
      [[0, 3, 4], [1, 2]]
    """
    placed = np.fromiter(order, np.int64)
    ordered = np.asarray(lengths, np.int64)[placed]
    if len(ordered) and ordered.max() > capacity:
        item = placed[np.argmax(ordered > capacity)]
        raise ValueError(f"item {item} has length {lengths[item]}, a row holds {capacity}")
    rows = np.zeros(len(placed), np.int64)
    rows_with_free: list[list[int]] = [[] for _ in range(capacity + 1)]
    occupied = count = 0
    for start in range(0, len(placed), _CHUNK):
        chosen = []
        for length in ordered[start : start + _CHUNK].tolist():
            fitting = occupied >> length
            if fitting:
                free = length + (fitting & -fitting).bit_length() - 1
                row = rows_with_free[free].pop()
                if not rows_with_free[free]:
                    occupied ^= 1 << free
            else:
                free, row = capacity, count
                count += 1
            chosen.append(row)
            free -= length
            if free:
                rows_with_free[free].append(row)
                occupied |= 1 << free
        rows[start : start + len(chosen)] = chosen
    sizes = np.bincount(rows, minlength=count)
    return Groups(placed[np.argsort(rows, kind="stable")], np.cumsum(sizes))


# Items whose lengths are Python integers at one time.
_CHUNK = 1 << 16


def packing_order(lengths: Sequence[int] | np.ndarray, seed: int) -> Int[np.ndarray, " items"]:
    """The order in which `best_fit` takes items: shuffled, then longest first in each window.

    Longest first fills rows best, but sorting the whole data would put long
    conversations with long ones. Sorting windows of a shuffled order fills rows
    almost as well, and each row remains nearly a random sample.

    Args:
      lengths: Length of each item.
      seed: Determines the shuffle.

    Returns:
      Indices of all items.

    Example:
      >>> packing_order([3, 6, 2], seed=0).tolist()
      [1, 0, 2]
    """
    shuffled = np.random.default_rng(seed).permutation(len(lengths))
    window = np.arange(len(shuffled)) // _WINDOW
    # Sorted by window, then by length; items of one length stay in the shuffled order.
    return shuffled[np.lexsort((-np.asarray(lengths, np.int64)[shuffled], window))]
