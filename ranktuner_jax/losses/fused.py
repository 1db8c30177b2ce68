"""The loss from hidden states: logits never whole, only supervised tokens computed."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ranktuner_jax.losses.chunk import (
    RANK_BYTES,
    Projection,
    chunk_gradients,
    chunk_logits,
    chunk_stats,
)
from ranktuner_jax.losses.options import check_options, resolve_mask
from ranktuner_jax.losses.stats import TokenStats, check_fields, check_inputs
from ranktuner_jax.losses.sums import LossOutput, weighted_sums
from ranktuner_jax.losses.varying import mark_varying, varying_axes
from ranktuner_jax.losses.weights import RankTuner, Weighting

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int

__all__ = ["default_chunk_size", "fused_token_stats", "fused_weighted_nll"]

# Default bytes of the float32 logits of a chunk; see `default_chunk_size`.
_CHUNK_BYTES = 256 * 2**20


def default_chunk_size(
    num_tokens: int, features: int, vocab_size: int, *, fields: Collection[str] = ()
) -> int:
    """Tokens whose logits are held at a time.

    Each chunk reads and writes the float32 gradient of the unembedding once, 8·V·D
    bytes for 6·C·V·D operations, so small chunks are bound by memory. The logits may
    take 256 MiB, or half of what that gradient takes where this is more, and the bins
    in which `expected_rank` is counted may take half as much as the logits may. The
    number of tokens is rounded down to a power of two.

    Args:
      num_tokens: Positions in the batch, supervised or not.
      features: Width D of the hidden states.
      vocab_size: Rows of the unembedding on this device.
      fields: Optional statistics that are gathered, as a weighting's `requires` names them.

    Example:
      >>> default_chunk_size(2048, 576, 49152), default_chunk_size(8192, 4096, 151936)
      (1024, 2048)
      >>> default_chunk_size(16384, 64, 256, fields=("expected_rank",))
      1024
    """
    bound = max(_CHUNK_BYTES, 2 * vocab_size * features)
    tokens = max(bound // (4 * vocab_size), 1)
    if "expected_rank" in fields:
        tokens = min(tokens, bound // 2 // RANK_BYTES)
    return max(1, min(num_tokens, 2 ** int(math.log2(tokens))))


def fused_weighted_nll(
    hidden: Float[Array, "... D"],
    unembed: Float[Array, "V D"],
    labels: Int[Array, "..."],
    mask: Bool[Array, "..."] | None = None,
    *,
    weighting: Weighting = RankTuner(),  # noqa: B008 (frozen)
    chunk_size: int | None = None,
    logit_cap: float | None = None,
    bias: Float[Array, "V"] | None = None,
    token_weights: Float[Array, "..."] | None = None,
    sequence_ids: Int[Array, "..."] | None = None,
    vocab_size: int | None = None,
    ramp: float | Float[Array, ""] = 1.0,
    axis_name: str | tuple[str, ...] | None = None,
) -> LossOutput:
    """Weighted negative log-likelihood from hidden states and the unembedding.

    The same numbers as `weighted_nll(hidden @ unembed.T, …)`, in chunks of supervised
    tokens: work follows their number, and nothing of size tokens × vocabulary
    outlives a chunk. The gradients are formed beside the loss, so differentiating
    for both inputs costs three matmuls in all, for `hidden` alone two, and a plain
    evaluation one (under `jax.checkpoint` one more; under `vmap` the gradient of
    `unembed` is held once for each mapped element: prefer a longer batch).

    Weights are constants to the gradient, as in `weighted_nll`. Only
    `LossOutput.total` is differentiable, with respect to `hidden`, `unembed` and
    `bias`.

    Inside `pmap` or `shard_map` the loss is that of the local tokens. Take the
    gradient of the local `total`, then `psum` it and the LossOutput, then divide:

        def step(params, batch):  # each device, over the axis "data"
            params = jax.lax.pcast(params, "data", to="varying")  # shard_map only
            def loss_fn(params):
                output = fused_weighted_nll(model(params, batch), ...)
                return output.total, output
            grads, output = jax.grad(loss_fn, has_aux=True)(params)
            grads, output = jax.lax.psum((grads, output), "data")
            return jax.tree.map(lambda g: g / output.denom, grads), output.mean()

    (`pcast` says that each device differentiates its own copy of the parameters;
    without it shard_map with `check_vma=True` has summed their gradients already.)

    Args:
      hidden: Hidden states after the final norm. The matmuls run in this dtype and
        accumulate in float32 (float64 for float64).
      unembed: Unembedding matrix in Hugging Face's layout; pass `kernel.T` of a Flax
        Dense. Cast to the dtype of `hidden` a tile at a time; its gradient is
        accumulated in float32 before it is returned in this dtype.
      labels: Target ids, already shifted; any integer where unsupervised. A
        supervised label outside the vocabulary gives NaN.
      mask: True where a position is supervised; None is everywhere.
      weighting: The method; hashable.
      chunk_size: Tokens whose logits are held at a time; None chooses
        `default_chunk_size`. The remainder runs in chunks of a quarter of it.
      logit_cap: Soft cap c of the logits, c·tanh(z/c); None for none.
      bias: Added to the logits.
      token_weights: Static factor of each token's weight.
      sequence_ids: Which conversation a token belongs to, for methods that take a
        statistic over sequences (TALR); None: each row of the last axis of labels.
      vocab_size: The number of real vocabulary entries; rows beyond it are padding.
      ramp: From 0 (plain nll) to 1 (the method); may be traced.
      axis_name: The pmap or shard_map axis (or axes) over which the batch is
        spread, for methods that take a statistic of the whole batch.

    Returns:
      LossOutput, exactly as `weighted_nll` gives it.

    Raises:
      TypeError, ValueError: If dtypes or shapes do not fit, or the chunk size or cap
        is not positive.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> hidden, unembed = jnp.eye(3, 4), jnp.eye(5, 4)
      >>> labels = jnp.array([0, 1, 3])
      >>> loss = lambda hidden: fused_weighted_nll(hidden, unembed, labels).mean()
      >>> round(float(loss(hidden)), 3)
      0.371
      >>> jax.grad(loss)(hidden).shape
      (3, 4)

    References:
      Yu et al., Probability-Entropy Calibration, arXiv:2602.01745, 2026.
    """
    return local_weighted_nll(
        hidden,
        unembed,
        labels,
        mask,
        weighting=weighting,
        chunk_size=chunk_size,
        logit_cap=logit_cap,
        bias=bias,
        token_weights=token_weights,
        sequence_ids=sequence_ids,
        vocab_size=vocab_size,
        ramp=ramp,
        axis_name=axis_name,
        vocab_axis=None,
    )


def local_weighted_nll(
    hidden: Float[Array, "... D"],
    unembed: Float[Array, "V D"],
    labels: Int[Array, "..."],
    mask: Bool[Array, "..."] | None,
    *,
    weighting: Weighting,
    chunk_size: int | None,
    logit_cap: float | None,
    bias: Float[Array, "V"] | None,
    token_weights: Float[Array, "..."] | None,
    sequence_ids: Int[Array, "..."] | None,
    vocab_size: int | None,
    ramp: float | Float[Array, ""],
    axis_name: str | tuple[str, ...] | None,
    vocab_axis: str | None,
) -> LossOutput:
    """`fused_weighted_nll`, where `unembed` may be one device's rows of the vocabulary.

    The rows are split over the devices of the shard_map axis `vocab_axis`;
    `vocab_size` counts the rows of all of them.
    """
    mask, projection, sizes = _prepare(
        hidden,
        unembed,
        labels,
        mask,
        bias,
        weighting.requires,
        chunk_size,
        logit_cap,
        vocab_size,
        vocab_axis,
    )
    shards = 1 if vocab_axis is None else lax.axis_size(vocab_axis)
    check_options(labels, token_weights, sequence_ids, vocab_size, unembed.shape[0] * shards)

    batch_stat = None
    if weighting.uses_batch_statistic:
        stats = local_token_stats(hidden, unembed, labels, mask, bias, (), projection, sizes)
        batch_stat = weighting.batch_statistic(stats.nll, mask, sequence_ids, axis_name)

    plan = _Plan(projection, weighting, sizes)
    matrices, rest = _same_axes(
        (hidden.reshape(-1, hidden.shape[-1]), unembed, bias),
        (
            labels.ravel().astype(jnp.int32),
            mask.ravel(),
            None if token_weights is None else token_weights.ravel(),
            batch_stat,
            jnp.asarray(ramp, jnp.float32),
        ),
        vocab_axis,
    )
    output: LossOutput = _loss(plan, *matrices, *rest)
    return output


def fused_token_stats(
    hidden: Float[Array, "... D"],
    unembed: Float[Array, "V D"],
    labels: Int[Array, "..."],
    mask: Bool[Array, "..."] | None = None,
    *,
    fields: Collection[str] = (),
    chunk_size: int | None = None,
    logit_cap: float | None = None,
    bias: Float[Array, "V"] | None = None,
    vocab_size: int | None = None,
) -> TokenStats:
    """Statistics of each supervised token from hidden states, for scoring a data set.

    The same numbers as `token_stats(hidden @ unembed.T, labels)`, without ever
    holding the logits; `expected_rank` comes without a sort, within 0.35 % of
    E[R] − 1. Carries no gradient.

    Args:
      hidden: Hidden states after the final norm.
      unembed: Unembedding matrix.
      labels: Target ids, already shifted.
      mask: True where statistics are wanted; None is everywhere.
      fields: Optional statistics, of `expected_rank`, `topk_entropy`, `collision`.
      chunk_size: As in `fused_weighted_nll`, and so are the following.
      logit_cap: Soft cap of the logits.
      bias: Added to the logits.
      vocab_size: The number of real vocabulary entries.

    Returns:
      TokenStats of the shape of `labels`, 0 where the mask is false.

    Raises:
      TypeError, ValueError: If dtypes or shapes do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> stats = fused_token_stats(jnp.eye(2, 4), jnp.eye(5, 4), jnp.array([0, 3]))
      >>> stats.rank.tolist()
      [1, 5]
    """
    check_fields(fields)
    mask, projection, sizes = _prepare(
        hidden, unembed, labels, mask, bias, fields, chunk_size, logit_cap, vocab_size, None
    )
    check_options(labels, None, None, vocab_size, unembed.shape[0])
    return local_token_stats(hidden, unembed, labels, mask, bias, tuple(fields), projection, sizes)


def local_token_stats(
    hidden: Float[Array, "... D"],
    unembed: Float[Array, "V D"],
    labels: Int[Array, "..."],
    mask: Bool[Array, "..."],
    bias: Float[Array, "V"] | None,
    fields: Collection[str],
    projection: Projection,
    sizes: tuple[int, ...],
) -> TokenStats:
    """`fused_token_stats`, where `unembed` may be one device's rows of the vocabulary."""
    plan = _Plan(projection, _Gather(frozenset(fields)), sizes)
    matrices, rest = _same_axes(
        lax.stop_gradient((hidden.reshape(-1, hidden.shape[-1]), unembed, bias)),
        (labels.ravel().astype(jnp.int32), mask.ravel()),
        projection.vocab_axis,
    )
    hidden, unembed, bias = matrices
    flat_labels, flat_mask = rest
    packed = _Packed.of(flat_mask, sizes)
    one = jnp.float32(1)
    state = _run(plan, packed, hidden, unembed, bias, flat_labels, None, None, one, gradients=False)
    return jax.tree.map(lambda x: packed.unpack(x, flat_mask).reshape(labels.shape), state.stats)


