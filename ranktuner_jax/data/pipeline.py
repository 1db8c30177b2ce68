r"""From a configuration to batches: tokenized once, packed, read in a resumable order.

Example:
  A tokenizer of five words, a data set of three sums, and its first batch:

  >>> import pathlib, tempfile, tokenizers, transformers
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
  >>> next(BatchIterator(rows, batch_size=2))["tokens"].tolist()
  [[2, 3, 2, 1, 4, 0, 0, 0, 0, 0], [2, 3, 2, 1, 4, 2, 3, 2, 1, 4]]
  >>> examples[0].prompt_tokens, examples[0].completion_tokens
  ((2, 3, 2, 1), (4, 1))
"""

from __future__ import annotations

import collections
import functools
import itertools
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import grain
import numpy as np

from ranktuner_jax.data.chat import ChatEncoder, TokenizedChat
from ranktuner_jax.data.holdout import HOLDOUT, Holdout
from ranktuner_jax.data.packing import best_fit, packing_order
from ranktuner_jax.data.records import BadRowError, Conversation, to_conversation
from ranktuner_jax.data.sources import read_source
from ranktuner_jax.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "BatchIterator",
    "DataConfig",
    "Example",
    "Rows",
    "Summary",
    "load_examples",
    "load_rows",
]

# Conversations that go to the tokenizer at once: enough to keep its threads busy.
_BATCH = 512


@dataclass(frozen=True)
class DataConfig:
    """What is learnt from, and how it is laid out.

    Attributes:
      source: A built-in name, a file, a TFDS name or folder, or `hub:owner/name`;
        see `read_source`.
      split: Training split, in the notation of TFDS (`train`, `train[:10000]`).
      holdout: What of the training split is kept out of training, to be evaluated as
        `eval.split=holdout`: below 1 a share, from 1 on a number of prompts; 0 for none.
        Conversations that begin with the same prompt stay together.
      mixture: Pairs (source, weight) to train on instead of `source`. Weights
        are shares of rows; each source is reshuffled and repeated on its own.
      subset: The configuration of a hub data set.
      data_dir: Where TFDS keeps its data sets; its own default when empty.
      prompt_column: Column of the prompt, where it has none of the usual names.
      completion_column: Column of the completion.
      chat_template: How conversations become text: empty for the tokenizer's own template,
        `plain` for a built-in one (for base models, which have none), or the path of a
        Jinja file. One that is given replaces the tokenizer's, in the exported model, too.
      system: A system prompt for conversations that have none.
      enable_thinking: Handed to the chat template; Qwen3's understands it.
      strip_calculator_marks: Whether to remove GSM8K's `<<48/2=24>>`.
      row_length: Tokens a row, the T of a batch.
      packing: Whether several conversations share a row.
      on_bad_row: `error` names the first bad row and stops; `skip` counts them.
      too_long: What happens to a conversation longer than a row: `error`,
        `truncate` or `drop`, the last two counted.

    Raises:
      UserError: If a value is none of those allowed.

    Example:
      >>> DataConfig("data/gsm8k", "train[:1000]", row_length=512).packing
      True
    """

    source: str = "chain_sum"
    split: str = "train"
    holdout: float = 0.0
    mixture: tuple[tuple[str, float], ...] = ()
    subset: str = ""
    data_dir: str = ""
    prompt_column: str = ""
    completion_column: str = ""
    chat_template: str = ""
    system: str = ""
    enable_thinking: bool = True
    strip_calculator_marks: bool = False
    row_length: int = 1024
    packing: bool = True
    on_bad_row: str = "error"
    too_long: str = "error"

    def __post_init__(self) -> None:
        for name, allowed in (
            ("on_bad_row", ("error", "skip")),
            ("too_long", ("error", "truncate", "drop")),
        ):
            if getattr(self, name) not in allowed:
                raise UserError(
                    f"data.{name}: expected one of {', '.join(allowed)}, "
                    f"got {getattr(self, name)!r}"
                )
        if not (0 <= self.holdout < 1 or self.holdout % 1 == 0 < self.holdout):
            raise UserError(
                "data.holdout: expected a share below 1, or a whole number of prompts, got "
                f"{self.holdout}"
            )
        if self.row_length < 2:
            raise UserError(f"data.row_length: expected at least 2, got {self.row_length}")
        if bool(self.prompt_column) != bool(self.completion_column):
            raise UserError(
                "data.prompt_column and data.completion_column: expected both or neither, got "
                f"{self.prompt_column!r} and {self.completion_column!r}"
            )
        for entry in self.mixture:
            if len(entry) != 2 or not isinstance(entry[0], str) or not entry[1] > 0:
                raise UserError(
                    f"data.mixture: expected pairs (source, weight above 0), got {entry!r}"
                )
        # A config that was saved as JSON comes back with lists.
        object.__setattr__(self, "mixture", tuple(map(tuple, self.mixture)))


