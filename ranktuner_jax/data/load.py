r"""Loads a data set: conversations read, checked, tokenized once and packed into rows.

Example:
  A tokenizer with five words, a data set of three sums, and its first batch:

  >>> import pathlib, tempfile, tokenizers, transformers
  >>> from ranktuner_jax.data import BatchIterator
  >>> words = {word: i for i, word in enumerate(["?", "<end>", "2", "+", "4"])}
  >>> backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="?"))
  >>> backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  >>> tokenizer = transformers.PreTrainedTokenizerFast(
  ...     tokenizer_object=backend,
  ...     eos_token="<end>",
  ...     chat_template="{% for m in messages %}{{ m.content + eos_token }}{% endfor %}",
  ... )
  >>> with tempfile.TemporaryDirectory() as folder:
  ...     path = pathlib.Path(folder, "sums.jsonl")
  ...     _ = path.write_text('{"prompt": "2 + 2", "completion": "4"}\n' * 3)
  ...     config = DataConfig(str(path), row_length=10)
  ...     rows = load_rows(config, tokenizer)
  ...     examples = load_examples(config, tokenizer, split="train", limit=1)
  >>> print(rows.summary)
  3 conversations, 2 rows of 10 (75.0% filled), 15 tokens (40.0% supervised)
  >>> next(BatchIterator(rows, batch_size=2)).tokens.tolist()
  [[2, 3, 2, 1, 4, 0, 0, 0, 0, 0], [2, 3, 2, 1, 4, 2, 3, 2, 1, 4]]
  >>> examples[0].prompt_tokens, examples[0].completion_tokens
  ((2, 3, 2, 1), (4, 1))
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ranktuner_jax.data.chat import ChatEncoder, TokenizedChat, TooLong
from ranktuner_jax.data.config import DataConfig
from ranktuner_jax.data.holdout import HOLDOUT, Holdout
from ranktuner_jax.data.packing import best_fit, packing_order
from ranktuner_jax.data.records import BadRowError, Conversation, to_conversation
from ranktuner_jax.data.rows import Rows
from ranktuner_jax.data.sources import read_source
from ranktuner_jax.data.summary import Summary
from ranktuner_jax.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "Example",
    "conversations",
    "fit",
    "load_examples",
    "load_rows",
    "share_of",
    "tokenized",
]

# For the tokenizer: enough to keep its threads busy.
_CONVERSATIONS_PER_CALL = 512


@dataclass(frozen=True)
class Example:
    """A conversation to sample from and grade.

    Attributes:
      index: Its number among the examples.
      messages: All turns, as in a `Conversation`; the last one is the reference answer.
      prompt_tokens: The sampler's input.
      completion_tokens: The reference answer, with its end-of-turn token.
      row: The row of the source, for graders.
    """

    index: int
    messages: tuple[dict[str, Any], ...]
    prompt_tokens: tuple[int, ...]
    completion_tokens: tuple[int, ...]
    row: Mapping[str, Any]


def load_rows(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    split: str | None = None,
    seed: int = 0,
    min_rows: int = 1,
    limit: int | None = None,
) -> Rows:
    """Reads, tokenizes and packs a split.

    Everything is tokenized before training, so that a bad row is found in the first minute
    rather than the third hour, and so that packing knows all lengths.

    Args:
      config: What to read, and how to lay it out.
      tokenizer: A fast tokenizer with a chat template.
      split: Read instead of `config.split`; `holdout` for the conversations held out of it.
      seed: Determines which conversations share a row.
      min_rows: If packing would give fewer rows than this (the batch size), each conversation
        gets its own row.
      limit: Read only about so many conversations, the first ones; all if None. A mixture's
        sources contribute in proportion to their weights.

    Returns:
      The rows, with a summary.

    Raises:
      UserError: If the source does not exist, a row is bad or too long and the
        configuration says `error`, or no sample is left.
    """
    encoder = ChatEncoder(tokenizer, enable_thinking=config.enable_thinking)
    summary = Summary(config.row_length)
    chats: list[TokenizedChat] = []
    mixture = config.mixture or ((config.source, 1.0),)
    bounds: list[tuple[int, int, float]] = []
    # Of a sample that is refused or dropped for its length, nothing but its length is needed.
    max_tokens = None if config.too_long == "truncate" else config.row_length + 1
    for source, weight in mixture:
        first = len(chats)
        pairs = tokenized(config, source, split or config.split, encoder, summary, max_tokens)
        share = share_of(limit, weight, mixture)
        for conversation, samples in itertools.islice(pairs, share):
            for sample in samples:
                chats += fit(sample, conversation.where, config, summary)
        if len(chats) == first:
            raise UserError(
                f"data: nothing to learn from in {source}, split {split or config.split}: {summary}"
                + "; add rows, or lower data.holdout" * bool(summary.held_out)
            )
        bounds.append((first, len(chats), weight))
    lengths = [len(chat.tokens) - 1 for chat in chats]
    layouts = [[[i] for i in range(first, last)] for first, last, _ in bounds]
    if config.packing:
        packed = [_packed(lengths[first:last], first, config, seed) for first, last, _ in bounds]
        summary.unpacked = sum(map(len, packed)) < min_rows
        layouts = layouts if summary.unpacked else packed
    groups = [row for layout in layouts for row in layout]
    parts = [(len(layout), weight) for layout, (_, _, weight) in zip(layouts, bounds, strict=True)]
    summary.kept = len(chats)
    summary.lengths = np.array(lengths, np.int32)
    summary.tokens = int(summary.lengths.sum())
    summary.supervised = sum(int(chat.mask[1:].sum()) for chat in chats)
    summary.rows = len(groups)
    return Rows(
        chats,
        groups,
        row_length=config.row_length,
        summary=summary,
        parts=parts,
        sources=[
            (source, last - first)
            for (source, _), (first, last, _) in zip(mixture, bounds, strict=True)
        ],
    )


def share_of(limit: int | None, weight: float, mixture: Sequence[tuple[str, float]]) -> int | None:
    """How many conversations a source of a mixture contributes."""
    total = sum(weight for _, weight in mixture)
    return None if limit is None else max(1, round(limit * weight / total))


def _packed(lengths: list[int], first: int, config: DataConfig, seed: int) -> list[list[int]]:
    """The packed rows of one source, whose samples are numbered from `first`."""
    rows = best_fit(lengths, config.row_length, packing_order(lengths, seed))
    return [[first + i for i in row] for row in rows]


def load_examples(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    split: str,
    limit: int | None = None,
) -> list[Example]:
    """Reads conversations whose last turn a model is to generate.

    Args:
      config: What to read. A mixture's sources contribute in proportion to their weights.
      tokenizer: A fast tokenizer with a chat template.
      split: The split to read.
      limit: Read only the first `limit` examples; all if None.

    Returns:
      Examples in the order of the source.

    Raises:
      UserError: As `load_rows`, except that examples may be of any length.
    """
    encoder = ChatEncoder(tokenizer, enable_thinking=config.enable_thinking)
    mixture = config.mixture or ((config.source, 1.0),)
    examples: list[Example] = []
    for source, weight in mixture:
        summary = Summary(config.row_length)
        pairs = tokenized(config, source, split, encoder, summary)
        for conversation, samples in itertools.islice(pairs, share_of(limit, weight, mixture)):
            last = samples[-1]
            assert isinstance(last, TokenizedChat)  # Nothing is too long without a limit.
            prompt, completion = last.split_last_turn()
            examples.append(
                Example(
                    index=len(examples),
                    messages=conversation.messages,
                    prompt_tokens=tuple(prompt),
                    completion_tokens=tuple(completion),
                    row=conversation.row,
                )
            )
    if not examples:
        raise UserError(f"data: split {split} of {config.source} is empty")
    return examples[:limit]


def conversations(
    config: DataConfig, source: str, split: str, summary: Summary
) -> Iterator[Conversation]:
    """Yields the usable conversations of a source; a bad row is counted or raises.

    Args:
      config: How rows are read, and what happens to bad ones.
      source: Read instead of `config.source`.
      split: Read instead of `config.split`; `holdout` for the conversations held out of it.
      summary: Counts the rows; changed in place.

    Raises:
      UserError: If the source does not exist, or a row is bad and `config.on_bad_row` is `error`.
    """
    if split == HOLDOUT and not config.holdout:
        raise UserError(
            "split: expected data.holdout above 0 for the split 'holdout', got 0; name another "
            "split in eval.split, or set data.holdout=0.05"
        )
    if not config.holdout or split not in (HOLDOUT, config.split):
        yield from _read(config, source, split, summary)
        return
    # Read twice: the held-out prompts are chosen among all prompts.
    holdout = Holdout(
        _read(config, source, config.split, Summary(config.row_length)), config.holdout
    )
    for conversation in _read(config, source, config.split, summary):
        if (conversation in holdout) == (split == HOLDOUT):
            yield conversation
        elif split == HOLDOUT:
            summary.read -= 1  # It is trained on.
        else:
            summary.held_out += 1


def _read(config: DataConfig, source: str, split: str, summary: Summary) -> Iterator[Conversation]:
    for record in read_source(source, split, subset=config.subset, data_dir=config.data_dir):
        summary.read += 1
        try:
            if record.error:
                raise BadRowError(record.error)
            yield to_conversation(
                record.fields,
                where=record.where,
                prompt_column=config.prompt_column,
                completion_column=config.completion_column,
                system=config.system,
                strip_calculator_marks=config.strip_calculator_marks,
            )
        except BadRowError as error:
            _refuse(record.where, error, config, summary)


def tokenized(
    config: DataConfig,
    source: str,
    split: str,
    encoder: ChatEncoder,
    summary: Summary,
    max_tokens: int | None = None,
) -> Iterator[tuple[Conversation, tuple[TokenizedChat | TooLong, ...]]]:
    """Conversations with their samples; one that cannot be encoded counts as a bad row."""
    remaining = conversations(config, source, split, summary)
    while batch := list(itertools.islice(remaining, _CONVERSATIONS_PER_CALL)):
        for conversation, samples in zip(batch, encoder.encode(batch, max_tokens), strict=True):
            if isinstance(samples, BadRowError):
                _refuse(conversation.where, samples, config, summary)
            else:
                yield conversation, samples


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
