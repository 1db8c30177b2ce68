"""Packed rows in memory, read by random access."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import zlib
from collections.abc import Sequence

import grain
import jax
import numpy as np

from ranktuner_jax.data.batch import Batch
from ranktuner_jax.data.chat import TokenizedChat
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
        groups: Sequence[Sequence[int]],
        *,
        row_length: int,
        summary: Summary,
        parts: Sequence[tuple[int, float]] = (),
        sources: Sequence[tuple[str, int]] = (),
    ):
        lengths = [len(chat.tokens) for chat in chats]
        self._offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        self._tokens = np.concatenate([chat.tokens for chat in chats])
        self._weights = np.concatenate([chat.weights for chat in chats])
        self._groups = groups
        self._parts = parts or [(len(groups), 1.0)]
        self.sources = sources or [("", len(chats))]
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
        return np.diff(self._offsets) - 1

    @property
    def largest_id(self) -> int:
        """The largest token id."""
        return int(self._tokens.max())

    def conversation(self, index: int) -> TokenizedChat:
        """A conversation by its number, in the order of the data."""
        here = slice(*self._offsets[index : index + 2])
        return TokenizedChat(self._tokens[here], self._weights[here])

    def lay_out(self, groups: Sequence[Sequence[int]]) -> Batch[np.ndarray]:
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
            for segment, chat in enumerate(group, 1):
                first, last = self._offsets[chat], self._offsets[chat + 1] - 1
                here = slice(at, at := at + int(last - first))
                tokens[b, here] = self._tokens[first:last]
                labels[b, here] = self._tokens[first + 1 : last + 1]
                token_weights[b, here] = self._weights[first + 1 : last + 1]
                positions[b, here] = np.arange(last - first)
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
        order = np.fromiter(itertools.chain.from_iterable(self._groups), np.int64)
        layout = repr((self.row_length, list(self._parts))).encode()
        checksum = 0
        for part in (self._tokens.data, self._weights.data, order.data, layout):
            checksum = zlib.crc32(part, checksum)
        return checksum
