"""The batches of a run, with the position from which a resumed run continues."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from jax.sharding import Mesh

from ranktuner_jax import data
from ranktuner_jax.errors import UserError
from ranktuner_jax.train.runtime.mesh import row_share

__all__ = ["BatchSource", "Batches"]

Batches = data.Rows | Iterable[data.Batch | Mapping[str, Any]]


class BatchSource:
    """An iterator over batches that can be moved to the position of a run.

    Args:
      batches: Rows, or batches from the beginning of the run.
      mesh: Determines which rows this process reads.
      batch_size: Rows per step; required for rows, not allowed for batches.
      seed: Seed of the order of the rows.

    Attributes:
      widths: The lengths that rows may have; empty if all have that of the first.

    Raises:
      ValueError: If the batch size is missing for rows, or given for batches.
    """

    def __init__(self, batches: Batches, mesh: Mesh, batch_size: int | None, seed: int) -> None:
        if isinstance(batches, Mapping | data.Batch):
            raise ValueError("batches must be an iterator of batches: got a single batch.")
        if isinstance(batches, data.Rows) != (batch_size is not None):
            raise ValueError(
                "batch_size is required for rows and not allowed for batches: got "
                f"batch_size={batch_size} and {type(batches).__name__}."
            )
        self._given = batches
        if isinstance(batches, data.Rows):
            assert batch_size is not None
            reader, readers = row_share(mesh)
            batches = data.BatchIterator(
                batches,
                batch_size=batch_size,
                seed=seed,
                process_index=reader,
                process_count=readers,
            )
        self.widths: Collection[int] = ()
        if isinstance(self._given, data.Rows):
            self.widths = self._given.widths
        self._iterator: Any = iter(batches)

    def wraps(self, batches: Batches) -> bool:
        """Whether it wraps this very iterator, which then keeps its position."""
        return self._given is batches and self._iterator is batches

    def set_position(self, position: Any, steps: int, say: Callable[[str], None]) -> None:
        """Moves to the batch after `steps` steps; `position` is what `position()` returned then."""
        if steps and position is not None and hasattr(self._iterator, "set_state"):
            self._iterator.set_state(position)
        elif steps:
            say(f"skipping the batches of {steps} steps")
            for _ in range(steps):
                next(self._iterator, None)

    def position(self) -> Any:
        """The iterator's position as JSON types; None if it has no `get_state`."""
        return getattr(self._iterator, "get_state", lambda: None)()

    def next(self, step: int) -> data.Batch | Mapping[str, Any]:
        """The batch of a step.

        Raises:
          UserError: If there are no more batches.
        """
        try:
            batch: data.Batch | Mapping[str, Any] = next(self._iterator)
        except StopIteration:
            raise UserError(
                f"batches: ran out at step {step}; pass more batches, or repeat them "
                "(itertools.cycle)"
            ) from None
        return batch
