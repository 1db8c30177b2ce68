"""One chunk of tokens: its logits, their statistics and the gradients.

Logits are `[K tiles, C tokens, W columns]`, see `projection.py`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import lax

from ranktuner_jax.losses.expected_rank import binned_expected_rank
from ranktuner_jax.losses.inputs import Operands
from ranktuner_jax.losses.projection import Projection
from ranktuner_jax.losses.stats import TOP_K, TokenStats, entropy, label_in_range
from ranktuner_jax.losses.varying import mark_varying, varying_axes

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ChunkSoftmax:
    """Gives probabilities: p = exp(z − peak) / normalizer.

    Attributes:
      peak: The largest logit.
      normalizer: Σ exp(z − peak).
      mass: exp(z − peak) for the gradient, or None where it is computed again from the logits.
    """

    peak: Float[Array, "C"]
    normalizer: Float[Array, "C"]
    mass: Float[Array, "K C W"] | None


def dot(
    a: Float[Array, "..."], b: Float[Array, "..."], contract: tuple[int, int], dtype: jnp.dtype
) -> Float[Array, "..."]:
    """Matrix product over one axis of each, accumulated and returned in `dtype`."""
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dims, preferred_element_type=dtype)


def chunk_logits(
    operands: Operands, projection: Projection, scratch: Float[Array, "K C W"]
) -> Float[Array, "K C W"]:
    """Logits of a chunk, tile by tile, written over `scratch`."""
    hidden, bias = operands.hidden, operands.bias

    def write(index: Int[Array, ""], logits: Float[Array, "K C W"]) -> Float[Array, "K C W"]:
        rows = projection.take_tile(operands.unembed, index).astype(hidden.dtype)
        tile = dot(hidden, rows, (1, 1), scratch.dtype)
        if bias is not None:
            tile += projection.take_tile(bias, index).astype(tile.dtype)[None]
        if projection.logit_cap is not None:
            tile = projection.logit_cap * jnp.tanh(tile / projection.logit_cap)
        shared = projection.num_tiles * projection.tile > projection.rows
        padded = projection.vocab_axis is not None or projection.vocab_size < projection.rows
        if shared or padded:
            columns = projection.columns(index, hidden.shape[0])
            first = index * projection.tile + projection.offset
            counted = (columns >= first) & (columns < projection.vocab_size)
            tile = jnp.where(counted, tile, -jnp.inf)
        return lax.dynamic_update_index_in_dim(logits, tile, index, 0)

    logits: Float[Array, "K C W"] = projection.for_each_tile(write, scratch)
    return logits


def chunk_stats(
    logits: Float[Array, "K C W"],
    labels: Int[Array, "C"],
    projection: Projection,
    fields: Collection[str],
    gradient_dtype: jnp.dtype | None,
) -> tuple[TokenStats, ChunkSoftmax]:
    """Statistics of each token of a chunk; over the whole vocabulary if it is split.

    Only a few numbers a token (and the histogram for the expected rank) are communicated
    over the vocabulary axis, whatever the size of the vocabulary.

    Args:
      logits: Of the chunk.
      labels: Target ids.
      projection: How the logits were computed.
      fields: Optional statistics to compute.
      gradient_dtype: Type of the products of the gradient; None where there will be none.
    """
    peak = projection.pmax(jnp.max(jnp.max(logits, axis=0), axis=-1))
    label_logit = projection.psum(_label_logit(logits, labels, projection))
    # A cap is a product, c·tanh, and XLA would contract it with the subtraction of the
    # label's logit into one rounding, so that ties with it, itself included, were lost.
    apart = projection.backend == "cpu" and projection.logit_cap is None
    moments = (_moments_apart if apart else _moments)(logits, peak, label_logit)
    mass = None
    if projection.backend == "tpu" and gradient_dtype is not None:
        moments, mass = _with_mass(moments, logits, peak, gradient_dtype)
    normalizer, weighted, at_least = projection.psum(moments)
    log_normalizer = jnp.log(normalizer)
    nll = log_normalizer - (label_logit - peak)

    expected_rank = topk_entropy = collision = None
    if "expected_rank" in fields:
        expected_rank = binned_expected_rank(logits, peak, normalizer, projection)
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
    return stats, ChunkSoftmax(peak, normalizer, mass)


def chunk_gradients(
    logits: Float[Array, "K C W"],
    softmax: ChunkSoftmax,
    weights: Float[Array, "C"],
    labels: Int[Array, "C"],
    operands: Operands,
    projection: Projection,
    d_unembed: Float[Array, "V D"] | None,
    d_bias: Float[Array, "V"] | None,
) -> tuple[Float[Array, "C D"], Float[Array, "V D"] | None, Float[Array, "V"] | None]:
    """Gradients of Σ weights · nll, where weights are constants.

    Returns:
      The gradient of `hidden`, and `d_unembed` and `d_bias`, unless None, with this chunk's added.
    """
    share = (weights / softmax.normalizer)[:, None]
    hidden, unembed, dtype = operands.hidden, operands.unembed, logits.dtype
    label_tile, label_column, _ = projection.locate(labels)

    def add_tile(
        index: Int[Array, ""],
        carry: tuple[Float[Array, "C D"], Float[Array, "V D"] | None, Float[Array, "V"] | None],
    ) -> tuple[Float[Array, "C D"], Float[Array, "V D"] | None, Float[Array, "V"] | None]:
        d_hidden, d_unembed, d_bias = carry
        tile = lax.dynamic_index_in_dim(logits, index, 0, keepdims=False)
        target = jnp.where(label_tile == index, label_column, -1)
        is_label = lax.broadcasted_iota(jnp.int32, tile.shape, 1) == target[:, None]
        if softmax.mass is None:
            mass = jnp.exp(tile - softmax.peak[:, None])
        else:
            mass = lax.dynamic_index_in_dim(softmax.mass, index, 0, keepdims=False).astype(dtype)
        grad = mass * share
        grad -= jnp.where(is_label, weights[:, None], 0)
        if projection.logit_cap is not None:
            slope = 1 - (tile / projection.logit_cap) ** 2
            grad *= jnp.maximum(slope, 0)  # −inf columns: 0 · −inf would be NaN
        if d_bias is not None:
            d_bias = projection.add_to_tile(d_bias, jnp.sum(grad, axis=0), index)
        grad = grad.astype(hidden.dtype)
        rows = projection.take_tile(unembed, index).astype(hidden.dtype)
        d_hidden += dot(grad, rows, (1, 0), dtype)
        if d_unembed is not None:
            d_unembed = projection.add_to_tile(d_unembed, dot(grad, hidden, (0, 0), dtype), index)
        return d_hidden, d_unembed, d_bias

    zeros = mark_varying(jnp.zeros(hidden.shape, dtype), varying_axes((hidden, unembed)))
    return projection.for_each_tile(add_tile, (zeros, d_unembed, d_bias))


def _label_logit(
    logits: Float[Array, "K C W"], labels: Int[Array, "C"], projection: Projection
) -> Float[Array, "C"]:
    """The label's logit where this device holds it, else 0."""
    index, column, here = projection.locate(labels)
    label_logit = logits[index, jnp.arange(len(labels)), column]
    return jnp.where(here, label_logit, 0)


