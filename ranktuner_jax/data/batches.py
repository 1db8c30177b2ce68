"""Batches in a reproducible order that a checkpoint can resume."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping

import numpy as np

from ranktuner_jax.data.batch import Batch
from ranktuner_jax.data.rows import Rows
from ranktuner_jax.errors import UserError

__all__ = ["BatchIterator"]


class BatchIterator:
    """An endless iterator over this process's share of each global batch.

    Training example g is row `rows.order(seed)[g]`. Each global batch takes the next
    `batch_size` examples, and process p takes the p-th of `process_count` equal runs of them.
    The position is therefore one number, and a run can resume at exactly the same example with
    another number of processes or another batch size. The state follows grain's protocol.

    If rows have several widths, all rows of a global batch have the same one, in every process,
    and the batch size cannot change.

    Args:
      rows: The data set.
      batch_size: Rows of the global batch, divisible by `process_count`.
      seed: Determines the order.
      process_index: The number of this process.
      process_count: The number of processes.

    Raises:
      UserError: If `batch_size` is not a multiple of `process_count`.

    Example:
      >>> from ranktuner_jax.data import Summary, TokenizedChat
      >>> chats = [TokenizedChat(np.array([i, i + 1]), np.array([0, 1])) for i in range(8)]
      >>> rows = Rows(chats, [[i] for i in range(8)], row_length=2, summary=Summary(2))
      >>> batches = BatchIterator(rows, batch_size=4, seed=1)
      >>> _ = next(batches)
      >>> resumed = BatchIterator(rows, batch_size=4, seed=1)
      >>> resumed.set_state(batches.get_state())
      >>> next(resumed).row_index.tolist() == next(batches).row_index.tolist()
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
    ):
        if batch_size < 1 or batch_size % process_count:
            raise UserError(
                f"train.batch_size: expected a multiple of the {process_count} processes, "
                f"got {batch_size}"
            )
        self._rows = rows
        self._order = rows.order(seed, batch_size)
        self._seed = seed
        self._batch_size = batch_size
        self._share = batch_size // process_count
        self._offset = self._share * process_index
        self._next = 0

    def __iter__(self) -> Iterator[Batch[np.ndarray]]:
        return self

    def __next__(self) -> Batch[np.ndarray]:
        first = self._next + self._offset
        self._next += self._batch_size
        indices = [self._order[first + i] for i in range(self._share)]
        return self._rows.take(indices, self._rows.width(indices[0]))

    @property
    def epoch(self) -> float:
        """Passes over the data so far, as a fraction."""
        return self._next / len(self._rows)

    def get_state(self) -> dict[str, int]:
        """The position for a checkpoint: a small JSON dict, the same in every process."""
        return {
            "next_row": self._next,
            "seed": self._seed,
            "fingerprint": self._fingerprint,
        }

    @property
    def _fingerprint(self) -> int:
        """That of the rows, and of the batch size where the order depends on it."""
        rows = self._rows.fingerprint
        several = len(self._rows.widths) > 1
        return zlib.crc32(repr(self._batch_size).encode(), rows) if several else rows

    def set_state(self, state: Mapping[str, int]) -> None:
        """Continues from a position that `get_state` returned.

        Raises:
          UserError: If the position belongs to other rows or to another order.
        """
        if state["fingerprint"] != self._fingerprint or state["seed"] != self._seed:
            raise UserError(
                "data: the checkpoint's position belongs to other rows (its data, tokenizer, "
                "seed, row_length, packing, packer, or widths and batch size differ); restore "
                "these, or use a new workdir"
            )
        self._next = state["next_row"]
