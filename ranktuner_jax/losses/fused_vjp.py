"""The custom VJP of the fused loss: gradients are computed with the loss, chunk by chunk."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

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
    return _output(plan, *run_chunks(plan, inputs))


def _forward(plan: Plan, inputs: Any) -> tuple[LossOutput, tuple[Operands, Operands]]:
    # Each array comes with whether the loss is differentiated by it. A frozen matrix has no
    # gradient: where there are several chunks, XLA would not see that nobody reads it.
    matrices = {"unembed": inputs.operands.unembed, "bias": inputs.operands.bias}
    by = ["hidden", *(name for name, x in matrices.items() if x is not None and x.perturbed)]
    inputs = jax.tree.map(lambda leaf: leaf.value, inputs)
    compaction, state = run_chunks(plan, inputs, gradients=by)
    assert state.grads is not None
    d_hidden = compaction.restore(state.grads.hidden, inputs.tokens.mask)
    grads = dataclasses.replace(state.grads, hidden=d_hidden)
    # Empty arrays carry the dtypes, which residuals cannot hold as such.
    dtypes = jax.tree.map(lambda x: jnp.empty((0,), x.dtype), inputs.operands)
    return _output(plan, compaction, state), (grads, dtypes)


def _backward(
    plan: Plan, residuals: tuple[Operands, Operands], cotangent: LossOutput
) -> tuple[LossInputs]:
    none: Any = None
    if isinstance(cotangent.total, SymbolicZero):
        return (LossInputs(none, none, none, none),)

    def scaled(grad: Float[Array, "..."] | None, like: Float[Array, "0"]) -> Any:
        if grad is None:
            return None
        return (grad * cotangent.total.astype(grad.dtype)).astype(like.dtype)

    d_operands = jax.tree.map(scaled, *residuals, is_leaf=lambda leaf: leaf is None)
    # All other inputs make up the weights, which are constants.
    return (LossInputs(d_operands, none, none, none),)


weighted_total.defvjp(_forward, _backward, symbolic_zeros=True)


def _output(plan: Plan, compaction: Compaction, state: LoopState) -> LossOutput:
    supervised = compaction.filled(0, compaction.order.size)
    return weighted_sums(state.stats, supervised, plan.weighting, state.weights)
