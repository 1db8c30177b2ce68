"""The conversations of a split as samples of tokens that fit a row."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Container, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ranktuner_jax.data.chat import ChatEncoder, TokenizedChat, TooLong
from ranktuner_jax.data.config import DataConfig
from ranktuner_jax.data.holdout import HOLDOUT, held_out_rows
from ranktuner_jax.data.records import BadRowError, Conversation, to_conversation
from ranktuner_jax.data.sources import open_source
from ranktuner_jax.data.summary import Summary
from ranktuner_jax.errors import UserError

if TYPE_CHECKING:
    from jaxtyping import Int64

__all__ = ["Split", "conversations", "fit", "tokenized"]

# For the tokenizer: enough to keep its threads busy.
_CONVERSATIONS_PER_CALL = 512
# To begin to read somewhere else costs more than to read so many rows.
_NEAR = 64


class Split:
    """The usable conversations of a split of a source.

    Args:
      config: How rows are read, and what happens to bad ones.
      name: Read instead of `config.source`.
      split: Read instead of `config.split`; `holdout` for the conversations held out of it.

    Attributes:
      source: The opened source.

    Raises:
      UserError: If the source does not exist.
    """

    def __init__(self, config: DataConfig, name: str, split: str) -> None:
        if split == HOLDOUT and not config.holdout:
            raise UserError(
                "split: expected data.holdout above 0 for the split 'holdout', got 0; name another "
                "split in eval.split, or set data.holdout=0.05"
            )
        self.config, self.name, self.split = config, name, split
        self.source = open_source(
            name,
            config.split if split == HOLDOUT else split,
            subset=config.subset,
            data_dir=config.data_dir,
        )

    @functools.cached_property
    def held_out(self) -> Int64[np.ndarray, " rows"] | None:
        """The rows that are held out; None if the split is another one.

        All are read, because prompts are chosen among all.
        """
        if not self.config.holdout or self.split not in (HOLDOUT, self.config.split):
            return None
        every = self._numbered([(0, len(self.source))], Summary(self.config.row_length))
        return held_out_rows(every, self.config.holdout)

    def conversations(
        self, summary: Summary, start: int = 0, stop: int | None = None
    ) -> Iterator[Conversation]:
        """The conversations in the source's rows from `start` to `stop`, by default all.

        Args:
          summary: Counts the rows; changed in place.
          start: The first row.
          stop: The row after the last.

        Raises:
          UserError: If a row is bad and `config.on_bad_row` is `error`.
        """
        stop = len(self.source) if stop is None else stop
        stretches, others = [(start, stop)], np.zeros(0, np.int64)
        if self.held_out is not None:
            low, high = np.searchsorted(self.held_out, (start, stop))
            others = self.held_out[low:high]
            if self.split == HOLDOUT:
                stretches, others = _stretches(others)
            else:
                summary.held_out += len(others)
                summary.read += len(others)
        for _, conversation in self._numbered(stretches, summary, frozenset(others.tolist())):
            yield conversation

    def tokenized(
        self,
        encoder: ChatEncoder,
        summary: Summary,
        max_tokens: int | None = None,
        start: int = 0,
        stop: int | None = None,
    ) -> Iterator[tuple[Conversation, tuple[TokenizedChat | TooLong, ...]]]:
        """These conversations with their samples; one that cannot be encoded counts as bad."""
        remaining = self.conversations(summary, start, stop)
        while batch := list(itertools.islice(remaining, _CONVERSATIONS_PER_CALL)):
            for conversation, samples in zip(batch, encoder.encode(batch, max_tokens), strict=True):
                if isinstance(samples, BadRowError):
                    _refuse(conversation.where, samples, self.config, summary)
                else:
                    yield conversation, samples

    def samples(
        self,
        encoder: ChatEncoder,
        summary: Summary,
        start: int = 0,
        stop: int | None = None,
        limit: int | None = None,
    ) -> Iterator[TokenizedChat]:
        """The samples that fit a row, of at most `limit` conversations."""
        config = self.config
        # Of one that is refused or dropped for its length, nothing but its length is needed.
        most = None if config.too_long == "truncate" else config.row_length + 1
        pairs = self.tokenized(encoder, summary, most, start, stop)
        for conversation, samples in itertools.islice(pairs, limit):
            for sample in samples:
                yield from fit(sample, conversation.where, config, summary)

    def _numbered(
        self,
        stretches: Sequence[tuple[int, int]],
        summary: Summary,
        without: Container[int] = (),
    ) -> Iterator[tuple[int, Conversation]]:
        """The conversations in some stretches of rows, each after the number of its row."""
        config = self.config
        for start, stop in stretches:
            for number, record in enumerate(self.source.read(start, stop), start):
                if number in without:
                    continue
                summary.read += 1
                try:
                    if record.error:
                        raise BadRowError(record.error)
                    conversation = to_conversation(
                        record.fields,
                        where=record.where,
                        prompt_column=config.prompt_column,
                        completion_column=config.completion_column,
                        system=config.system,
                        strip_calculator_marks=config.strip_calculator_marks,
                    )
                except BadRowError as error:
                    _refuse(record.where, error, config, summary)
                else:
                    yield number, conversation


def _stretches(
    rows: Int64[np.ndarray, " rows"],
) -> tuple[list[tuple[int, int]], Int64[np.ndarray, " others"]]:
    """Stretches with all of these rows, and the other rows in them: few are read for nothing."""
    if not len(rows):
        return [], rows
    cuts = np.flatnonzero(np.diff(rows) > _NEAR) + 1
    pairs = [(int(run[0]), int(run[-1]) + 1) for run in np.split(rows, cuts)]
    covered = np.concatenate([np.arange(*pair) for pair in pairs])
    return pairs, np.setdiff1d(covered, rows)


def conversations(
    config: DataConfig, source: str, split: str, summary: Summary
) -> Iterator[Conversation]:
    """`Split.conversations` of all rows."""
    return Split(config, source, split).conversations(summary)


def tokenized(
    config: DataConfig,
    source: str,
    split: str,
    encoder: ChatEncoder,
    summary: Summary,
    max_tokens: int | None = None,
) -> Iterator[tuple[Conversation, tuple[TokenizedChat | TooLong, ...]]]:
    """`Split.tokenized` of all rows."""
    return Split(config, source, split).tokenized(encoder, summary, max_tokens)


def _refuse(where: str, error: BadRowError, config: DataConfig, summary: Summary) -> None:
    if config.on_bad_row == "error":
        raise UserError(f"{where}: {error}; fix the row, or set data.on_bad_row=skip")
    summary.bad[str(error)] += 1
    summary.first_bad = summary.first_bad or f"{where}: {error}"


def fit(
    chat: TokenizedChat | TooLong, where: str, config: DataConfig, summary: Summary
) -> list[TokenizedChat]:
    """The sample, truncated if `config` says so, or nothing if it is dropped."""
    if isinstance(chat, TooLong):
        takes = f"at least {chat.fewest - 1:,}"
    elif len(chat.tokens) - 1 <= config.row_length:
        return [chat]
    else:
        takes = f"{len(chat.tokens) - 1:,}"
    if config.too_long == "error":
        raise UserError(
            f"{where}: the conversation takes {takes} tokens, a row holds "
            f"{config.row_length:,}; raise data.row_length, or set data.too_long=truncate or drop"
        )
    cut = slice(config.row_length + 1)
    if isinstance(chat, TooLong) or config.too_long == "drop" or not chat.mask[cut][1:].any():
        summary.dropped += 1
        return []
    summary.truncated += 1
    return [TokenizedChat(chat.tokens[cut], chat.weights[cut])]
