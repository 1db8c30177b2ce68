"""What moved between two audits of the same tokens, counted batch by batch."""

from __future__ import annotations

import dataclasses
import heapq
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ranktuner_jax.diagnostics.report import aggregates
from ranktuner_jax.diagnostics.report.aggregates import PROB_EDGES, context, plane
from ranktuner_jax.diagnostics.report.audited import BATCH_ROWS, Audit
from ranktuner_jax.diagnostics.report.phrasing import counted
from ranktuner_jax.errors import UserError

__all__ = ["CHANGE_EDGES", "MOVED", "SHOWN", "MovedToken", "Moves", "count_moves"]

SHOWN = 15
"""How many tokens are kept at either end."""
MOVED = 0.1
"""Natural units of nll: less than this is not called a move."""
CHANGE_EDGES = np.linspace(-8, 8, 65)
_COLUMNS = (
    *("conversation", "position", "token_id", "token", "nll", "prob", "rank", "entropy"),
    "relative_rank",
)


def count_moves(before: Audit, after: Audit) -> Moves:
    """Counts over all tokens of two audits.

    Raises:
      UserError: If they are of different tokens.
    """
    moves = Moves(max(int(audit.about["vocab_size"]) for audit in (before, after)))
    for one, other in _aligned(before, after):
        moves.add(one, other)
    return moves


@dataclasses.dataclass(frozen=True)
class MovedToken:
    """A token whose nll moved far."""

    conversation: int
    position: int
    before: str
    token: str
    after: str
    probs: tuple[float, float]
    nlls: tuple[float, float]


class Moves:
    """Counts over pairs of tokens; index 0 is before, 1 is after, 4 the Noise Region."""

    def __init__(self, vocab_size: int) -> None:
        self.tokens = self.left_out = 0
        self.nll = np.zeros(2)
        self.first = np.zeros(2)
        self.noise = np.zeros(2)
        self.learnt = self.lost = 0
        self.gained = self.given_back = 0.0
        self.plane = np.zeros((len(PROB_EDGES) - 1,) * 2)
        self.change = np.zeros(len(CHANGE_EDGES) - 1)
        self.quadrants = np.zeros((4, 4))
        self.quadrant_change = np.zeros(4)
        self.type_count, self.type_change = np.zeros(vocab_size), np.zeros(vocab_size)
        self.type_text: dict[int, str] = {}
        # The tokens whose nll fell most, and rose most.
        self._far: tuple[list[Any], list[Any]] = ([], [])
        self._order = itertools.count()

    def add(self, before: pa.RecordBatch, after: pa.RecordBatch) -> None:
        """Counts the same rows of both audits."""
        good = np.isfinite(_numbers(before, "nll")) & np.isfinite(_numbers(after, "nll"))
        self.left_out += int(np.sum(~good))
        if not good.any():
            return
        before, after = before.filter(pa.array(good)), after.filter(pa.array(good))
        pair = (before, after)
        nll = np.stack([_numbers(one, "nll") for one in pair])
        prob = np.stack([_numbers(one, "prob") for one in pair])
        change = nll[1] - nll[0]
        quadrant = [
            aggregates.quadrant(p, _numbers(one, "entropy"))
            for p, one in zip(prob, pair, strict=True)
        ]
        token_id = before.column("token_id").to_numpy().astype(np.int64)
        self.tokens += before.num_rows
        self.nll += nll.sum(1)
        for i, one in enumerate(pair):
            rank = _numbers(one, "rank")
            self.first[i] += np.sum(rank == 1)
            self.noise[i] += np.sum(
                aggregates.in_noise_region(rank, _numbers(one, "relative_rank"))
            )
        self.learnt += int(np.sum(change < -MOVED))
        self.lost += int(np.sum(change > MOVED))
        self.gained -= float(change[change < 0].sum())
        self.given_back += float(change[change > 0].sum())
        self.plane += plane(prob[0], PROB_EDGES, prob[1], PROB_EDGES)
        self.change += aggregates.histogram(change, CHANGE_EDGES)
        self.quadrants += np.bincount(quadrant[0] * 4 + quadrant[1], minlength=16).reshape(4, 4)
        self.quadrant_change += np.bincount(quadrant[0], weights=change, minlength=4)
        size = len(self.type_count)
        self.type_count += np.bincount(token_id, minlength=size)
        self.type_change += np.bincount(token_id, weights=change, minlength=size)
        for index in np.unique(token_id, return_index=True)[1]:
            self.type_text.setdefault(int(token_id[index]), str(before.column("token")[index]))
        self._keep_far(before, nll, prob, change)

    def _keep_far(
        self,
        before: pa.RecordBatch,
        nll: npt.NDArray[Any],
        prob: npt.NDArray[Any],
        change: npt.NDArray[Any],
    ) -> None:
        count = min(SHOWN, len(change))
        for kept, far in zip(self._far, (-change, change), strict=True):
            for i in np.argpartition(-far, count - 1)[:count]:
                if far[i] <= MOVED or (len(kept) == SHOWN and far[i] <= kept[0][0]):
                    continue
                left, token, right = context(before, int(i))
                found = MovedToken(
                    conversation=int(before.column("conversation")[int(i)].as_py()),
                    position=int(before.column("position")[int(i)].as_py()),
                    before=left,
                    token=token,
                    after=right,
                    probs=(float(prob[0, i]), float(prob[1, i])),
                    nlls=(float(nll[0, i]), float(nll[1, i])),
                )
                push = heapq.heappushpop if len(kept) == SHOWN else heapq.heappush
                push(kept, (float(far[i]), -next(self._order), found))

    def far(self, end: int) -> list[MovedToken]:
        """The tokens whose nll fell (0) or rose (1) most, the farthest first."""
        return [token for _, _, token in sorted(self._far[end], reverse=True)]


def _aligned(before: Audit, after: Audit) -> Iterator[tuple[pa.RecordBatch, pa.RecordBatch]]:
    """The same rows of both, checked."""

    def different(what: str) -> UserError:
        return UserError(
            f"{after.folder}: expected an audit of the same tokens as {before.folder}, got {what}; "
            "audit the same data, split and row length with the same tokenizer"
        )

    if before.rows != after.rows:
        raise different(f"{counted(after.rows, 'token')} in place of {before.rows:,}")
    batches = zip(_whole(before), _whole(after), strict=True)
    for one, other in batches:
        for column in ("conversation", "position", "token_id"):
            unequal = np.flatnonzero(_numbers(one, column) != _numbers(other, column))
            if len(unequal):
                i = int(unequal[0])
                place = f"conversation {one.column('conversation')[i]}, position "
                place += str(one.column("position")[i])
                raise different(
                    f"{column} {other.column(column)[i]} in place of {one.column(column)[i]} "
                    f"({place})"
                )
        yield one, other


def _whole(audit: Audit) -> Iterator[pa.RecordBatch]:
    """Batches that are full but for the last one, wherever the row groups end."""
    held: list[pa.RecordBatch] = []
    for batch in audit.batches(_COLUMNS):
        held.append(batch)
        while sum(one.num_rows for one in held) >= BATCH_ROWS:
            table = pa.Table.from_batches(held)
            yield table.slice(0, BATCH_ROWS).combine_chunks().to_batches()[0]
            held = table.slice(BATCH_ROWS).to_batches()
    if held:
        yield pa.Table.from_batches(held).combine_chunks().to_batches()[0]


def _numbers(batch: pa.RecordBatch, column: str) -> npt.NDArray[np.float64]:
    return batch.column(column).to_numpy().astype(np.float64)