@dataclass
class Summary:
    """What became of every conversation of a source.

    Attributes:
      read: Rows of the source.
      bad: Reason to number of rows skipped; empty unless `on_bad_row=skip`.
      first_bad: The first row skipped, with its reason.
      held_out: Conversations that `data.holdout` keeps out of training.
      dropped: Conversations longer than a row that were left out, or of which
        truncation would have left nothing to learn.
      truncated: Conversations cut at the end of a row.
      kept: Samples that are trained on. A conversation gives several when its
        template shows earlier turns differently later on.
      tokens: Positions of these samples.
      supervised: How many of them are supervised.
      rows: Rows they were laid out in.
      unpacked: Whether each has a row of its own although they could share rows, because rows
        that they share would not fill a batch.
      row_length: Positions of a row.
      lengths: Positions of each sample.
    """

    row_length: int
    read: int = 0
    bad: collections.Counter[str] = field(default_factory=collections.Counter)
    first_bad: str = ""
    held_out: int = 0
    dropped: int = 0
    truncated: int = 0
    kept: int = 0
    tokens: int = 0
    supervised: int = 0
    rows: int = 0
    unpacked: bool = False
    lengths: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))

    @property
    def fill(self) -> float:
        """Share of the positions of all rows that hold a token."""
        return self.tokens / max(1, self.rows * self.row_length)

    def __str__(self) -> str:
        parts = [
            f"{self.read - self.held_out:,} conversations"
            + f" and {self.held_out:,} held out" * bool(self.held_out),
            f"{self.rows:,} rows of {self.row_length:,} ({self.fill:.1%} filled)",
            f"{self.tokens:,} tokens ({self.supervised / max(1, self.tokens):.1%} supervised)",
        ]
        if self.unpacked:
            parts.append("not packed, for packed they would not fill a batch")
        if self.truncated:
            parts.append(f"{self.truncated:,} truncated")
        if self.dropped:
            parts.append(f"{self.dropped:,} too long and dropped")
        if self.bad:
            parts.append(f"{self.bad.total():,} bad and skipped, the first: {self.first_bad}")
        return ", ".join(parts)


