"""Packed rows, read by random access."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
import numpy as np

from ranktuner_jax.data.batch import Batch
from ranktuner_jax.data.chat import TokenizedChat
from ranktuner_jax.data.chats import Chats, Part
from ranktuner_jax.data.packing import Groups
from ranktuner_jax.data.summary import Summary

if TYPE_CHECKING:
    import grain

__all__ = ["Order", "Rows"]


@dataclass(frozen=True)
class Order:
    """The endless sequence of row indices in training order, by random access.

    Attributes:
      rows: For each width, its rows in an endless order.
      turns: Which width the next `run` elements have, and how many such runs it had before.
      run: Elements of one width.
    """

    rows: Sequence[grain.MapDataset[int]]
    turns: grain.MapDataset[tuple[int, int]]
    run: int

    def __getitem__(self, index: int) -> int:
        turn, offset = divmod(index, self.run)
        width, number = self.turns[turn] if len(self.rows) > 1 else (0, turn)
        return int(self.rows[width][number * self.run + offset])


class Rows:
    """Rows of one length with random access, each holding one or more conversations.

    `rows[i]` is a `Batch` of arrays [T], `rows.take([3, 1])` one of arrays [2, T].

    The last token of a conversation is only a label, so n tokens take n - 1 positions.

    Args:
      chats: Tokenized conversations.
      groups: For each row, the indices of its conversations.
      row_length: T.
      summary: Counts of the conversations and rows.
      parts: For a mixture, the number of rows and the weight of each source, in order.
      sources: The name of each source and the number of its conversations, in order.
      widths: How many positions rows have in batches of training, ascending; `row_length` if empty.
        Each row has the narrowest that holds it.

    Attributes:
      sources: As given.
      widths: The number of rows of each width.

    Example:
      >>> chats = [TokenizedChat(np.array([5, 6, 7]), np.array([0, 0, 1])),
      ...          TokenizedChat(np.array([8, 9]), np.array([0, 1]))]
      >>> rows = Rows(chats, [[0, 1]], row_length=4, summary=Summary(4))
      >>> for name in ("tokens", "labels", "mask", "segment_ids"):
      ...     print(name, getattr(rows[0], name).tolist())
      tokens [5, 6, 8, 0]
      labels [6, 7, 9, 0]
      mask [False, True, True, False]
      segment_ids [1, 1, 2, 0]
    """

    def __init__(
        self,
        chats: Sequence[TokenizedChat],
        groups: Groups | Sequence[Sequence[int]],
        *,
        row_length: int,
        summary: Summary,
        parts: Sequence[tuple[int, float]] = (),
        sources: Sequence[tuple[str, int]] = (),
        widths: Sequence[int] = (),
    ):
        self._chats = chats if isinstance(chats, Chats) else Chats([Part.of(chats)])
        self._groups = groups if isinstance(groups, Groups) else Groups.of(groups)
        self._parts = parts or [(len(self._groups), 1.0)]
        self.sources = sources or [("", len(self._chats))]
        self.row_length = row_length
        self.summary = summary
        self.widths = {row_length: len(self._groups)}
        if len(widths) > 1:
            starts = np.append(0, self._groups.stops)[:-1]
            filled = np.add.reduceat(self.lengths[self._groups.items], starts)
            self._width_of = np.searchsorted(widths, filled)
            rows = np.bincount(self._width_of, minlength=len(widths)).tolist()
            self.widths = dict(zip(widths, rows, strict=True))

    def __len__(self) -> int:
        return len(self._groups)

    def __getitem__(self, index: int) -> Batch[np.ndarray]:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return jax.tree.map(lambda array: array[0], self.take([index]))

    def width(self, index: int) -> int:
        """The positions of a row in batches of training."""
        widths = [*self.widths]
        return widths[self._width_of[index]] if len(widths) > 1 else widths[0]

    def take(self, indices: Sequence[int], width: int | None = None) -> Batch[np.ndarray]:
        """A batch [B, T] of the given rows.

        Args:
          indices: Row numbers; -1 gives a row of padding, to complete the last batch of a pass
            over all rows.
          width: T, which holds the longest of them; `row_length` by default.
        """
        groups = [self._groups[index] if index >= 0 else () for index in indices]
        batch = self.lay_out(groups, width)
        return dataclasses.replace(batch, row_index=np.array(indices, np.int32))

    @property
    def lengths(self) -> np.ndarray:
        """int64, the positions that each conversation takes: its tokens less one."""
        return self._chats.lengths.astype(np.int64) - 1

    @property
    def largest_id(self) -> int:
        """The largest token id."""
        return self._chats.largest_id

    def conversation(self, index: int) -> TokenizedChat:
        """A conversation by its number, in the order of the data."""
        return self._chats[index]

    def source(self, index: int) -> str:
        """The name of the source of a row, by the row's number (`Batch.row_index`)."""
        stops = itertools.accumulate(count for count, _ in self._parts)
        return next(
            name for stop, (name, _) in zip(stops, self.sources, strict=True) if index < stop
        )

    def lay_out(
        self, groups: Sequence[Iterable[int]], width: int | None = None
    ) -> Batch[np.ndarray]:
        """A batch [B, T] of rows that hold the given conversations, whatever rows there are.

        Args:
          groups: For each row, the numbers of its conversations, in the order of the data; row b
            holds `groups[b][s - 1]` where its segment id is s. An empty one gives padding.
          width: T; `row_length` by default.
        """
        shape = (len(groups), width or self.row_length)
        tokens, labels, positions, segment_ids = (np.zeros(shape, np.int32) for _ in range(4))
        token_weights = np.zeros(shape, np.float32)
        for b, group in enumerate(groups):
            at = 0
            for segment, number in enumerate(group, 1):
                chat = self._chats[number]
                length = len(chat.tokens) - 1
                here = slice(at, at := at + length)
                tokens[b, here] = chat.tokens[:-1]
                labels[b, here] = chat.tokens[1:]
                token_weights[b, here] = chat.weights[1:]
                positions[b, here] = np.arange(length)
                segment_ids[b, here] = segment
        return Batch(
            tokens=tokens,
            labels=labels,
            mask=token_weights > 0,
            positions=positions,
            segment_ids=segment_ids,
            token_weights=token_weights,
            row_index=np.arange(len(groups), dtype=np.int32),
        )

    def order(self, seed: int, batch_size: int = 1) -> Order:
        """The endless sequence of row indices in training order, reshuffled each epoch.

        Element g depends on the seed and on g alone, and on `batch_size` if rows have several
        widths: then the rows of a batch have the same, and the widths take turns as often as their
        rows are drawn.

        Args:
          seed: Determines the order.
          batch_size: Rows of a batch.
        """
        import grain

        stops = itertools.accumulate(count for count, _ in self._parts)
        parts = [range(stop - n, stop) for stop, (n, _) in zip(stops, self._parts, strict=True)]
        orders, shares = [], []
        for number in range(len(self.widths)):
            sources: list[grain.MapDataset[int]] = []
            weights: list[float] = []
            for part, (count, weight) in zip(parts, self._parts, strict=True):
                members: Sequence[int] = part
                if len(self.widths) > 1:
                    mine = self._width_of[part.start : part.stop] == number
                    members = (np.flatnonzero(mine) + part.start).tolist()
                if len(members):
                    own = seed + number * len(parts) + len(sources)
                    sources.append(grain.MapDataset.source(members).seed(own).shuffle().repeat())
                    weights.append(weight * len(members) / count)
            one = len(sources) == 1
            orders.append(sources[0] if one else grain.MapDataset.mix(sources, weights))
            shares.append(sum(weights))
        turns = [
            grain.MapDataset.range(_ENDLESS).map(functools.partial(_pair, number))
            for number in range(len(orders))
        ]
        return Order(orders, grain.MapDataset.mix(turns, shares), batch_size)

    @functools.cached_property
    def fingerprint(self) -> int:
        """A checksum of contents and layout, by which a checkpoint recognizes its rows."""
        widths = [[*self.widths]] if len(self.widths) > 1 else []
        layout = repr((self.row_length, list(self._parts), *widths)).encode()
        return zlib.crc32(layout, zlib.crc32(self._groups.items.data, self._chats.crc()))


# More batches of a width than any run has.
_ENDLESS = 1 << 40


def _pair(first: int, second: int) -> tuple[int, int]:
    return first, second
