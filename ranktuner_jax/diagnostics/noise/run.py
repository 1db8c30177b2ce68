"""Draws noise, scores it and measures it into a folder, and resumes there after an interruption."""

from __future__ import annotations

import dataclasses
import io
import itertools
import pathlib
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ranktuner_jax import files, losses
from ranktuner_jax.data import Batch, TokenizedChat
from ranktuner_jax.diagnostics.noise.inject import KINDS, Polluted, pollute
from ranktuner_jax.diagnostics.noise.result import CEILING, CHANCE, RESULTS, SCORES, Result, Table
from ranktuner_jax.diagnostics.noise.sequences import Sequences, score_sequences
from ranktuner_jax.diagnostics.noise.table import Draw, measure
from ranktuner_jax.diagnostics.scoring import method_weights
from ranktuner_jax.errors import UserError
from ranktuner_jax.evals.processes import on_first_process

__all__ = ["Cell", "Plan", "run_noise"]

_PARTS, _CLEAN = ".parts", "clean"
# The ends of an interval from fewer change visibly with the seed of the bootstrap.
_RESAMPLES = 500

Scorer = Callable[[Batch[np.ndarray]], losses.TokenStats]


@dataclasses.dataclass(frozen=True)
class Cell:
    """One draw of one kind of noise, which serves all rates."""

    kind: str
    length: int
    seed: int

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.kind}-{self.length}-{self.seed}"


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which noise is drawn.

    Attributes:
      kinds: Names in `KINDS`.
      lengths: Lengths of a span, for the kinds that have one.
      rates: Shares of noise among all supervised tokens.
      seeds: How often noise is drawn.

    Raises:
      UserError: If a value is not allowed.

    Example:
      >>> [cell.name for cell in Plan(kinds=("replaced", "number"), seeds=1).cells]
      ['replaced-4-0', 'replaced-16-0', 'number-0-0']
    """

    kinds: tuple[str, ...] = ("replaced", "inserted")
    lengths: tuple[int, ...] = (4, 16)
    rates: tuple[float, ...] = (0.0082,)
    seeds: int = 5

    def __post_init__(self) -> None:
        for name, allowed, words in (
            ("kinds", KINDS.__contains__, f"some of {', '.join(KINDS)}"),
            ("lengths", lambda length: length >= 1, "whole numbers of at least 1"),
            ("rates", lambda rate: 0 < rate < 1, "shares between 0 and 1"),
        ):
            values = getattr(self, name)
            wrong = [value for i, value in enumerate(values) if value in values[:i]]
            wrong += itertools.filterfalse(allowed, values)
            if wrong or not values:
                got = wrong[0] if wrong else "none"
                raise UserError(f"--{name}: expected {words}, each once, got {got}")
        if self.seeds < 1:
            raise UserError(f"--seeds: expected at least 1, got {self.seeds}")

    @property
    def groups(self) -> list[tuple[str, int]]:
        """The kinds with their lengths; 0 for those that have none."""
        return [
            (kind, length)
            for kind in self.kinds
            for length in (self.lengths if KINDS[kind].has_length else (0,))
        ]

    @property
    def cells(self) -> list[Cell]:
        """All that is drawn."""
        return [Cell(*group, seed) for group in self.groups for seed in range(self.seeds)]


def run_noise(
    make_scorer: Callable[[], Scorer],
    sequences: Sequences,
    plan: Plan,
    folder: pathlib.Path,
    *,
    methods: Mapping[str, losses.Weighting],
    settings: Mapping[str, Any],
    batch_size: int,
    progress: Callable[[int, int, float], None] = lambda *_: None,
    check: Callable[[], None] = lambda: None,
) -> Result:
    """Draws noise, scores it and measures it, or goes on where an earlier call was stopped.

    The sequences without noise are scored once; of each draw, what is or follows noise, since a
    model of what came before sees no difference. Each of these is a file in `folder/.parts` until
    all are done; then results.json has everything. With several processes all must call; process 0
    reads and writes the folder.

    Args:
      make_scorer: Called if something is to be scored; see `score_sequences`.
      sequences: The sequences.
      plan: Which noise is drawn.
      folder: A new folder, or one of the same call.
      methods: Their weights rank the tokens; see `audit_methods`.
      settings: What else decides the result, such as the model; JSON.
      batch_size: Rows that are scored together.
      progress: Called with the number of tokens scored, of those to be scored in this call, and of
        tokens per second.
      check: Called after each draw; it may raise to stop.

    Returns:
      The result; only process 0 has its tables.

    Raises:
      UserError: If the folder holds something else, or a rate cannot be reached.
    """
    drawn = {
        cell: pollute(sequences, cell.kind, cell.length, max(plan.rates), cell.seed)
        for cell in plan.cells
    }
    clean = sequences.clean
    decided = {
        **settings,
        **dataclasses.asdict(plan),
        "methods": {name: repr(method) for name, method in methods.items()},
        "digest": sequences.digest,
    }
    tokens = sum(int(chat.mask[1:].sum()) for chat in clean)
    result = _claim(folder, Result(decided, len(clean), tokens, ()))
    if result.tables:
        return result
    work = {_CLEAN: clean} | {
        cell.name: [_changed(span) for span in spans] for cell, spans in drawn.items()
    }
    kept = on_first_process(lambda: [name for name in work if _part(folder, name).exists()])
    missing = {name: chats for name, chats in work.items() if name not in kept}
    total = sum(len(chat.tokens) - 1 for chats in missing.values() for chat in chats)
    done, start = 0, time.monotonic()

    def report(tokens: int) -> None:
        nonlocal done
        done += tokens
        progress(done, total, done / max(time.monotonic() - start, 1e-9))

    scorer = make_scorer() if missing else None
    for name, chats in missing.items():
        assert scorer is not None
        stats = score_sequences(
            scorer,
            chats,
            row_length=sequences.row_length,
            batch_size=batch_size,
            progress=report,
        )
        if jax.process_index() == 0:
            _write(_part(folder, name), stats)
        check()
    if jax.process_index() != 0:
        return result
    before = _read(_part(folder, _CLEAN))
    tables = []
    for kind, length in plan.groups:
        cells = [cell for cell in drawn if (cell.kind, cell.length) == (kind, length)]
        scored = [(drawn[cell], _read(_part(folder, cell.name))) for cell in cells]
        for rate in plan.rates:
            # A higher rate has the spans of a lower one and more.
            draws = [
                _merge(clean, before, spans[: _nearest(spans, rate)], stats)
                for spans, stats in scored
            ]
            used = tuple(_nearest(spans, rate) for spans, _ in scored)
            tables.append(_table((kind, length, rate), used, draws, methods, len(clean)))
    result = dataclasses.replace(result, tables=tuple(tables))
    files.write_whole(folder / RESULTS, result.to_json())
    shutil.rmtree(folder / _PARTS)
    return result


def _nearest(spans: Sequence[Polluted], rate: float) -> int:
    """How many of the spans come nearest to a rate; at least one."""
    return 1 + int(np.argmin([abs(span.rate - rate) for span in spans]))


def _changed(span: Polluted) -> TokenizedChat:
    """The sequence with its tokens before the noise unsupervised."""
    seen = np.logical_or.accumulate(span.noise)
    return TokenizedChat(span.chat.tokens, span.chat.weights * seen)


def _merge(
    clean: Sequence[TokenizedChat],
    before: losses.TokenStats,
    spans: Sequence[Polluted],
    after: losses.TokenStats,
) -> tuple[Draw, losses.TokenStats]:
    """The supervised tokens of all sequences, of those with a span as they are with it.

    Args:
      clean: The sequences without noise.
      before: The statistics of their supervised tokens.
      spans: Sequences with noise.
      after: The statistics of the supervised tokens of `_changed` of these, and of more spans.
    """
    places = _ranges([int(chat.mask[1:].sum()) for chat in clean], 0)
    noise, following = ([np.zeros(len(place), bool) for place in places] for _ in range(2))
    changed = _ranges([int(_changed(span).mask[1:].sum()) for span in spans], len(before.nll))
    for span, place in zip(spans, changed, strict=True):
        mask = span.chat.mask[1:]
        unchanged = places[span.index][: mask.sum() - len(place)]
        places[span.index] = np.concatenate([unchanged, place])
        noise[span.index], following[span.index] = span.noise[1:][mask], span.after[1:][mask]
    take = np.concatenate(places)
    sequence = np.repeat(np.arange(len(clean)), [len(place) for place in places])
    stats = jax.tree.map(lambda *parts: np.concatenate(parts)[take], before, after)
    return Draw(sequence, np.concatenate(noise), np.concatenate(following)), stats


def _ranges(counts: Sequence[int], start: int) -> list[np.ndarray]:
    """Indices from `start` on, in runs of these lengths."""
    stops = start + np.cumsum(counts)
    return [np.arange(stop - count, stop) for count, stop in zip(counts, stops, strict=True)]


def _table(
    what: tuple[str, int, float],
    polluted: tuple[int, ...],
    draws: Sequence[tuple[Draw, losses.TokenStats]],
    methods: Mapping[str, losses.Weighting],
    sequences: int,
) -> Table:
    scores = [_scores(draw, stats, methods) for draw, stats in draws]
    # The same for all scores and tables, so that their differences are not those of the bootstrap.
    weights = np.random.default_rng(0).exponential(size=(_RESAMPLES, sequences))
    noise = tuple(int(draw.noise.sum()) for draw, _ in draws)
    tokens = tuple(len(draw.noise) for draw, _ in draws)
    return Table(
        *what,
        realised=tuple(n / of for n, of in zip(noise, tokens, strict=True)),
        polluted=polluted,
        noise=noise,
        tokens=tokens,
        rows={
            name: measure([draw for draw, _ in draws], [score[name] for score in scores], weights)
            for name in scores[0]
        },
    )


def _scores(
    draw: Draw, stats: losses.TokenStats, methods: Mapping[str, losses.Weighting]
) -> dict[str, np.ndarray]:
    """What the rows of the table rank tokens by, [N] each."""
    sequence, mask = jnp.asarray(draw.sequence), jnp.ones(len(draw.sequence), bool)
    batch_stats = {
        name: float(method.batch_statistic(jnp.asarray(stats.nll), mask, sequence, None))
        for name, method in methods.items()
        if method.uses_batch_statistic
    }
    weights = method_weights(stats, methods, batch_stats)
    # In float64, where probabilities below 1e-8 still differ.
    weights[""] = -np.expm1(-stats.nll.astype(np.float64))
    first = {name: weights[method] for name, method in SCORES.items() if method in weights}
    others = {name: weights[name] for name in methods if name not in SCORES.values()}
    others[CHANCE] = others.pop("sft")
    return {**first, **others, CEILING: draw.noise.astype(np.float32)}


def _claim(folder: pathlib.Path, result: Result) -> Result:
    """Marks the folder as that of this result, or returns the one that it holds."""
    return Result.from_json(on_first_process(lambda: _opened(folder, result)))


def _opened(folder: pathlib.Path, result: Result) -> str:
    """The content of results.json, which is written if the folder is new."""
    path = folder / RESULTS
    if not path.exists():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(
                f"--output: expected a new folder or one of the same command, got {folder}, which "
                "holds something else; choose another"
            )
        files.write_whole(path, result.to_json())
    text = path.read_text(encoding="utf-8")
    try:
        old = Result.from_json(text).settings
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"--output: expected the results of a noise table in {path}, got a broken file "
            f"({type(error).__name__}: {error}); choose another folder"
        ) from error
    new = Result.from_json(result.to_json()).settings
    for name in new:
        if old.get(name) != new[name]:
            raise UserError(
                f"--output: {folder} holds a noise table with {name} {old.get(name)!r}, this one "
                f"has {new[name]!r}; choose another folder, or the same flags to go on"
            )
    return text


def _part(folder: pathlib.Path, name: str) -> pathlib.Path:
    return folder / _PARTS / f"{name}.npz"


def _write(path: pathlib.Path, stats: losses.TokenStats) -> None:
    content = io.BytesIO()
    arrays: dict[str, Any] = dict(vars(stats))
    np.savez(content, **arrays)
    files.write_whole(path, content.getvalue())


def _read(path: pathlib.Path) -> losses.TokenStats:
    with np.load(path) as arrays:
        fields = dict(arrays)
    return losses.TokenStats(**fields | {"vocab_size": int(fields["vocab_size"])})
