"""Scores a data set under a model, token by token, into a folder; goes on after an interruption."""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ranktuner_jax import losses
from ranktuner_jax.data import Batch, Rows, Summary
from ranktuner_jax.diagnostics import columns
from ranktuner_jax.diagnostics.conversations import (
    RULE,
    Alternatives,
    Chosen,
    choose,
    describe_conversation,
    find_alternatives,
)
from ranktuner_jax.diagnostics.layout import Groups, batches, cut, owners, pack
from ranktuner_jax.diagnostics.parts import AuditFolder
from ranktuner_jax.diagnostics.scoring import TokenScorer, method_weights
from ranktuner_jax.diagnostics.texts import TokenTexts
from ranktuner_jax.errors import UserError
from ranktuner_jax.evals.processes import from_first_process, on_first_process
from ranktuner_jax.evals.sampler import divisible
from ranktuner_jax.models import Decoder, DecoderConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["CONVERSATIONS", "TOKENS", "Audit"]

TOKENS, CONVERSATIONS = "tokens.parquet", "conversations.jsonl"

# Work that is lost at most when a process is killed.
_ROWS_PER_PART = 64
_ROW_GROUP = 1 << 17  # Tokens that are held before they are written.

Progress = Callable[[int, int, float], None]
"""Called with the supervised tokens done, all of them, and tokens per second."""


