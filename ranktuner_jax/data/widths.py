"""Of how many tokens rows are, where each holds one conversation."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Float, Int

__all__ = ["choose_widths"]

# Widths are multiples of this share of the longest row that there may be.
_PARTS = 16


def choose_widths(
    lengths: Int[np.ndarray, " rows"],
    shares: Float[np.ndarray, " rows"],
    row_length: int,
    *,
    count: int,
    least: int,
) -> tuple[int, ...]:
    """The widths, of at most `count`, that leave the least padding.

    Each row is as wide as the narrowest width that holds it. All choices of sixteenths of
    `row_length` are compared, of which there are 455 for four widths.

    Args:
      lengths: Positions of each row.
      shares: How often each row is drawn, in any unit.
      row_length: Positions of a row at most.
      count: How many widths there may be.
      least: How many rows a width must have, unless there is one width only.

    Returns:
      The widths, ascending; the last one holds the longest row.

    Example:
      >>> lengths = np.array([10, 12, 12, 60, 61, 64])
      >>> choose_widths(lengths, np.ones(6), 64, count=2, least=2)
      (12, 64)
    """
    grid = np.unique(-(-row_length * np.arange(1, _PARTS + 1) // _PARTS))
    at = np.searchsorted(grid, lengths)
    last = int(at.max())
    rows = np.cumsum(np.bincount(at))
    drawn = np.cumsum(np.bincount(at, shares))
    best: tuple[int, ...] = (last,)
    least_positions = float(drawn[-1] * grid[last])
    for narrower in range(1, count):
        for chosen in itertools.combinations(range(last), narrower):
            ends = [*chosen, last]
            positions = float(np.diff(drawn[ends], prepend=0) @ grid[ends])
            if positions < least_positions and np.diff(rows[ends], prepend=0).min() >= least:
                best, least_positions = (*chosen, last), positions
    return tuple(grid[list(best)].tolist())
