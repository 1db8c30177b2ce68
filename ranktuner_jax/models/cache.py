"""Keys and values of the tokens that a decoder has seen."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import jax
from flax import struct

from ranktuner_jax.models.attention import TokenPositions

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

__all__ = ["Cache"]


class Cache(struct.PyTreeNode):
    """Keys and values of the tokens seen so far; shapes never change.

    Each layer has arrays of its own, with the axes in the order that attention's products read,
    so that a step copies none of them.

    Attributes:
      keys: Of each layer, `[B, K, d, S]`.
      values: Of each layer, `[B, K, S, d]`.
      positions: `[B, S]`, the position of the token in each slot.
      segment_ids: `[B, S]`, its segment; -1 marks a slot that holds nothing yet.
      index: The slot that the next token goes to, the same for every row.
    """

    keys: tuple[Float[Array, "B K d S"], ...]
    values: tuple[Float[Array, "B K S d"], ...]
    positions: Int[Array, "B S"]
    segment_ids: Int[Array, "B S"]
    index: Int[Array, ""]

    def add_positions(self, new: TokenPositions) -> Cache:
        """The cache with the positions and segments of the next tokens in their slots."""
        update = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=1)
        return self.replace(
            positions=update(self.positions, new.positions, self.index),
            segment_ids=update(self.segment_ids, new.segment_ids, self.index),
        )
