"""Tokenized conversations in parts, in memory or in files that are mapped into it."""

from __future__ import annotations

import bisect
import dataclasses
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, overload

import numpy as np

from ranktuner_jax.data.chat import TokenizedChat
from ranktuner_jax.data.checksums import combine

if TYPE_CHECKING:
    from jaxtyping import Float32, Int32, Int64, UInt32

__all__ = ["Chats", "Facts", "Part"]

Arrays = tuple["Int32[np.ndarray, ' tokens']", "Float32[np.ndarray, ' tokens']"]


@dataclasses.dataclass(frozen=True)
class Facts:
    """What is known of a part without reading its tokens.

    Attributes:
      chats: Its conversations.
      tokens: Their tokens.
      tokens_crc: The CRC-32 of the bytes of all tokens.
      weights_crc: The CRC-32 of the bytes of all weights.
      largest_id: The largest token id.
    """

    chats: int
    tokens: int
    tokens_crc: int
    weights_crc: int
    largest_id: int

    @classmethod
    def of(cls, chats: int, tokens: np.ndarray, weights: np.ndarray) -> Facts:
        """The facts of the arrays of a part."""
        return cls(
            chats,
            len(tokens),
            zlib.crc32(tokens.data),
            zlib.crc32(weights.data),
            int(tokens.max(initial=-1)),
        )


@dataclasses.dataclass(frozen=True)
class Part:
    """Consecutive conversations, whose arrays are opened when one of them is first read.

    Attributes:
      facts: What is known of them.
      lengths: int32, the tokens of each.
      open: Returns their tokens and weights, one conversation after the other.
      checksums: uint32, the CRC-32 of each one's tokens and weights, or None in memory.
      repair: Called when a conversation has another checksum, before the arrays are opened again.
    """

    facts: Facts
    lengths: Int32[np.ndarray, " chats"]
    open: Callable[[], Arrays]
    checksums: UInt32[np.ndarray, " chats"] | None = None
    repair: Callable[[], None] = lambda: None

    @classmethod
    def of(cls, chats: Sequence[TokenizedChat]) -> Part:
        """A part in memory."""
        lengths = np.array([len(chat.tokens) for chat in chats], np.int32)
        tokens = np.concatenate([np.zeros(0, np.int32), *(chat.tokens for chat in chats)])
        weights = np.concatenate([np.zeros(0, np.float32), *(chat.weights for chat in chats)])
        arrays = tokens.astype(np.int32, copy=False), weights.astype(np.float32, copy=False)
        return cls(Facts.of(len(chats), *arrays), lengths, lambda: arrays)


class Chats(Sequence[TokenizedChat]):
    """Conversations by their number, over one or more parts.

    A conversation that is read from a file is compared with its checksum, so that a broken file is
    never trained on.

    Args:
      parts: Their parts, in order.

    Attributes:
      lengths: int32, the tokens of each conversation.

    Example:
      >>> chats = [TokenizedChat(np.arange(n), np.ones(n)) for n in (2, 3, 4)]
      >>> together = Chats([Part.of(chats[:1]), Part.of(chats[1:])])
      >>> len(together), together[2].tokens.tolist(), together.lengths.tolist()
      (3, [0, 1, 2, 3], [2, 3, 4])
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = parts
        self.lengths = np.concatenate([np.zeros(0, np.int32), *(part.lengths for part in parts)])
        # int64: all tokens together may be more than 2^31.
        self._offsets: Int64[np.ndarray, " chats_and_1"] = np.zeros(len(self.lengths) + 1, np.int64)
        np.cumsum(self.lengths, out=self._offsets[1:])
        self._firsts = [0]
        for part in parts:
            self._firsts.append(self._firsts[-1] + part.facts.chats)
        self._opened: dict[int, Arrays] = {}

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, index: int) -> TokenizedChat: ...

    @overload
    def __getitem__(self, index: slice) -> list[TokenizedChat]: ...

    def __getitem__(self, index: int | slice) -> TokenizedChat | list[TokenizedChat]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(f"conversation {index} of {len(self)}")
        number = bisect.bisect_right(self._firsts, index) - 1
        part, first = self.parts[number], self._firsts[number]
        chat = self._read(number, index)
        if part.checksums is not None and checksum(chat) != part.checksums[index - first]:
            part.repair()
            del self._opened[number]
            chat = self._read(number, index)
        return chat

    def _read(self, number: int, index: int) -> TokenizedChat:
        if number not in self._opened:
            self._opened[number] = self.parts[number].open()
        start, stop = self._offsets[index : index + 2] - self._offsets[self._firsts[number]]
        tokens, weights = self._opened[number]
        return TokenizedChat(tokens[start:stop], weights[start:stop])

    def __iter__(self) -> Iterator[TokenizedChat]:
        return (self[i] for i in range(len(self)))

    @property
    def largest_id(self) -> int:
        """The largest token id."""
        return max(part.facts.largest_id for part in self.parts)

    def crc(self) -> int:
        """The CRC-32 of the bytes of all tokens, then of all weights."""
        total = 0
        for crcs in ("tokens_crc", "weights_crc"):
            for facts in (part.facts for part in self.parts):
                total = combine(total, getattr(facts, crcs), 4 * facts.tokens)
        return total


def checksum(chat: TokenizedChat) -> int:
    """The CRC-32 of a conversation's tokens and weights."""
    return zlib.crc32(chat.weights.data, zlib.crc32(chat.tokens.data))


def checksums(chats: Iterable[TokenizedChat]) -> UInt32[np.ndarray, " chats"]:
    """Those of several conversations."""
    return np.fromiter(map(checksum, chats), np.uint32)