class Rows:
    """Rows of one length with random access, each holding one or more conversations.

    `rows[i]` is a dict of arrays [T]; `rows.take([3, 1])` one of arrays [2, T]:

    | key | dtype | meaning |
    | --- | --- | --- |
    | tokens | int32 | inputs |
    | labels | int32 | the token that follows in the same conversation |
    | mask | bool | whether the label is supervised |
    | positions | int32 | from 0 in each conversation |
    | segment_ids | int32 | 1, 2, ... for the conversations of the row; 0 is padding |
    | token_weights | float32 | weight of the label's loss; 0 where it is not supervised |
    | row_index | int32 | i |

    The last token of a conversation is only ever a label: a conversation of n
    tokens takes n - 1 positions.

    Args:
      chats: Tokenized conversations.
      groups: Which of them make up each row.
      row_length: T.
      parts: Rows and weight of each source, for mixtures; together all rows.
      summary: What became of every conversation.

    Example:
      >>> chats = [TokenizedChat(np.array([5, 6, 7]), np.array([0, 0, 1])),
      ...          TokenizedChat(np.array([8, 9]), np.array([0, 1]))]
      >>> rows = Rows(chats, [[0, 1]], row_length=4, summary=Summary(4))
      >>> for key in ("tokens", "labels", "mask", "segment_ids"):
      ...     print(key, rows[0][key].tolist())
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
    ):
        lengths = [len(chat.tokens) for chat in chats]
        self._offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        self._tokens = np.concatenate([chat.tokens for chat in chats])
        self._weights = np.concatenate([chat.weights for chat in chats])
        self._groups = groups
        self._parts = parts or [(len(groups), 1.0)]
        self.row_length = row_length
        self.summary = summary

    def __len__(self) -> int:
        return len(self._groups)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return {key: value[0] for key, value in self.take([index]).items()}

    def take(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        """Stacks rows; the index -1 stands for a row that is all padding.

        A pass over all rows in batches of one shape ends with such rows.

        Args:
          indices: Which rows.

        Returns:
          Arrays [B, T] as the class describes, and row_index [B].
        """
        shape = (len(indices), self.row_length)
        batch: dict[str, np.ndarray] = {
            "tokens": np.zeros(shape, np.int32),
            "labels": np.zeros(shape, np.int32),
            "positions": np.zeros(shape, np.int32),
            "segment_ids": np.zeros(shape, np.int32),
            "token_weights": np.zeros(shape, np.float32),
        }
        for b, index in enumerate(indices):
            at = 0
            for segment, chat in enumerate(self._groups[index] if index >= 0 else (), 1):
                first, last = self._offsets[chat], self._offsets[chat + 1] - 1
                here = slice(at, at := at + int(last - first))
                batch["tokens"][b, here] = self._tokens[first:last]
                batch["labels"][b, here] = self._tokens[first + 1 : last + 1]
                batch["token_weights"][b, here] = self._weights[first + 1 : last + 1]
                batch["positions"][b, here] = np.arange(last - first)
                batch["segment_ids"][b, here] = segment
        batch["mask"] = batch["token_weights"] > 0
        batch["row_index"] = np.array(indices, np.int32)
        return batch

    def order(self, seed: int) -> grain.MapDataset[int]:
        """Row indices in the order of training: reshuffled each epoch, without end.

        Element g is a function of (seed, g) alone, whoever asks for it.

        Args:
          seed: Decides the order.
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
        """A checksum of the rows: a position in them means nothing in others."""
        order = np.fromiter(itertools.chain.from_iterable(self._groups), np.int64)
        layout = repr((self.row_length, list(self._parts))).encode()
        checksum = 0
        for part in (self._tokens.data, self._weights.data, order.data, layout):
            checksum = zlib.crc32(part, checksum)
        return checksum