def _sum_columns(x: Float[Array, "K C W"]) -> Float[Array, "C"]:
    return jnp.sum(jnp.sum(x, axis=0), axis=-1)


def _moments(
    logits: Float[Array, "K C W"], peak: Float[Array, "C"], label_logit: Float[Array, "C"]
) -> Float[Array, "3 C"]:
    """Σ exp(z − peak), Σ exp(z − peak)·(z − peak) and #{z ≥ label's} of each token."""
    shifted = logits - peak[None, :, None]
    mass = jnp.exp(shifted)
    at_least = (logits >= label_logit[None, :, None]).astype(mass.dtype)
    return jnp.stack(
        [_sum_columns(mass), _sum_columns(mass * _finite(shifted)), _sum_columns(at_least)]
    )


def _moments_apart(
    logits: Float[Array, "K C W"], peak: Float[Array, "C"], label_logit: Float[Array, "C"]
) -> Float[Array, "3 C"]:
    """The same for XLA's CPU backend, which has to be kept from sharing work.

    It fuses arithmetic into a reduction, but writes out in full (`[K, C, W]`) whatever
    two reductions share, and any comparison. The barriers hide that the three sums
    share their input; the comparison becomes arithmetic: with c near the largest float,
    max(min(c·(z − label's), 0)/2, −1/2) is 0 for z ≥ label's and −1/2 for all others.
    (The halves keep XLA from seeing a clamp, which it would write out as well.)
    """
    peak_again, label_logit = lax.optimization_barrier((peak, label_logit))
    shifted = logits - peak_again[None, :, None]
    limits = jnp.finfo(logits.dtype)
    # A label's logit may be −inf, and −inf − (−inf) is NaN.
    distance = logits - jnp.maximum(label_logit, limits.min)[None, :, None]
    below = jnp.maximum(jnp.minimum(distance * limits.max, 0) / 2, -0.5)
    return jnp.stack(
        [
            _sum_columns(jnp.exp(logits - peak[None, :, None])),
            _sum_columns(jnp.exp(shifted) * _finite(shifted)),
            logits.shape[0] * logits.shape[2] + 2 * _sum_columns(below),
        ]
    )


def _with_mass(
    moments: Float[Array, "3 C"],
    logits: Float[Array, "1 C V"],
    peak: Float[Array, "C"],
    dtype: jnp.dtype,
) -> tuple[Float[Array, "3 C"], Float[Array, "1 C V"]]:
    """The moments and exp(z − peak), for XLA's TPU backend.

    Both products of the gradient read it, with no exponential of their own and at half the
    bytes of the logits. The barrier has it computed in the one pass that sums the moments.
    """
    (tile,) = logits
    mass = jnp.exp(tile - peak[:, None]).astype(dtype)
    moments, mass = lax.optimization_barrier((moments, mass))
    return moments, mass[None]


def _finite(shifted: Float[Array, "..."]) -> Float[Array, "..."]:
    """Bounded below, so that 0 · −inf is not NaN; exp is 0 at the bound already."""
    return jnp.maximum(shifted, math.log(jnp.finfo(shifted.dtype).tiny) - 64)


def _topk_entropy(logits: Float[Array, "K C W"], projection: Projection) -> Float[Array, "C"]:
    tokens = logits.shape[1]
    # The largest logits lie in the columns with the largest maxima over the tiles, which are
    # far cheaper to find than the largest logits of each tile.
    columns = lax.top_k(jnp.max(logits, axis=0), min(TOP_K, projection.tile))[1]
    top = jnp.take_along_axis(logits, columns[None], axis=2)
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
