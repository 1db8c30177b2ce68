"""The custom VJP of the fused loss: gradients are computed with the loss, chunk by chunk."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from ranktuner_jax.losses.chunk_loop import LoopState, run_chunks
from ranktuner_jax.losses.compaction import Compaction
from ranktuner_jax.losses.inputs import LossInputs, Operands
from ranktuner_jax.losses.plan import Plan
from ranktuner_jax.losses.sums import LossOutput, weighted_sums

if TYPE_CHECKING:
    from jaxtyping import Array, Float


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def weighted_total(plan: Plan, inputs: LossInputs) -> LossOutput:
    """The sums of the loss; only `total` is differentiable, with respect to the operands."""
    return _output(plan, *run_chunks(plan, inputs, gradients=False))


def _forward(plan: Plan, inputs: LossInputs) -> tuple[LossOutput, tuple[Operands, Operands]]:
    compaction, state = run_chunks(plan, inputs, gradients=True)
    assert state.grads is not None
    d_hidden = compaction.restore(state.grads.hidden, inputs.tokens.mask)
    grads = dataclasses.replace(state.grads, hidden=d_hidden)
    # Empty arrays carry the dtypes, which residuals cannot hold as such.
    dtypes = jax.tree.map(lambda x: jnp.empty((0,), x.dtype), inputs.operands)
    return _output(plan, compaction, state), (grads, dtypes)


def _backward(
    plan: Plan, residuals: tuple[Operands, Operands], cotangent: LossOutput
) -> tuple[LossInputs]:
    def scaled(grad: Float[Array, "..."], like: Float[Array, "0"]) -> Float[Array, "..."]:
        return (grad * cotangent.total.astype(grad.dtype)).astype(like.dtype)

    d_operands = jax.tree.map(scaled, *residuals)
    # All other inputs make up the weights, which are constants.
    none: Any = None
    return (LossInputs(d_operands, none, none, none),)


weighted_total.defvjp(_forward, _backward)


def _output(plan: Plan, compaction: Compaction, state: LoopState) -> LossOutput:
    supervised = compaction.filled(0, compaction.order.size)
    return weighted_sums(state.stats, supervised, plan.weighting, state.weights)