class BatchIterator:
    """Batches without end; this process's share of each.

    Training example number g is row `rows.order(seed)[g]`: nothing else decides
    it. Step by step the global batch takes the next `batch_size` numbers, and
    process p the p-th of `process_count` equal runs of them. So the
    position is one number, and a run may go on with another number of
    processes, or another batch size, at exactly the example where it stopped.

    Args:
      rows: What to read.
      batch_size: Rows of the global batch, divisible by `process_count`.
      seed: Decides the order.
      process_index: Which share is this process's.
      process_count: How many processes read.
      start: Number of the first training example.

    Raises:
      UserError: If the batch does not divide among the processes.

    Example:
      >>> chats = [TokenizedChat(np.array([i, i + 1]), np.array([0, 1])) for i in range(8)]
      >>> rows = Rows(chats, [[i] for i in range(8)], row_length=2, summary=Summary(2))
      >>> batches = BatchIterator(rows, batch_size=4, seed=1)
      >>> _ = next(batches)
      >>> again = BatchIterator.from_state(rows, batches.state(), batch_size=4, seed=1)
      >>> bool((next(again)["row_index"] == next(batches)["row_index"]).all())
      True
    """

    def __init__(
        self,
        rows: Rows,
        *,
        batch_size: int,
        seed: int = 0,
        process_index: int = 0,
        process_count: int = 1,
        start: int = 0,
    ):
        if batch_size < 1 or batch_size % process_count:
            raise UserError(
                f"train.batch_size: expected a multiple of the {process_count} processes, "
                f"got {batch_size}"
            )
        self._rows = rows
        self._order = rows.order(seed)
        self._seed = seed
        self._batch_size = batch_size
        self._share = batch_size // process_count
        self._offset = self._share * process_index
        self._next = start

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        first = self._next + self._offset
        self._next += self._batch_size
        return self._rows.take([int(self._order[first + i]) for i in range(self._share)])

    @property
    def epoch(self) -> float:
        """How often the data has been seen, as a fraction."""
        return self._next / len(self._rows)

    def state(self) -> dict[str, int]:
        """The position, the same in every process: a small JSON dict for the checkpoint."""
        return {
            "next_row": self._next,
            "seed": self._seed,
            "fingerprint": self._rows.fingerprint,
        }

    @classmethod
    def from_state(
        cls,
        rows: Rows,
        state: Mapping[str, int],
        *,
        batch_size: int,
        seed: int = 0,
        process_index: int = 0,
        process_count: int = 1,
    ) -> BatchIterator:
        """An iterator that goes on where `state` was taken.

        Raises:
          UserError: If the position belongs to other rows or to another order.
        """
        if state["fingerprint"] != rows.fingerprint or state["seed"] != seed:
            raise UserError(
                "data: the checkpoint's position belongs to other rows (its data, tokenizer, "
                "seed, row_length or packing differ); restore these, or use a new workdir"
            )
        return cls(
            rows,
            batch_size=batch_size,
            seed=seed,
            process_index=process_index,
            process_count=process_count,
            start=state["next_row"],
        )


@dataclass(frozen=True)
class Example:
    """A held-out conversation, for sampling and grading.

    Attributes:
      index: Its number within the split.
      messages: All turns; the last one is the reference answer.
      prompt_tokens: What a sampler is given.
      completion_tokens: The reference answer, with its end-of-turn token.
      row: The source's own row: what a grader needs.
    """

    index: int
    messages: tuple[dict[str, str], ...]
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
) -> Rows:
    """Reads, tokenizes and packs a split.

    All of it is tokenized at once, before training: so that a bad row is found
    in the first minute and not in the third hour, and packing sees all lengths.

    Args:
      config: What to read, and how to lay it out.
      tokenizer: A fast tokenizer with a chat template.
      split: Read instead of `config.split`; `holdout` is what that split leaves out.
      seed: Decides which conversations share a row.
      min_rows: Where packing would give fewer rows (the data do not fill a batch), every
        conversation has a row of its own.

    Returns:
      The rows, with a summary of what became of every conversation.

    Raises:
      UserError: If the source does not exist, a row is bad or too long and the
        configuration says `error`, or nothing is left.
    """
    encoder = ChatEncoder(tokenizer, enable_thinking=config.enable_thinking)
    summary = Summary(config.row_length)
    chats: list[TokenizedChat] = []
    bounds: list[tuple[int, int, float]] = []
    for source, weight in config.mixture or ((config.source, 1.0),):
        first = len(chats)
        for conversation, samples in _tokenized(
            config, source, split or config.split, encoder, summary
        ):
            for sample in samples:
                chats += _fit(sample, conversation.where, config, summary)
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
    return Rows(chats, groups, row_length=config.row_length, summary=summary, parts=parts)