class Audit:
    """An audit of a data set, kept in a folder.

    The folder gets `tokens.parquet`, one row for each supervised token; `conversations.jsonl`, a
    few conversations whole; and `audit.json`, last. An interrupted audit goes on where it was:
    make it again with the same arguments.

    Over a mesh (`model.mesh`) rows are divided over its batch axes. With several processes all
    must do the same; process 0 reads and writes the folder.

    Args:
      rows: The data; how they are packed is not used.
      tokenizer: Gives the tokens' texts.
      folder: The folder.
      decoder: The configuration of the model.
      methods: The methods whose weights are wanted, by name; see `audit_methods`.
      about: What `audit.json` says of the audit: "model", "source", "split" and "config".
      identity: What else the numbers depend on, such as the model's files.
      batch_size: Rows scored together; raised to what the mesh divides.
      packing: Whether several conversations may share a row.
      progress: Called after each part.
      check_stop: Called after each part; whatever it raises ends the audit, which can go on.

    Raises:
      UserError: If the model and the data do not fit.

    Example:
      `ranktuner_jax.train.commands.audit` makes one from a config.
    """

    def __init__(
        self,
        rows: Rows,
        tokenizer: PreTrainedTokenizerBase,
        folder: str | os.PathLike[str],
        *,
        decoder: DecoderConfig,
        methods: Mapping[str, losses.Weighting],
        about: Mapping[str, Any],
        identity: Mapping[str, Any] | None = None,
        batch_size: int = 16,
        packing: bool = True,
        progress: Progress = lambda *_: None,
        check_stop: Callable[[], None] = lambda: None,
    ) -> None:
        _check_fits(rows, decoder)
        self._rows, self._texts = rows, TokenTexts(tokenizer)
        self._methods, self._about = dict(methods), about
        self._vocab_size = decoder.vocab_size
        self._batch_size, self._packing = batch_size, packing
        self._progress, self._check_stop = progress, check_stop
        named = {name: about[name] for name in ("model", "source", "split")}
        self._folder = AuditFolder(
            folder,
            {
                **named,
                "conversations": len(rows.lengths),
                "methods": {name: repr(method) for name, method in self._methods.items()},
                **about["config"],
                **(identity or {}),
                "data": rows.fingerprint,
            },
        )
        self._stops: list[int] = []
        self._done: list[int] = []

    def claim(self) -> bool:
        """Makes the folder this audit's; a model is not needed yet.

        Returns:
          Whether the audit is finished already.

        Raises:
          UserError: If the folder cannot be written, or holds another audit or anything else.
        """

        def claimed() -> tuple[list[int], list[int], bool]:
            rows = self._rows
            stops = cut(rows.lengths, rows.row_length, _ROWS_PER_PART, packing=self._packing)
            return self._folder.claim(stops), self._folder.done(), self._folder.finished

        self._stops, self._done, finished = on_first_process(claimed)
        return finished

    def result(self) -> dict[str, Any]:
        """What `audit.json` of a finished audit holds."""
        self._folder.clean()  # A process may have been killed before it could.
        return self._folder.result()

    def run(self, model: Decoder) -> None:
        """Scores what is not scored yet, and writes the result; `claim` comes first.

        Args:
          model: The model.
        """
        scorer = TokenScorer(model)
        batch_size = divisible(self._batch_size, model.mesh)
        self._score(scorer, batch_size)
        means, chosen = None, ""
        if jax.process_index() == 0:
            means = self._means()
            chosen = json.dumps(choose(means.counts, means.nll, means.scale))
        shown = [Chosen(*one) for one in json.loads(from_first_process(chosen))]
        found = find_alternatives(
            scorer, self._rows, shown, batch_size=batch_size, packing=self._packing
        )
        if means is not None:
            self._finish(means, shown, found)

    def _score(self, scorer: TokenScorer, batch_size: int) -> None:
        """Scores the parts that are missing."""
        spans = dict(enumerate(zip([0, *self._stops], self._stops, strict=False)))
        missing = [part for part in spans if part not in self._done]
        lengths, total = self._rows.lengths, self._rows.summary.supervised
        before = sum(self._folder.read(part, []).num_rows for part in self._folder.done())
        start = last = time.monotonic()
        tokens = before

        def submit() -> Iterator[tuple[int, Groups, Batch[np.ndarray], losses.TokenStats]]:
            for part in missing:
                groups = pack(
                    range(*spans[part]), lengths, self._rows.row_length, packing=self._packing
                )
                for here, batch in batches(self._rows, groups, batch_size):
                    yield part, here, batch, scorer(batch)

        # The device computes the next batch while the host looks at this one.
        for part, scored in itertools.groupby(_one_ahead(submit()), key=lambda item: item[0]):
            table = _in_order([_measured(*item) for _, *item in scored])
            now = time.monotonic()
            tokens += table.num_rows
            if jax.process_index() == 0:
                self._folder.write(part, table, seconds=now - last)
            last = now
            self._progress(tokens, total, (tokens - before) / max(now - start, 1e-9))
            self._check_stop()

    def _parts(self, names: Sequence[str] | None = None) -> Iterator[pa.Table]:
        return (self._folder.read(part, names) for part in range(len(self._stops)))

    def _means(self) -> _Means:
        """What is known of each conversation."""
        total = len(self._rows.lengths)
        counts, nll, scale = np.zeros(total, np.int64), np.zeros(total), np.zeros(total)
        for table in self._parts():
            stats = columns.token_stats_of(table, self._vocab_size)
            conversation = table["conversation"].to_numpy()
            if not len(conversation):
                continue
            first, last = conversation[0], conversation[-1] + 1
            here = slice(first, last)
            weights = method_weights(stats, {"S": losses.RankTuner("one")})["S"]
            counts[here] = np.bincount(conversation - first)
            nll[here] = np.bincount(conversation - first, stats.nll)
            scale[here] = np.bincount(conversation - first, weights)
        divisor = np.maximum(counts, 1)
        return _Means(counts, nll / divisor, scale / divisor)

    def _batch_statistics(self, means: _Means) -> dict[str, float]:
        """The statistics that some methods take over a batch, here over the whole data set."""
        found = {}
        for name, method in self._methods.items():
            if not method.uses_batch_statistic:
                continue
            if isinstance(method, losses.TALR):
                # It reads the means of sequences alone, so a token can stand for each.
                scored = np.flatnonzero(means.counts)
                nll, sequence = means.nll[scored].astype(np.float32), scored
            else:
                tables = list(self._parts(["nll", "conversation"]))
                nll, sequence = (
                    np.concatenate([table[name].to_numpy() for table in tables])
                    for name in ("nll", "conversation")
                )
            mask, sequence_ids = jnp.ones(len(nll), bool), jnp.asarray(sequence, jnp.int32)
            found[name] = float(method.batch_statistic(jnp.asarray(nll), mask, sequence_ids, None))
        return found

    def _finish(self, means: _Means, shown: Sequence[Chosen], found: Alternatives) -> None:
        """Writes the files of the result."""
        statistics = self._batch_statistics(means)
        tokens = int(means.counts.sum())
        counts = {
            "conversations": int(np.count_nonzero(means.counts)),
            "tokens": tokens,
            "vocab_size": self._vocab_size,
            "talr_tau": statistics.get("talr"),
        }
        named = {name: self._about[name] for name in ("model", "source", "split")}
        schema = columns.token_schema(self._methods, {**named, **counts})
        sums = _Sums(self._methods)
        lines: dict[int, str] = {}

        def tables() -> Iterator[pa.Table]:
            for measured in self._parts():
                table = columns.token_table(
                    measured,
                    schema,
                    methods=self._methods,
                    batch_stats=statistics,
                    vocab_size=self._vocab_size,
                    texts=self._texts,
                    sources=self._rows.sources,
                )
                sums.add(table)
                for one in shown:
                    scored = table.filter(pc.equal(table["conversation"], one.conversation))
                    if scored.num_rows:
                        line = describe_conversation(one, self._rows, scored, found, self._texts)
                        lines[one.conversation] = json.dumps(line, ensure_ascii=False)
                yield table

        with pq.ParquetWriter(self._folder.scratch(TOKENS), schema, compression="zstd") as writer:
            for group in _regroup(tables(), _ROW_GROUP):
                writer.write_table(group, row_group_size=_ROW_GROUP)
        text = "".join(f"{lines[one.conversation]}\n" for one in shown)
        self._folder.scratch(CONVERSATIONS).write_text(text, encoding="utf-8")
        for name in (TOKENS, CONVERSATIONS):
            self._folder.publish(name)
        seconds = self._folder.seconds()
        self._folder.finish(
            {
                "version": 1,
                **named,
                "row_length": self._rows.row_length,
                **counts,
                "methods": list(self._methods),
                "config": self._about["config"],
                "chosen": RULE,
                **_left_out(self._rows.summary),
                "batch_statistics": statistics,
                "weights": sums.summary(),
                "seconds": seconds,
                "tokens_per_second": tokens / max(seconds, 1e-9),
            }
        )


