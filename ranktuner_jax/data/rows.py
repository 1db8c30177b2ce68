"""Packed rows, read by random access."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import zlib
from collections.abc import Iterable, Sequence

import grain
import jax
import numpy as np

from ranktuner_jax.data.batch import Batch
from ranktuner_jax.data.chat import TokenizedChat
from ranktuner_jax.data.chats import Chats, Part
from ranktuner_jax.data.packing import Groups
from ranktuner_jax.data.summary import Summary

__all__ = ["Rows"]


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

    Attributes:
      sources: As given.

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
    ):
        self._chats = chats if isinstance(chats, Chats) else Chats([Part.of(chats)])
        self._groups = groups if isinstance(groups, Groups) else Groups.of(groups)
        self._parts = parts or [(len(self._groups), 1.0)]
        self.sources = sources or [("", len(self._chats))]
        self.row_length = row_length
        self.summary = summary

    def __len__(self) -> int:
        return len(self._groups)

    def __getitem__(self, index: int) -> Batch[np.ndarray]:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return jax.tree.map(lambda array: array[0], self.take([index]))

    def take(self, indices: Sequence[int]) -> Batch[np.ndarray]:
        """A batch [B, T] of the given rows.

        Args:
          indices: Row numbers; -1 gives a row of padding, to complete the last batch of a pass
            over all rows.
        """
        batch = self.lay_out([self._groups[index] if index >= 0 else () for index in indices])
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

    def lay_out(self, groups: Sequence[Iterable[int]]) -> Batch[np.ndarray]:
        """A batch [B, T] of rows that hold the given conversations, whatever rows there are.

        Args:
          groups: For each row, the numbers of its conversations, in the order of the data; row b
            holds `groups[b][s - 1]` where its segment id is s. An empty one gives padding.
        """
        shape = (len(groups), self.row_length)
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

    def order(self, seed: int) -> grain.MapDataset[int]:
        """The endless sequence of row indices in training order, reshuffled each epoch.

        Element g depends on the seed and on g alone.

        Args:
          seed: Determines the order.
        """
        stops = list(itertools.accumulate(count for count, _ in self._parts))
        sources = [
            grain.MapDataset.range(stop - count, stop).seed(seed + part).shuffle().repeat()
            for part, (stop, (count, _)) in enumerate(zip(stops, self._parts, strict=True))
        ]
        if len(sources) == 1:
            return sources[0]
        return grain.MapDataset.mix(sources, [weight for _, weight in self._parts])

    @functools.cached_property
    def fingerprint(self) -> int:
        """A checksum of contents and layout, by which a checkpoint recognizes its rows."""
        layout = repr((self.row_length, list(self._parts))).encode()
        return zlib.crc32(layout, zlib.crc32(self._groups.items.data, self._chats.crc()))