def _packed(lengths: list[int], first: int, config: DataConfig, seed: int) -> list[list[int]]:
    """Rows of one source's samples, numbered from `first`."""
    rows = best_fit(lengths, config.row_length, packing_order(lengths, seed))
    return [[first + i for i in row] for row in rows]


def load_examples(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    split: str,
    limit: int | None = None,
) -> list[Example]:
    """Reads conversations whose last turn is to be generated and compared.

    Args:
      config: What to read. Of a mixture each source gives its share.
      tokenizer: A fast tokenizer with a chat template.
      split: Which split.
      limit: At most so many, the first ones; all when None.

    Returns:
      Examples in the order of the source.

    Raises:
      UserError: As `load_rows`; but no example is too long.
    """
    encoder = ChatEncoder(tokenizer, enable_thinking=config.enable_thinking)
    mixture = config.mixture or ((config.source, 1.0),)
    total = sum(weight for _, weight in mixture)
    examples: list[Example] = []
    for source, weight in mixture:
        share = None if limit is None else max(1, round(limit * weight / total))
        summary = Summary(config.row_length)
        pairs = _tokenized(config, source, split, encoder, summary)
        for conversation, samples in itertools.islice(pairs, share):
            prompt, completion = samples[-1].split_last_turn()
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
    """Conversations of a source that can be used; the others are counted or raise.

    Args:
      config: How rows are read, and what happens to bad ones.
      source: Read instead of `config.source`.
      split: Read instead of `config.split`; `holdout` is what that split leaves out.
      summary: Where rows are counted.

    Raises:
      UserError: If the source does not exist, or a row is bad and must not be.
    """
    if split == HOLDOUT and not config.holdout:
        raise UserError(
            "split: expected data.holdout above 0 for the split 'holdout', got 0; name another "
            "split in eval.split, or set data.holdout=0.05"
        )
    if not config.holdout or split not in (HOLDOUT, config.split):
        yield from _read(config, source, split, summary)
        return
    # All is read twice: which prompts there are is known at the end.
    holdout = Holdout(
        _read(config, source, config.split, Summary(config.row_length)), config.holdout
    )
    for conversation in _read(config, source, config.split, summary):
        if (conversation in holdout) == (split == HOLDOUT):
            yield conversation
        elif split == HOLDOUT:
            summary.read -= 1  # It belongs to training.
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


def _tokenized(
    config: DataConfig, source: str, split: str, encoder: ChatEncoder, summary: Summary
) -> Iterator[tuple[Conversation, tuple[TokenizedChat, ...]]]:
    """Conversations with their samples; those that the template refuses count as bad."""
    remaining = conversations(config, source, split, summary)
    while batch := list(itertools.islice(remaining, _BATCH)):
        for conversation, samples in zip(batch, encoder.encode(batch), strict=True):
            if isinstance(samples, BadRowError):
                _refuse(conversation.where, samples, config, summary)
            else:
                yield conversation, samples


def _refuse(where: str, error: BadRowError, config: DataConfig, summary: Summary) -> None:
    if config.on_bad_row == "error":
        raise UserError(f"{where}: {error}; mend the row, or set data.on_bad_row=skip")
    summary.bad[str(error)] += 1
    summary.first_bad = summary.first_bad or f"{where}: {error}"


def _fit(
    chat: TokenizedChat, where: str, config: DataConfig, summary: Summary
) -> list[TokenizedChat]:
    """The sample if it fits in a row, what is left of it, or nothing."""
    positions = len(chat.tokens) - 1
    if positions <= config.row_length:
        return [chat]
    if config.too_long == "error":
        raise UserError(
            f"{where}: the conversation takes {positions:,} tokens, a row holds "
            f"{config.row_length:,}; raise data.row_length, or set data.too_long=truncate or drop"
        )
    cut = slice(config.row_length + 1)
    if config.too_long == "drop" or not chat.mask[cut][1:].any():
        summary.dropped += 1
        return []
    summary.truncated += 1
    return [TokenizedChat(chat.tokens[cut], chat.weights[cut])]
