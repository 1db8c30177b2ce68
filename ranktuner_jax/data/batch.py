"""The arrays that training and evaluation steps take."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import jax
import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

__all__ = ["Batch"]

Array = TypeVar("Array", np.ndarray, jax.Array)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch(Generic[Array]):
    """Rows of tokens with their labels: NumPy arrays on the host, `jax.Array`s on devices.

    The leading axes are the same in all arrays: `[T]` for one row, `[B, T]` for a batch,
    `[A, B, T]` for one that is cut into A micro-batches. `row_index` has no axis T.

    Attributes:
      tokens: int32, the inputs.
      labels: int32, the token that follows in the same conversation.
      mask: bool, whether the label is supervised.
      positions: int32, from 0 in each conversation.
      segment_ids: int32, 1, 2, ... for the conversations of a row; 0 is padding.
      token_weights: float32, a static factor of the label's loss; 0 where it is not supervised.
      row_index: int32, the row's number in its data set.

    Example:
      >>> batch = Batch.of({"tokens": [[5, 6, 7]], "labels": [[6, 7, 0]], "mask": [[0, 1, 0]]})
      >>> batch.positions.tolist(), batch.token_weights.tolist()
      ([[0, 1, 2]], [[0.0, 1.0, 0.0]])
      >>> jax.tree.map(lambda array: array[0], batch).tokens.tolist()
      [5, 6, 7]
    """

    tokens: Int[Array, "*B T"]
    labels: Int[Array, "*B T"]
    mask: Bool[Array, "*B T"]
    positions: Int[Array, "*B T"]
    segment_ids: Int[Array, "*B T"]
    token_weights: Float[Array, "*B T"]
    row_index: Int[Array, "*B"]

    @classmethod
    def of(cls, batch: Batch[Any] | Mapping[str, Any]) -> Batch[Any]:
        """A batch from any mapping with `tokens`, `labels` and `mask`.

        What else is missing is filled in: a row is one conversation without padding, every
        supervised label counts once, and rows are numbered within the batch.

        Args:
          batch: Arrays [B, T] or nested lists by their names; a `Batch` is returned as it is.

        Raises:
          ValueError: If a name is unknown or missing, or shapes differ.
        """
        if isinstance(batch, Batch):
            return batch
        known = {field.name: field for field in dataclasses.fields(cls)}
        if unknown := sorted(set(batch) - set(known)):
            raise ValueError(f"a batch has the arrays {', '.join(known)}: got {unknown}.")
        if missing := sorted({"tokens", "labels", "mask"} - set(batch)):
            raise ValueError(f"a batch needs tokens, labels and mask: got no {missing}.")
        arrays = {name: np.asarray(batch[name]).astype(_DTYPES[name]) for name in batch}
        shape = arrays["tokens"].shape
        defaults = {
            "positions": lambda: np.broadcast_to(np.arange(shape[-1], dtype=np.int32), shape),
            "segment_ids": lambda: np.ones(shape, np.int32),
            "token_weights": lambda: arrays["mask"].astype(np.float32),
            "row_index": lambda: np.arange(shape[0], dtype=np.int32),
        }
        arrays |= {name: make() for name, make in defaults.items() if name not in arrays}
        for name, array in arrays.items():
            expected = shape[:-1] if name == "row_index" else shape
            if array.shape != expected:
                raise ValueError(f"{name} must have the shape {expected}: got {array.shape}.")
        return Batch(**arrays)


_DTYPES: dict[str, Any] = {
    "tokens": np.int32,
    "labels": np.int32,
    "mask": np.bool_,
    "positions": np.int32,
    "segment_ids": np.int32,
    "token_weights": np.float32,
    "row_index": np.int32,
}
