"""The logits of one chunk of tokens, in tiles of the vocabulary, with their statistics.

Logits are held as `[tiles, tokens, tile]`. On CPUs tiles bound the temporaries of the
matmuls, and reductions over the leading axis are what XLA's backend vectorises: it
takes 0.6 ns an element and core to sum exp(z) over it, and 3.1 ns over a minor axis.
Elsewhere one tile is the whole vocabulary, since XLA fuses exp into the matmuls. The
last tile is moved back to end with the vocabulary; columns that it shares with its
neighbour, and columns of padding, hold −inf there, which counts for nothing in any
statistic.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax

from ranktuner_jax.losses.stats import TOP_K, TokenStats, entropy, label_in_range
from ranktuner_jax.losses.varying import mark_varying, varying_axes

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int

# On CPUs a tile of 2048 columns keeps the matmuls near their peak and its temporaries
# in the cache; rounded up to whole vectors.
_CPU_TILE = 2048
_CPU_LANES = 16

# The histogram behind the expected rank: see `_expected_rank`.
_RANK_BINS = 6144
_RANK_SPAN = 42.0
# What it takes for each token: XLA holds the counts up to three times, one spare bin included.
RANK_BYTES = 3 * 4 * (_RANK_BINS + 1)


@dataclasses.dataclass(frozen=True)
class Projection:
    """How hidden states become logits: the static part, hashable.

    Attributes:
      rows: Rows of the unembedding on this device.
      vocab_size: Real vocabulary entries over all devices.
      logit_cap: Soft cap c: logits are c·tanh(z/c); None for none.
      vocab_axis: shard_map axis over which the vocabulary is split; None: whole.
      for_cpu: Whether the code is for XLA's CPU backend.
    """

    rows: int
    vocab_size: int
    logit_cap: float | None = None
    vocab_axis: str | None = None
    for_cpu: bool = False

    @property
    def tile(self) -> int:
        """Columns of a tile."""
        if not self.for_cpu or self.rows <= _CPU_TILE:
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

    def psum(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Sum over the devices that share the vocabulary."""
        return x if self.vocab_axis is None else lax.psum(x, self.vocab_axis)

    def pmax(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Maximum over the devices that share the vocabulary."""
        return x if self.vocab_axis is None else lax.pmax(x, self.vocab_axis)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ChunkSoftmax:
    """What recovers probabilities from logits: p = exp(z − peak) / normalizer."""

    peak: Float[Array, "C"]
    normalizer: Float[Array, "C"]


def dot(
    a: Float[Array, "..."], b: Float[Array, "..."], contract: tuple[int, int], dtype: jnp.dtype
) -> Float[Array, "..."]:
    """Matrix product over one axis of each, accumulated and returned in `dtype`."""
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dims, preferred_element_type=dtype)


def unembed_tile(
    unembed: Float[Array, "V D"], index: Int[Array, ""], projection: Projection
) -> Float[Array, "W ..."]:
    """Rows of the unembedding (or entries of a bias) that belong to a tile."""
    return lax.dynamic_slice_in_dim(unembed, projection.start(index), projection.tile)


def chunk_logits(
    hidden: Float[Array, "C D"],
    unembed: Float[Array, "V D"],
    bias: Float[Array, "V"] | None,
    projection: Projection,
    scratch: Float[Array, "T C W"],
) -> Float[Array, "T C W"]:
    """Logits of a chunk, tile by tile, written over `scratch`."""
    tokens = hidden.shape[0]

    def write(index: Int[Array, ""], logits: Float[Array, "T C W"]) -> Float[Array, "T C W"]:
        rows = unembed_tile(unembed, index, projection).astype(hidden.dtype)
        tile = dot(hidden, rows, (1, 1), scratch.dtype)
        if bias is not None:
            tile += unembed_tile(bias, index, projection).astype(tile.dtype)[None]
        if projection.logit_cap is not None:
            tile = projection.logit_cap * jnp.tanh(tile / projection.logit_cap)
        shared = projection.num_tiles * projection.tile > projection.rows
        padded = projection.vocab_axis is not None or projection.vocab_size < projection.rows
        if shared or padded:
            columns = projection.columns(index, tokens)
            first = index * projection.tile + projection.offset
            counts = (columns >= first) & (columns < projection.vocab_size)
            tile = jnp.where(counts, tile, -jnp.inf)
        return lax.dynamic_update_index_in_dim(logits, tile, index, 0)

    logits: Float[Array, "T C W"] = _for_each_tile(projection, write, scratch)
    return logits


def chunk_stats(
    logits: Float[Array, "T C W"],
    labels: Int[Array, "C"],
    projection: Projection,
    fields: Collection[str],
) -> tuple[TokenStats, ChunkSoftmax]:
    """Statistics of each token of a chunk; over the whole vocabulary if it is split.

    All that crosses the vocabulary axis is a few numbers a token (and for the
    expected rank its histogram), whatever the size of the vocabulary.
    """
    peak = projection.pmax(jnp.max(jnp.max(logits, axis=0), axis=-1))
    label_logit = projection.psum(_label_logit(logits, labels, projection))
    # A cap is a product, c·tanh, and XLA would contract it with the subtraction of the
    # label's logit into one rounding, so that ties with it, itself included, were lost.
    apart = projection.for_cpu and projection.logit_cap is None
    moments = (_moments_apart if apart else _moments)(logits, peak, label_logit)
    normalizer, weighted, at_least = projection.psum(moments)
    log_normalizer = jnp.log(normalizer)
    nll = log_normalizer - (label_logit - peak)

    expected_rank = topk_entropy = collision = None
    if "expected_rank" in fields:
        expected_rank = _expected_rank(logits, peak, normalizer, projection)
    if "topk_entropy" in fields:
        topk_entropy = _topk_entropy(logits, projection)
    if "collision" in fields:
        squares = _sum_columns(jnp.exp(2 * (logits - peak[None, :, None])))
        collision = projection.psum(squares) / normalizer**2
    stats = TokenStats(
        nll=jnp.where(label_in_range(labels, projection.vocab_size), nll, jnp.nan),
        rank=jnp.round(at_least).astype(jnp.int32),
        entropy=log_normalizer - weighted / normalizer,
        max_prob=1 / normalizer,
        expected_rank=expected_rank,
        topk_entropy=topk_entropy,
        collision=collision,
        vocab_size=projection.vocab_size,
    )
    return stats, ChunkSoftmax(peak, normalizer)


def chunk_gradients(
    logits: Float[Array, "T C W"],
    softmax: ChunkSoftmax,
    weights: Float[Array, "C"],
    labels: Int[Array, "C"],
    hidden: Float[Array, "C D"],
    unembed: Float[Array, "V D"],
    projection: Projection,
    d_unembed: Float[Array, "V D"],
    d_bias: Float[Array, "V"] | None,
) -> tuple[Float[Array, "C D"], Float[Array, "V D"], Float[Array, "V"] | None]:
    """Gradients of Σ weights · nll, where weights are constants.

    Returns:
      The gradient of `hidden`, and `d_unembed` and `d_bias` with this chunk's added.
    """
    share = (weights / softmax.normalizer)[:, None]
    label_tile, label_column, _ = _locate(labels, projection)
    dtype = d_unembed.dtype

    def add_tile(
        index: Int[Array, ""],
        carry: tuple[Float[Array, "C D"], Float[Array, "V D"], Float[Array, "V"] | None],
    ) -> tuple[Float[Array, "C D"], Float[Array, "V D"], Float[Array, "V"] | None]:
        d_hidden, d_unembed, d_bias = carry
        tile = lax.dynamic_index_in_dim(logits, index, 0, keepdims=False)
        target = jnp.where(label_tile == index, label_column, -1)
        is_label = lax.broadcasted_iota(jnp.int32, tile.shape, 1) == target[:, None]
        grad = jnp.exp(tile - softmax.peak[:, None]) * share
        grad -= jnp.where(is_label, weights[:, None], 0)
        if projection.logit_cap is not None:
            slope = 1 - (tile / projection.logit_cap) ** 2
            grad *= jnp.maximum(slope, 0)  # −inf columns: 0 · −inf would be NaN
        if d_bias is not None:
            d_bias = _add_rows(d_bias, jnp.sum(grad, axis=0), index, projection)
        grad = grad.astype(hidden.dtype)
        rows = unembed_tile(unembed, index, projection).astype(hidden.dtype)
        d_hidden += dot(grad, rows, (1, 0), dtype)
        d_unembed = _add_rows(d_unembed, dot(grad, hidden, (0, 0), dtype), index, projection)
        return d_hidden, d_unembed, d_bias

    zeros = mark_varying(jnp.zeros(hidden.shape, dtype), varying_axes((hidden, unembed)))
    return _for_each_tile(projection, add_tile, (zeros, d_unembed, d_bias))


def _for_each_tile(projection: Projection, body: Callable[[Any, Any], Any], carry: Any) -> Any:
    # int32 by name: with x64 on, the index would be int64 and meet int32 labels.
    return lax.fori_loop(jnp.int32(0), jnp.int32(projection.num_tiles), body, carry)


def _add_rows(
    total: Float[Array, "V ..."],
    rows: Float[Array, "W ..."],
    index: Int[Array, ""],
    projection: Projection,
) -> Float[Array, "V ..."]:
    before = unembed_tile(total, index, projection)
    return lax.dynamic_update_slice_in_dim(total, before + rows, projection.start(index), 0)


def _locate(
    labels: Int[Array, "C"], projection: Projection
) -> tuple[Int[Array, "C"], Int[Array, "C"], Bool[Array, "C"]]:
    """Tile and column of each label, and whether it is among this device's rows.

    A label elsewhere has column −1, which no column equals.
    """
    row = labels - projection.offset
    here = (row >= 0) & (row < projection.rows)
    index = jnp.where(here, row, 0) // projection.tile
    return index, jnp.where(here, row - projection.start(index), -1), here


def _label_logit(
    logits: Float[Array, "T C W"], labels: Int[Array, "C"], projection: Projection
) -> Float[Array, "C"]:
    """The label's logit where this device holds it, else 0."""
    index, column, here = _locate(labels, projection)
    label_logit = logits[index, jnp.arange(len(labels)), column]
    return jnp.where(here, label_logit, 0)


def _sum_columns(x: Float[Array, "T C W"]) -> Float[Array, "C"]:
    return jnp.sum(jnp.sum(x, axis=0), axis=-1)


def _moments(
    logits: Float[Array, "T C W"], peak: Float[Array, "C"], label_logit: Float[Array, "C"]
) -> Float[Array, "3 C"]:
    """Σ exp(z − peak), Σ exp(z − peak)·(z − peak) and #{z ≥ label's} of each token."""
    shifted = logits - peak[None, :, None]
    mass = jnp.exp(shifted)
    at_least = (logits >= label_logit[None, :, None]).astype(mass.dtype)
    return jnp.stack(
        [_sum_columns(mass), _sum_columns(mass * _finite(shifted)), _sum_columns(at_least)]
    )


def _moments_apart(
    logits: Float[Array, "T C W"], peak: Float[Array, "C"], label_logit: Float[Array, "C"]
) -> Float[Array, "3 C"]:
    """The same for XLA's CPU backend, which has to be kept from sharing work.

    It fuses arithmetic into a reduction, but writes out in full (`[T, C, W]`) whatever
    two reductions share, and any comparison. The barriers hide that the three sums
    share their input; the comparison becomes arithmetic: with c near the largest float,
    max(min(c·(z − label's), 0)/2, −1/2) is 0 for z ≥ label's and −1/2 for all others.
    (The halves keep XLA from seeing a clamp, which it would write out as well.)
    """
    peak_again, label_logit = lax.optimization_barrier((peak, label_logit))
    shifted = logits - peak_again[None, :, None]
    limits = jnp.finfo(logits.dtype)
    # A label of −inf would meet −inf here, and their difference is NaN.
    distance = logits - jnp.maximum(label_logit, limits.min)[None, :, None]
    below = jnp.maximum(jnp.minimum(distance * limits.max, 0) / 2, -0.5)
    return jnp.stack(
        [
            _sum_columns(jnp.exp(logits - peak[None, :, None])),
            _sum_columns(jnp.exp(shifted) * _finite(shifted)),
            logits.shape[0] * logits.shape[2] + 2 * _sum_columns(below),
        ]
    )


def _finite(shifted: Float[Array, "..."]) -> Float[Array, "..."]:
    """Keeps 0 · −inf from becoming NaN: exp is 0 below the floor, whatever it is."""
    return jnp.maximum(shifted, math.log(jnp.finfo(shifted.dtype).tiny) - 64)


def _topk_entropy(logits: Float[Array, "T C W"], projection: Projection) -> Float[Array, "C"]:
    tokens = logits.shape[1]
    top = lax.top_k(logits, min(TOP_K, projection.tile))[0]
    top = jnp.moveaxis(top, 1, 0).reshape(tokens, -1)
    top = lax.top_k(top, min(TOP_K, top.shape[1]))[0]
    if projection.vocab_axis is not None:
        # Each device fills its own slot: unlike an all_gather, a psum is known to be
        # equal on all devices, as the weights must be.
        slots = jnp.zeros((lax.axis_size(projection.vocab_axis), *top.shape), top.dtype)
        slots = slots.at[lax.axis_index(projection.vocab_axis)].set(top)
        top = jnp.moveaxis(projection.psum(slots), 0, 1).reshape(tokens, -1)
        top = lax.top_k(top, min(TOP_K, top.shape[1]))[0]
    return entropy(top)


def _expected_rank(
    logits: Float[Array, "T C W"],
    peak: Float[Array, "C"],
    normalizer: Float[Array, "C"],
    projection: Projection,
) -> Float[Array, "C"]:
    """E[R] = 1 + Σ_{i<j} min(p_i, p_j) without a sort, from counts of log p.

    Bins of width δ = 42/6144 hold n_b logits between a_b = p_max·e^−(b+1)δ and
    b_b = p_max·e^−bδ. Every pair of bin b and a higher bin, and every pair inside
    bin b, has its smaller member in bin b, so the pairs' sum lies between a_b and b_b
    times their number, n_b·(N_{<b} + (n_b − 1)/2). At c_b = 2·a_b·b_b/(a_b + b_b)
    both bounds are off by the same factor, hence

        |estimate − (E[R] − 1)| ≤ tanh(δ/2)·(E[R] − 1) = 0.342 % of E[R] − 1,

    whatever the distribution; and as |d ln S/dE| = 1/((E + 1)·log2²(E + 1)), the
    relative scale is off by at most 5e-4. Logits more than 42 nats below the peak are
    dropped: all V of them add less than V²·e^−42/2, 2e-8 for V = 262,144, which
    float32 cannot tell from 1.
    """
    width = _RANK_SPAN / _RANK_BINS
    tokens = logits.shape[1]

    def count(index: Int[Array, ""], counts: Int[Array, "C*B"]) -> Int[Array, "C*B"]:
        tile = lax.dynamic_index_in_dim(logits, index, 0, keepdims=False)
        bins = jnp.floor(jnp.minimum((peak[:, None] - tile) / width, _RANK_BINS))
        first = jnp.arange(tokens, dtype=jnp.int32)[:, None] * (_RANK_BINS + 1)
        return counts.at[first + bins.astype(jnp.int32)].add(1, mode="drop")

    zeros = jnp.zeros(tokens * (_RANK_BINS + 1), jnp.int32)
    zeros = mark_varying(zeros, varying_axes((logits, peak)))
    counts = _for_each_tile(projection, count, zeros)
    counts = projection.psum(counts.reshape(tokens, -1)[:, :-1].astype(logits.dtype))
    above = jnp.cumsum(counts, axis=1) - counts
    edges = jnp.exp(-width * jnp.arange(_RANK_BINS + 1, dtype=logits.dtype))
    centers = 2 * edges[1:] * edges[:-1] / (edges[1:] + edges[:-1])
    pairs = counts * (above + jnp.maximum(counts - 1, 0) / 2)
    return 1 + jnp.einsum("cb,b->c", pairs, centers) / normalizer
