"""Supervised positions moved to the front, so that work follows their number."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Compaction:
    """Which position each slot holds: supervised positions come first.

    Attributes:
      order: Position of each slot; beyond `count`, positions out of range.
      count: The number of supervised positions.
    """

    order: Int[Array, "S"]
    count: Int[Array, ""]

    @classmethod
    def of(cls, mask: Bool[Array, "N"], slots: int) -> Compaction:
        """The given number of slots for the mask."""
        order = jnp.nonzero(mask, size=slots, fill_value=mask.size)[0]
        return cls(order.astype(jnp.int32), jnp.sum(mask, dtype=jnp.int32))

    def take(self, x: Float[Array, "N ..."], start: Int[Array, ""], size: int) -> Any:
        """The entries of `size` slots from `start`; zeros where a slot is empty."""
        positions = lax.dynamic_slice_in_dim(self.order, start, size)
        return jnp.take(x, positions, axis=0, mode="fill", fill_value=0)

    def filled(self, start: Int[Array, ""] | int, size: int) -> Bool[Array, "C"]:
        """True for those of `size` slots from `start` that hold a supervised position."""
        return start + jnp.arange(size, dtype=jnp.int32) < self.count

    def restore(self, x: Float[Array, "S ..."], mask: Bool[Array, "N"]) -> Float[Array, "N ..."]:
        """Slots back at their positions; zeros where the mask is false."""
        slot = jnp.maximum(jnp.cumsum(mask) - 1, 0)
        kept = mask.reshape(-1, *(1,) * (x.ndim - 1))
        return jnp.where(kept, x[slot], jnp.zeros((), x.dtype))
