"""The sequences that noise is put into, and the statistics of their supervised tokens."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
import numpy as np

from ranktuner_jax import losses
from ranktuner_jax.data import (
    Batch,
    ChatEncoder,
    Conversation,
    DataConfig,
    Rows,
    Summary,
    TokenizedChat,
    best_fit,
)
from ranktuner_jax.data.encode import fit, tokenized
from ranktuner_jax.data.load import share_of
from ranktuner_jax.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Sequences", "Source", "read_sequences", "score_sequences"]


@dataclass(frozen=True, slots=True)
class Source:
    """A sequence of tokens, and the conversation that it was encoded from.

    Attributes:
      conversation: The conversation.
      part: The sample of it that this sequence is: templates that write earlier turns differently
        once later ones follow give several.
      chat: All of its tokens, however long.
    """

    conversation: Conversation
    part: int
    chat: TokenizedChat


@dataclass(frozen=True)
class Sequences:
    """Sequences, and what is needed to change them.

    Attributes:
      sources: The sequences, in the order of the data.
      encoder: Encodes changed conversations.
      vocabulary: The token ids that noise is drawn from, rising: all but special and added ones.
      row_length: Labels of a sequence; what is longer is cut.
    """

    sources: Sequence[Source]
    encoder: ChatEncoder
    vocabulary: np.ndarray
    row_length: int

    def cut(self, chat: TokenizedChat) -> TokenizedChat:
        """The tokens that fit into a row."""
        kept = slice(self.row_length + 1)
        return TokenizedChat(chat.tokens[kept], chat.weights[kept])

    @property
    def clean(self) -> list[TokenizedChat]:
        """The sequences without noise, cut to the length of a row."""
        return [self.cut(source.chat) for source in self.sources]

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that stand for all tokens and their weights."""
        found = hashlib.sha256()
        for chat in self.clean:
            found.update(chat.tokens.tobytes() + chat.weights.tobytes())
        return found.hexdigest()[:16]


def read_sequences(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, limit: int | None = None
) -> Sequences:
    """Reads the conversations of `config.split` as sequences.

    Args:
      config: What to read; `row_length` and `too_long` say what happens to long conversations.
      tokenizer: A fast tokenizer with a chat template.
      limit: Only the first so many conversations that are usable. A mixture's sources contribute
        in proportion to their weights.

    Raises:
      UserError: If the source does not exist, a row is bad or too long and the config says
        `error`, or nothing is left.
    """
    encoder = ChatEncoder(tokenizer, enable_thinking=config.enable_thinking)
    mixture = config.mixture or ((config.source, 1.0),)
    sources: list[Source] = []
    for name, weight in mixture:
        share = share_of(limit, weight, mixture)
        for group in itertools.islice(_encoded(config, name, encoder), share):
            sources += group
    if not sources:
        raise UserError(f"data: no usable conversation in {config.source}, split {config.split}")
    excluded = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    vocabulary = np.array(sorted(set(tokenizer.get_vocab().values()) - excluded), np.int32)
    return Sequences(sources, encoder, vocabulary, config.row_length)


def _encoded(config: DataConfig, name: str, encoder: ChatEncoder) -> Iterator[list[Source]]:
    """The sequences of each conversation of a source that has some."""
    summary = Summary(config.row_length)
    for conversation, samples in tokenized(config, name, config.split, encoder, summary):
        group = [
            Source(conversation, part, chat)
            for part, chat in enumerate(samples)
            # Nothing is too long to be tokenized without a limit.
            if isinstance(chat, TokenizedChat) and fit(chat, conversation.where, config, summary)
        ]
        if group:
            yield group


def score_sequences(
    scorer: Callable[[Batch[np.ndarray]], losses.TokenStats],
    chats: Sequence[TokenizedChat],
    *,
    row_length: int,
    batch_size: int,
    progress: Callable[[int], None] = lambda tokens: None,
) -> losses.TokenStats:
    """The statistics of the supervised tokens of all sequences, one after the other.

    Sequences share rows of one length, so that one program scores them all.

    Args:
      scorer: The statistics of a batch, [B, T], such as a `TokenScorer`.
      chats: Sequences of at most `row_length` + 1 tokens.
      row_length: Positions of a row.
      batch_size: Rows that are scored together.
      progress: Called after each batch with the number of tokens in it, supervised or not.

    Returns:
      NumPy arrays [N], where N is the number of supervised tokens.
    """
    lengths = [len(chat.tokens) - 1 for chat in chats]
    groups = best_fit(lengths, row_length, np.argsort(lengths)[::-1].tolist())
    rows = Rows(chats, groups, row_length=row_length, summary=Summary(row_length))
    counts = [int(chat.mask[1:].sum()) for chat in chats]
    stops = np.cumsum(counts)
    places: list[np.ndarray] = []
    parts: list[losses.TokenStats] = []
    for first in range(0, len(groups), batch_size):
        indices = list(range(first, min(first + batch_size, len(groups))))
        batch = rows.take(indices + [-1] * (batch_size - len(indices)))
        stats = jax.device_get(scorer(batch))
        parts.append(jax.tree.map(lambda array, mask=batch.mask: array[mask], stats))
        # In a row, as in its group, one sequence follows the other.
        shared = [i for index in indices for i in groups[index]]
        places += [np.arange(stops[i] - counts[i], stops[i]) for i in shared]
        progress(int((batch.segment_ids > 0).sum()))
    order = np.argsort(np.concatenate(places))
    return jax.tree.map(lambda *arrays: np.concatenate(arrays)[order], *parts)
