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
  [[2, 3, 2, 1, 4, 2, 3, 2, 1, 4], [2, 3, 2, 1, 4, 0, 0, 0, 0, 0]]
  >>> examples[0].prompt_tokens, examples[0].completion_tokens
  ((2, 3, 2, 1), (4, 1))
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ranktuner_jax.data.cache import Tokenized, keep_held_out, tokenize
from ranktuner_jax.data.chat import ChatEncoder, TokenizedChat
from ranktuner_jax.data.chats import Chats
from ranktuner_jax.data.config import DataConfig
from ranktuner_jax.data.encode import Split
from ranktuner_jax.data.packing import Groups
from ranktuner_jax.data.rows import Rows
from ranktuner_jax.data.summary import Summary
from ranktuner_jax.data.widths import choose_widths
from ranktuner_jax.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Example", "check_sources", "load_examples", "load_rows", "share_of"]


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


def check_sources(config: DataConfig, *splits: str) -> None:
    """Finds the sources of a config, and reads none of their rows.

    Called before a tokenizer is loaded, which takes a second, it tells users of a misspelled source
    at once.

    Args:
      config: What to read.
      *splits: The splits to read.

    Raises:
      UserError: If a source or a split does not exist.

    Example:
      >>> check_sources(DataConfig("none.jsonl"), "train")
      Traceback (most recent call last):
      ranktuner_jax.errors.UserError: data.source: expected a file, got none.jsonl, which ...
    """
    for source, _ in config.mixture or ((config.source, 1.0),):
        for split in dict.fromkeys(splits):
            Split(config, source, split)


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
    rather than the third hour, and so that packing knows all lengths. Large sources are tokenized
    once, and then read from a cache: see `DataConfig.cache`.

    Args:
      config: What to read, and how to lay it out.
      tokenizer: A fast tokenizer with a chat template.
      split: Read instead of `config.split`; `holdout` for the conversations held out of it.
      seed: Determines which conversations share a row.
      min_rows: If packing would give fewer rows than this (the batch size), each conversation
        gets its own row. If rows have several widths, each has at least so many rows.
      limit: Read only about so many conversations, the first ones; all if None. A mixture's
        sources contribute in proportion to their weights.

    Returns:
      The rows, with a summary.

    Raises:
      UserError: If the source does not exist, a row is bad or too long and the
        configuration says `error`, or no sample is left.
    """
    encoder = ChatEncoder(tokenizer, enable_thinking=config.enable_thinking)
    split = split or config.split
    mixture = config.mixture or ((config.source, 1.0),)
    summary = Summary(config.row_length)
    loaded: list[Tokenized] = []
    for source, weight in mixture:
        tokens = tokenize(
            Split(config, source, split), encoder, tokenizer, share_of(limit, weight, mixture)
        )
        summary.add(tokens.summary)
        if not sum(part.facts.chats for part in tokens.parts):
            raise UserError(
                f"data: nothing to learn from in {source}, split {split}: {summary}"
                + "; add rows, or lower data.holdout" * bool(summary.held_out)
            )
        loaded.append(tokens)
    stores = [Chats(tokens.parts) for tokens in loaded]
    layouts = [Groups.alone(len(store)) for store in stores]
    if config.packing:
        packed = [
            tokens.packed(store.lengths - 1, seed)
            for tokens, store in zip(loaded, stores, strict=True)
        ]
        summary.unpacked = sum(map(len, packed)) < min_rows
        layouts = layouts if summary.unpacked else packed
    chats = stores[0] if len(stores) == 1 else Chats([p for t in loaded for p in t.parts])
    summary.kept = len(chats)
    summary.lengths = chats.lengths - 1
    summary.tokens = int(summary.lengths.sum(dtype=np.int64))
    summary.rows = sum(map(len, layouts))
    widths: Sequence[int] = ()
    if config.widths > 1:  # Each conversation has a row.
        counts = list(map(len, layouts))
        shares = np.repeat([w / n for n, (_, w) in zip(counts, mixture, strict=True)], counts)
        widths = choose_widths(
            summary.lengths,
            shares,
            config.row_length,
            count=config.widths,
            least=min_rows,
        )
    rows = Rows(
        chats,
        Groups.join(layouts),
        row_length=config.row_length,
        summary=summary,
        parts=[(len(layout), weight) for layout, (_, weight) in zip(layouts, mixture, strict=True)],
        sources=[(source, len(store)) for (source, _), store in zip(mixture, stores, strict=True)],
        widths=widths,
    )
    summary.widths = rows.widths
    return rows


def share_of(limit: int | None, weight: float, mixture: Sequence[tuple[str, float]]) -> int | None:
    """How many conversations a source of a mixture contributes."""
    total = sum(weight for _, weight in mixture)
    return None if limit is None else max(1, round(limit * weight / total))


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
        opened = Split(config, source, split)
        keep_held_out(opened)
        pairs = opened.tokenized(encoder, summary)
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
