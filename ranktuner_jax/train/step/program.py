"""The compiled train step: compiled once for the shape of the first batch, and of each width."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ranktuner_jax.data import Batch
from ranktuner_jax.errors import UserError
from ranktuner_jax.train.runtime.mesh import check_batch, place_batch, row_share
from ranktuner_jax.train.step.state import TrainState
from ranktuner_jax.train.step.train_step import Metrics, make_train_step

__all__ = ["StepProgram"]


class StepProgram:
    """Places batches on the mesh and updates the state.

    It is compiled once for each length of rows.

    Args:
      mesh: The mesh.
      accumulation: Micro-batches per batch.
      options: Keyword arguments of `make_train_step`.

    Attributes:
      off: The value False on the mesh, for `hold`.
    """

    def __init__(self, mesh: Mesh, accumulation: int, options: Mapping[str, Any]) -> None:
        self._mesh, self._accumulation, self._options = mesh, accumulation, options
        self._shapes: Batch | None = None
        self._programs: dict[tuple[int, ...], Any] = {}
        self.off = jax.device_put(np.asarray(False), NamedSharding(mesh, PartitionSpec()))

    def place(self, batch: Batch | Mapping[str, Any], widths: Collection[int] = ()) -> Batch:
        """This process's rows as global arrays.

        Args:
          batch: The rows.
          widths: Other lengths than the first batch's that rows may have, in all processes.

        Raises:
          UserError: If the rows cannot be divided, or differ in shape from the first batch.
        """
        rows = Batch.of(batch)
        shapes = jax.tree.map(lambda array: array.shape, rows)
        if self._shapes is None:
            _check_everywhere(shapes.tokens)
            _, readers = row_share(self._mesh)
            check_batch(self._mesh, readers * len(rows.tokens), self._accumulation)
            self._shapes = shapes
        elif shapes != _of_width(self._shapes, shapes.tokens[-1], widths):
            raise UserError(
                f"batches: expected the shape of the first one, {self._shapes.tokens}, got "
                f"{shapes.tokens}; pad the rows, or drop the batch"
            )
        return place_batch(self._mesh, rows, self._accumulation)

    def compile(self, state: TrainState, batch: Batch) -> bool:
        """Compiles the step ahead of time; returns False if it already was."""
        if batch.tokens.shape in self._programs:
            return False
        step = make_train_step(state, self._mesh, **self._options)
        self._programs[batch.tokens.shape] = step.lower(state, batch, self.off).compile()
        return True

    @property
    def memory_gb(self) -> float | None:
        """What the compiled step needs on each device; None before it is compiled, or if unknown.

        Its arguments, which include the state, and the largest sum of all that lives beside them;
        of the longest rows so far.
        """
        longest = max(self._programs, default=None)
        memory = longest and self._programs[longest].memory_analysis()
        if not memory:
            return None
        # What is returned in the place of donated arguments is counted once.
        new = memory.output_size_in_bytes - memory.alias_size_in_bytes
        return (memory.argument_size_in_bytes + new + memory.temp_size_in_bytes) / 1e9

    def __call__(
        self, state: TrainState, batch: Batch, hold: jax.Array
    ) -> tuple[TrainState, Metrics]:
        """Takes a step; the state is donated."""
        self.compile(state, batch)
        stepped: tuple[TrainState, Metrics] = self._programs[batch.tokens.shape](state, batch, hold)
        return stepped


def _of_width(shapes: Batch, width: int, widths: Collection[int]) -> Batch:
    """The shapes of a batch whose rows are of this length, if it is one of `widths`."""
    if width not in widths:
        return shapes
    return Batch(
        **{
            name: (*shape[:-1], width) if len(shape) > 1 else shape
            for name, shape in vars(shapes).items()
        }
    )


def _check_everywhere(shape: tuple[int, ...]) -> None:
    """Refuses, in every process, batches that have other shapes in other processes."""
    if jax.process_count() > 1:
        shapes = multihost_utils.process_allgather(np.array(shape, np.int32))
        if (shapes != shapes[0]).any():
            raise UserError(
                f"batches: expected the same shape in every process, got {shapes.tolist()}"
            )
