"""How hidden states become logits: which rows of the unembedding, and in which tiles.

Logits are held as `[tiles, tokens, tile]`. On CPUs tiles bound the temporaries of the
matmuls, and reductions over the leading axis are what XLA's backend vectorises: it
takes 0.6 ns an element and core to sum exp(z) over it, and 3.1 ns over a minor axis.
Elsewhere one tile is the whole vocabulary, since XLA fuses exp into the matmuls. The
last tile is moved back to end with the vocabulary; columns that it shares with its
neighbour, and columns of padding, are −inf there, so no statistic counts them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from jax import lax

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int

# On CPUs a tile of 2048 columns keeps the matmuls near their peak and its temporaries
# in the cache; rounded up to whole vectors.
_CPU_TILE = 2048
_CPU_LANES = 16


@dataclasses.dataclass(frozen=True)
class Projection:
    """The static part of the projection onto the vocabulary; hashable.

    Attributes:
      rows: Rows of the unembedding on this device.
      vocab_size: Real vocabulary entries over all devices.
      logit_cap: Soft cap c: logits are c·tanh(z/c); None for none.
      vocab_axis: shard_map axis over which the vocabulary is split; None: not split.
      backend: The backend of XLA that the code is for: "cpu", "tpu" or "gpu".
    """

    rows: int
    vocab_size: int
    logit_cap: float | None = None
    vocab_axis: str | None = None
    backend: str = "gpu"

    @property
    def tile(self) -> int:
        """Columns of a tile."""
        if self.backend != "cpu" or self.rows <= _CPU_TILE:
            return self.rows
        share = math.ceil(self.rows / round(self.rows / _CPU_TILE))
        return min(self.rows, math.ceil(share / _CPU_LANES) * _CPU_LANES)

    @property
    def num_tiles(self) -> int:
        """Tiles of the local vocabulary."""
        return math.ceil(self.rows / self.tile)

    @property
    def offset(self) -> int | Int[Array, ""]:
        """Vocabulary index of the first local row."""
        return 0 if self.vocab_axis is None else lax.axis_index(self.vocab_axis) * self.rows

    def start(self, index: Int[Array, ""]) -> Int[Array, ""]:
        """First local column of a tile."""
        return jnp.minimum(index * self.tile, self.rows - self.tile)

    def columns(self, index: Int[Array, ""], tokens: int) -> Int[Array, "C W"]:
        """Vocabulary index of each column of a tile, for each token."""
        local = lax.broadcasted_iota(jnp.int32, (tokens, self.tile), 1)
        return local + self.start(index) + self.offset

    def locate(
        self, labels: Int[Array, "C"]
    ) -> tuple[Int[Array, "C"], Int[Array, "C"], Bool[Array, "C"]]:
        """Tile and column of each label, and whether it is among this device's rows.

        A label elsewhere has column −1, which no column equals.
        """
        row = labels - self.offset
        here = (row >= 0) & (row < self.rows)
        index = jnp.where(here, row, 0) // self.tile
        return index, jnp.where(here, row - self.start(index), -1), here

    def take_tile(self, x: Float[Array, "V ..."], index: Int[Array, ""]) -> Float[Array, "W ..."]:
        """The rows of the unembedding (or entries of a bias) that belong to a tile."""
        return lax.dynamic_slice_in_dim(x, self.start(index), self.tile)

    def add_to_tile(
        self, total: Float[Array, "V ..."], rows: Float[Array, "W ..."], index: Int[Array, ""]
    ) -> Float[Array, "V ..."]:
        """`total` with `rows` added to those that belong to a tile."""
        before = self.take_tile(total, index)
        return lax.dynamic_update_slice_in_dim(total, before + rows, self.start(index), 0)

    def for_each_tile(self, body: Callable[[Any, Any], Any], carry: Any) -> Any:
        """Folds `body(index, carry)` over the tiles."""
        # An explicit int32: with x64 on, the index would be int64 and the labels int32.
        return lax.fori_loop(jnp.int32(0), jnp.int32(self.num_tiles), body, carry)

    def psum(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Sum over the devices that share the vocabulary."""
        return x if self.vocab_axis is None else lax.psum(x, self.vocab_axis)

    def pmax(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Maximum over the devices that share the vocabulary."""
        return x if self.vocab_axis is None else lax.pmax(x, self.vocab_axis)
