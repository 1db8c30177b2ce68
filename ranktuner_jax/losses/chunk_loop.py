"""The loop over chunks: as many as the supervised tokens fill."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ranktuner_jax.losses.chunk import chunk_gradients, chunk_logits, chunk_stats
from ranktuner_jax.losses.compaction import Compaction
from ranktuner_jax.losses.inputs import LossInputs, Operands
from ranktuner_jax.losses.plan import Plan
from ranktuner_jax.losses.stats import TokenStats
from ranktuner_jax.losses.varying import mark_varying, varying_axes

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoopState:
    """What the loop carries from chunk to chunk, for each slot of the `Compaction`.

    Attributes:
      stats: Statistics of each slot.
      weights: Weight of each slot; 0 where it is empty.
      grads: The gradient of Σ weights · nll: `hidden` by slot, `unembed` and `bias`
        summed so far, or None if they are constants; None where only the loss is wanted.
    """

    stats: TokenStats
    weights: Float[Array, "S"]
    grads: Operands | None


def run_chunks(
    plan: Plan, inputs: LossInputs, *, gradients: Collection[str] = ()
) -> tuple[Compaction, LoopState]:
    """Runs the loop in the form that suits the backend it is compiled for.

    Args:
      plan: How.
      inputs: On what.
      gradients: Operands to differentiate by: none, or `hidden` and any of the others.
    """
    compaction = Compaction.of(inputs.tokens.mask, plan.slots)

    def loop(backend: str) -> Callable[..., LoopState]:
        return functools.partial(_loop, plan.on(backend), gradients)

    state: LoopState = lax.platform_dependent(
        compaction, inputs, cpu=loop("cpu"), tpu=loop("tpu"), default=loop("gpu")
    )
    return compaction, state


def _loop(
    plan: Plan, gradients: Collection[str], compaction: Compaction, inputs: LossInputs
) -> LoopState:
    """Runs as many chunks as the supervised tokens fill."""
    projection, operands, tokens = plan.projection, inputs.operands, inputs.tokens
    hidden_dtype = operands.hidden.dtype
    dtype = np.promote_types(hidden_dtype, jnp.float32)
    slots = compaction.order.size

    token_axes = varying_axes((compaction, tokens, inputs.batch_stat, inputs.ramp))
    matrix_axes = varying_axes(operands)

    def zeros(*shape: int, dtype: Any = dtype, axes: frozenset[str] = token_axes) -> Any:
        return mark_varying(jnp.zeros(shape, dtype), axes)

    stats = TokenStats(
        nll=zeros(slots),
        rank=zeros(slots, dtype=jnp.int32),
        entropy=zeros(slots),
        max_prob=zeros(slots),
        vocab_size=projection.vocab_size,
        **{name: zeros(slots) for name in plan.fields},
    )
    grads = None
    if gradients:
        width = operands.hidden.shape[1]
        sums: Any = {
            name: zeros(*getattr(operands, name).shape, axes=matrix_axes)
            if name in gradients
            else None
            for name in ("unembed", "bias")
        }
        grads = Operands(hidden=zeros(slots, width, dtype=hidden_dtype, axes=matrix_axes), **sums)
    state = LoopState(stats, zeros(slots), grads)

    def step(
        size: int,
        first: Int[Array, ""],
        index: Int[Array, ""],
        carry: tuple[LoopState, Float[Array, "K C W"]],
    ) -> tuple[LoopState, Float[Array, "K C W"]]:
        state, scratch = carry
        start = first + index * size
        take = functools.partial(compaction.take, start=start, size=size)
        put = functools.partial(lax.dynamic_update_slice_in_dim, start_index=start, axis=0)
        # Without the barrier XLA:TPU gathers them again inside of each product.
        hidden = lax.optimization_barrier(take(operands.hidden))
        chunk = dataclasses.replace(operands, hidden=hidden)
        labels = take(tokens.labels)
        logits = chunk_logits(chunk, projection, scratch)
        stats, softmax = chunk_stats(
            logits, labels, projection, plan.fields, hidden_dtype if gradients else None
        )
        static = None if tokens.token_weights is None else take(tokens.token_weights)
        ramp = inputs.ramp.astype(dtype)
        weights = plan.weighting(stats, inputs.batch_stat, token_weights=static, ramp=ramp)
        weights = jnp.where(compaction.filled(start, size), weights, 0)
        grads = state.grads
        if grads is not None:
            sums: Any
            d_hidden, *sums = chunk_gradients(
                logits, softmax, weights, labels, chunk, projection, grads.unembed, grads.bias
            )
            grads = Operands(put(grads.hidden, d_hidden.astype(hidden_dtype)), *sums)
        stats = jax.tree.map(put, state.stats, stats)
        return LoopState(stats, put(state.weights, weights), grads), logits

    done = jnp.int32(0)
    for size in plan.chunk_sizes:
        last = size == plan.chunk_sizes[-1]
        left = compaction.count - done
        trips = -(-left // size) if last else left // size
        scratch = zeros(projection.num_tiles, size, projection.tile, axes=matrix_axes)
        body = functools.partial(step, size, done)
        # The name tells those who read the compiled program how much one iteration does.
        with jax.named_scope(f"chunks_of_{size}"):
            state, _ = lax.fori_loop(jnp.int32(0), trips, body, (state, scratch))
        done += trips * size
    return state