@dataclasses.dataclass(frozen=True)
class _Gather(Weighting):
    """No weights: names the statistics to gather."""

    fields: frozenset[str]

    @property
    def requires(self) -> frozenset[str]:
        return self.fields

    def _weights(
        self, stats: TokenStats, batch_stat: Float[Array, ""] | None
    ) -> Float[Array, "..."]:
        return jnp.ones_like(stats.nll)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The static part of a call: hashable, so that jit traces once."""

    projection: Projection
    weighting: Weighting
    chunk_sizes: tuple[int, ...]


def _prepare(
    hidden: Float[Array, "... D"],
    unembed: Float[Array, "V D"],
    labels: Int[Array, "..."],
    mask: Bool[Array, "..."] | None,
    bias: Float[Array, "V"] | None,
    fields: Collection[str],
    chunk_size: int | None,
    logit_cap: float | None,
    vocab_size: int | None,
    vocab_axis: str | None,
) -> tuple[Bool[Array, "..."], Projection, tuple[int, ...]]:
    """Checks the arguments and fixes the static sizes."""
    check_inputs("hidden", hidden, labels)
    if unembed.ndim != 2 or unembed.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"unembed must be [V, D] with the D of hidden: got unembed {unembed.shape}, "
            f"hidden {hidden.shape}. Pass kernel.T of a Flax Dense."
        )
    if bias is not None and bias.shape != unembed.shape[:1]:
        raise ValueError(f"bias must be [V]: got bias {bias.shape}, unembed {unembed.shape}.")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, or None: got {chunk_size}.")
    if logit_cap is not None and not logit_cap > 0:
        raise ValueError(f"logit_cap must be positive, or None: got {logit_cap}.")
    rows, features = unembed.shape
    if vocab_size is None:
        vocab_size = rows if vocab_axis is None else rows * lax.axis_size(vocab_axis)
    if chunk_size is None:
        chunk_size = default_chunk_size(labels.size, features, rows, fields=fields)
    chunk = min(chunk_size, labels.size) or 1
    sizes = (chunk, chunk // 4) if chunk >= 64 else (chunk,)
    projection = Projection(rows, vocab_size, logit_cap, vocab_axis)
    return resolve_mask(mask, labels), projection, sizes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Packed:
    """Supervised positions moved to the front.

    Attributes:
      order: Position of each slot; beyond `count`, positions out of range.
      count: The number of supervised positions.
    """

    order: Int[Array, "S"]
    count: Int[Array, ""]

    @classmethod
    def of(cls, mask: Bool[Array, "N"], sizes: tuple[int, ...]) -> _Packed:
        """Slots for the mask, enough for whole chunks of any size."""
        slots = math.ceil(mask.size / sizes[0]) * sizes[0] + sizes[0]
        order = jnp.nonzero(mask, size=slots, fill_value=mask.size)[0]
        return cls(order.astype(jnp.int32), jnp.sum(mask, dtype=jnp.int32))

    def take(self, x: Float[Array, "N ..."], start: Int[Array, ""], size: int) -> Any:
        """The rows of `size` slots from `start`; zeros where a slot is empty."""
        positions = lax.dynamic_slice_in_dim(self.order, start, size)
        return jnp.take(x, positions, axis=0, mode="fill", fill_value=0)

    def unpack(self, x: Float[Array, "S ..."], mask: Bool[Array, "N"]) -> Float[Array, "N ..."]:
        """Slots back at their positions; zeros where the mask is false."""
        slot = jnp.maximum(jnp.cumsum(mask) - 1, 0)
        kept = mask.reshape(-1, *(1,) * (x.ndim - 1))
        return jnp.where(kept, x[slot], jnp.zeros((), x.dtype))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _State:
    """What the loop over chunks has gathered, by slot."""

    stats: TokenStats
    weights: Float[Array, "S"]
    d_hidden: Float[Array, "S D"] | None
    d_unembed: Float[Array, "V D"] | None
    d_bias: Float[Array, "V"] | None


def _run(plan: _Plan, *arrays: Any, gradients: bool) -> _State:
    """Runs the loop in the form that suits the backend it is compiled for."""

    def loop(for_cpu: bool) -> Callable[..., _State]:
        projection = dataclasses.replace(plan.projection, for_cpu=for_cpu)
        chosen = dataclasses.replace(plan, projection=projection)
        return functools.partial(_loop, chosen, gradients=gradients)

    state: _State = lax.platform_dependent(*arrays, cpu=loop(True), default=loop(False))
    return state


def _loop(
    plan: _Plan,
    packed: _Packed,
    hidden: Float[Array, "N D"],
    unembed: Float[Array, "V D"],
    bias: Float[Array, "V"] | None,
    labels: Int[Array, "N"],
    token_weights: Float[Array, "N"] | None,
    batch_stat: Float[Array, ""] | None,
    ramp: Float[Array, ""],
    *,
    gradients: bool,
) -> _State:
    """Runs as many chunks as the supervised tokens fill."""
    projection, weighting = plan.projection, plan.weighting
    dtype = np.promote_types(hidden.dtype, jnp.float32)
    slots = packed.order.size

    token_axes = varying_axes((packed, labels, token_weights, batch_stat, ramp))
    matrix_axes = varying_axes((hidden, unembed, bias))

    def empty(*shape: int, dtype: Any = dtype, axes: frozenset[str] = token_axes) -> Any:
        return mark_varying(jnp.zeros(shape, dtype), axes)

    stats = TokenStats(
        nll=empty(slots),
        rank=empty(slots, dtype=jnp.int32),
        entropy=empty(slots),
        max_prob=empty(slots),
        vocab_size=projection.vocab_size,
        **{name: empty(slots) for name in weighting.requires},
    )
    state = _State(stats, empty(slots), None, None, None)
    if gradients:
        state = dataclasses.replace(
            state,
            d_hidden=empty(slots, hidden.shape[1], dtype=hidden.dtype, axes=matrix_axes),
            d_unembed=empty(*unembed.shape, axes=matrix_axes),
            d_bias=None if bias is None else empty(*bias.shape, axes=matrix_axes),
        )

    def step(
        size: int,
        first: Int[Array, ""],
        index: Int[Array, ""],
        carry: tuple[_State, Float[Array, "T C W"]],
    ) -> tuple[_State, Float[Array, "T C W"]]:
        state, scratch = carry
        start = first + index * size
        supervised = start + jnp.arange(size, dtype=jnp.int32) < packed.count
        hidden_chunk = packed.take(hidden, start, size)
        labels_chunk = packed.take(labels, start, size)
        logits = chunk_logits(hidden_chunk, unembed, bias, projection, scratch)
        stats, softmax = chunk_stats(logits, labels_chunk, projection, weighting.requires)
        static = None if token_weights is None else packed.take(token_weights, start, size)
        weights = weighting(stats, batch_stat, token_weights=static, ramp=ramp.astype(dtype))
        weights = jnp.where(supervised, weights, 0)
        put = functools.partial(lax.dynamic_update_slice_in_dim, start_index=start, axis=0)
        update: dict[str, Any] = {
            "stats": jax.tree.map(put, state.stats, stats),
            "weights": put(state.weights, weights),
        }
        if gradients:
            assert state.d_hidden is not None
            assert state.d_unembed is not None
            d_hidden, update["d_unembed"], update["d_bias"] = chunk_gradients(
                logits,
                softmax,
                weights,
                labels_chunk,
                hidden_chunk,
                unembed,
                projection,
                state.d_unembed,
                state.d_bias,
            )
            update["d_hidden"] = put(state.d_hidden, d_hidden.astype(hidden.dtype))
        return dataclasses.replace(state, **update), logits

    done = jnp.int32(0)
    for size in plan.chunk_sizes:
        last = size == plan.chunk_sizes[-1]
        left = packed.count - done
        trips = -(-left // size) if last else left // size
        scratch = empty(projection.num_tiles, size, projection.tile, axes=matrix_axes)
        body = functools.partial(step, size, done)
        state, _ = lax.fori_loop(jnp.int32(0), trips, body, (state, scratch))
        done += trips * size
    return state


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(
    plan: _Plan,
    hidden: Float[Array, "N D"],
    unembed: Float[Array, "V D"],
    bias: Float[Array, "V"] | None,
    labels: Int[Array, "N"],
    mask: Bool[Array, "N"],
    token_weights: Float[Array, "N"] | None,
    batch_stat: Float[Array, ""] | None,
    ramp: Float[Array, ""],
) -> LossOutput:
    packed = _Packed.of(mask, plan.chunk_sizes)
    rest = (labels, token_weights, batch_stat, ramp)
    return _sums(plan, packed, _run(plan, packed, hidden, unembed, bias, *rest, gradients=False))


def _loss_fwd(
    plan: _Plan,
    hidden: Float[Array, "N D"],
    unembed: Float[Array, "V D"],
    bias: Float[Array, "V"] | None,
    labels: Int[Array, "N"],
    mask: Bool[Array, "N"],
    token_weights: Float[Array, "N"] | None,
    batch_stat: Float[Array, ""] | None,
    ramp: Float[Array, ""],
) -> tuple[LossOutput, Any]:
    packed = _Packed.of(mask, plan.chunk_sizes)
    rest = (labels, token_weights, batch_stat, ramp)
    state = _run(plan, packed, hidden, unembed, bias, *rest, gradients=True)
    assert state.d_hidden is not None
    d_hidden = packed.unpack(state.d_hidden, mask)
    # Empty arrays carry the dtypes, which residuals cannot hold as such.
    like = jnp.empty((0,), unembed.dtype), None if bias is None else jnp.empty((0,), bias.dtype)
    return _sums(plan, packed, state), (d_hidden, state.d_unembed, state.d_bias, like)


def _loss_bwd(plan: _Plan, residuals: Any, cotangent: LossOutput) -> tuple[Any, ...]:
    d_hidden, d_unembed, d_bias, (unembed_like, bias_like) = residuals
    scale = cotangent.total
    return (
        (d_hidden * scale.astype(d_hidden.dtype)),
        (d_unembed * scale).astype(unembed_like.dtype),
        None if d_bias is None else (d_bias * scale).astype(bias_like.dtype),
        None,  # labels
        None,  # mask
        None,  # token_weights, batch_stat and ramp are constants, as everything
        None,  # that makes up a weight
        None,
    )


_loss.defvjp(_loss_fwd, _loss_bwd)


def _sums(plan: _Plan, packed: _Packed, state: _State) -> LossOutput:
    supervised = jnp.arange(packed.order.size, dtype=jnp.int32) < packed.count
    return weighted_sums(state.stats, supervised, plan.weighting, state.weights)


def _same_axes(
    matrices: tuple[Any, ...], per_token: tuple[Any, ...], vocab_axis: str | None
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Marks all inputs as varying over the shard_map axes that any of them varies over.

    The transpose of that mark sums the gradient over the axes where an input was
    replicated. The vocabulary axis is marked on the matrices only: what concerns a
    token is equal on all devices that share the vocabulary, and so is the loss.
    """
    axes = varying_axes((matrices, per_token))
    return mark_varying(matrices, axes), mark_varying(per_token, axes - {vocab_axis})