class _Means(NamedTuple):
    """Of each conversation: supervised tokens, and the means of nll and relative scale."""

    counts: np.ndarray
    nll: np.ndarray
    scale: np.ndarray


class _Sums:
    """Sums over all tokens, from which the weights are summarised."""

    def __init__(self, methods: Iterable[str]) -> None:
        self._sums = {name: np.zeros(3) for name in methods}
        self._tokens = 0

    def add(self, table: pa.Table) -> None:
        """Adds the tokens of a table."""
        base = self._weights(table, "ranktuner")
        for name, sums in self._sums.items():
            weights = self._weights(table, name)
            sums += [weights.sum(), weights @ weights, weights @ base]
        self._tokens += table.num_rows

    @staticmethod
    def _weights(table: pa.Table, name: str) -> np.ndarray:
        return table[f"{columns.WEIGHT}{name}"].to_numpy().astype(np.float64)

    def summary(self) -> dict[str, dict[str, float | None]]:
        """By method: mean weight, effective share of tokens, correlation with RankTuner's."""
        tokens = max(self._tokens, 1)
        base = self._sums["ranktuner"] / tokens
        found: dict[str, dict[str, float | None]] = {}
        for name, sums in self._sums.items():
            mean, square, product = sums / tokens
            spread = (square - mean**2) * (base[1] - base[0] ** 2)
            constant = spread <= 1e-12 * square * base[1]
            found[name] = {
                "mean": mean,
                "effective_share": mean**2 / square if square else 0.0,
                "correlation": None if constant else (product - mean * base[0]) / spread**0.5,
            }
        return found


def _left_out(summary: Summary) -> dict[str, int]:
    """How many conversations are not audited whole."""
    skipped = summary.bad.total()
    return {"truncated": summary.truncated, "dropped": summary.dropped, "skipped": skipped}


def _measured(
    groups: Groups, batch: Batch[np.ndarray], stats: losses.TokenStats
) -> dict[str, np.ndarray]:
    """The measured columns of the supervised tokens of a batch, in the order of its rows."""
    conversation, position = owners(groups, batch)
    arrays = {"conversation": conversation, "position": position, "token_id": batch.labels}
    on_host = jax.device_get(stats)
    arrays |= {name: getattr(on_host, name) for name in columns.MEASURED.names[len(arrays) :]}
    return {name: array[batch.mask] for name, array in arrays.items()}


def _in_order(pieces: Sequence[Mapping[str, np.ndarray]]) -> pa.Table:
    """The measured columns of a part, in the order of the data."""
    whole = {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
    order = np.lexsort((whole["position"], whole["conversation"]))
    return pa.table({name: array[order] for name, array in whole.items()}, columns.MEASURED)


def _one_ahead(items: Iterable[Any]) -> Iterator[Any]:
    """Each item once the next one has been made."""
    return (item for item, _ in itertools.pairwise(itertools.chain(items, [None])))


def _regroup(tables: Iterable[pa.Table], size: int) -> Iterator[pa.Table]:
    """The same rows in tables of `size` of them; the last one may be smaller."""
    held: list[pa.Table] = []
    for table in tables:
        held.append(table)
        while sum(table.num_rows for table in held) >= size:
            joined = pa.concat_tables(held)
            yield joined.slice(0, size)
            held = [joined.slice(size)]
    if held:
        yield pa.concat_tables(held)


def _check_fits(rows: Rows, decoder: DecoderConfig) -> None:
    if rows.largest_id >= decoder.vocab_size:
        raise UserError(
            f"model: expected a vocabulary that holds the tokenizer's token {rows.largest_id}, got "
            f"one of {decoder.vocab_size:,}; use the tokenizer that belongs to the model"
        )
    longest = int(rows.lengths.max())
    if longest > decoder.max_positions:
        raise UserError(
            f"data.row_length: expected conversations of at most {decoder.max_positions:,} tokens, "
            f"the model's context, got one of {longest:,}; lower it, and set "
            "data.too_long=truncate or drop"
        )
