"""The loss from hidden states: supervised tokens only, and never all logits in memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import TYPE_CHECKING

import jax
from jax import lax

from ranktuner_jax.losses.chunk_loop import run_chunks
from ranktuner_jax.losses.fused_vjp import weighted_total
from ranktuner_jax.losses.inputs import LossInputs, Operands, TokenInputs
from ranktuner_jax.losses.methods import SFT
from ranktuner_jax.losses.plan import FusedOptions, Plan
from ranktuner_jax.losses.ranktuner import RankTuner
from ranktuner_jax.losses.stats import TokenStats, check_fields
from ranktuner_jax.losses.sums import LossOutput
from ranktuner_jax.losses.weighting import Weighting

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int

__all__ = ["fused_token_stats", "fused_weighted_nll"]


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
    tokens: the work is proportional to their number, and nothing of size tokens ×
    vocabulary outlives a chunk. The gradients are computed with the loss, so
    differentiating for both inputs costs three matmuls in all, for `hidden` alone two,
    and a plain evaluation one (under `jax.checkpoint` one more; under `vmap` the
    gradient of `unembed` is held once for each mapped element: prefer a longer batch).

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

    (With `pcast` each device differentiates its own copy of the parameters; without it
    shard_map with `check_vma=True` has already summed their gradients.)

    Args:
      hidden: Hidden states after the final norm. The matmuls run in this dtype and
        accumulate in float32 (float64 for float64).
      unembed: Unembedding matrix in Hugging Face's layout; pass `kernel.T` of a Flax
        Dense. Cast to the dtype of `hidden` a tile at a time; its gradient is
        accumulated in float32 before it is returned in this dtype.
      labels: Target ids, already shifted; any integer where unsupervised. A
        supervised label outside the vocabulary gives NaN.
      mask: True where a position is supervised; None: everywhere.
      weighting: The method; hashable.
      chunk_size: Tokens whose logits are held at a time; None chooses
        `default_chunk_size`. The remainder runs in chunks of a quarter of it.
      logit_cap: Soft cap c of the logits, c·tanh(z/c); None for none.
      bias: Added to the logits.
      token_weights: Static factor of each token's weight.
      sequence_ids: Which conversation a token belongs to, for methods that take a
        statistic over sequences (TALR); None: the last axis of labels is one.
      vocab_size: The number of real vocabulary entries; rows beyond it are padding.
      ramp: From 0 (plain nll) to 1 (the method); may be traced.
      axis_name: The pmap or shard_map axis (or axes) over which the batch is
        split, for methods that take a statistic of the whole batch.

    Returns:
      LossOutput, the same as from `weighted_nll`.

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
    tokens = TokenInputs.of("hidden", hidden, labels, mask, token_weights, sequence_ids)
    operands = Operands.of(hidden, unembed, bias)
    options = FusedOptions(weighting, chunk_size, logit_cap, vocab_size, axis_name)
    return local_weighted_nll(options, operands, tokens, ramp)


def local_weighted_nll(
    options: FusedOptions, operands: Operands, tokens: TokenInputs, ramp: float | Float[Array, ""]
) -> LossOutput:
    """`fused_weighted_nll`, where `unembed` may be one device's rows of the vocabulary."""
    weighting = options.weighting
    plan = Plan.of(options, operands, tokens.labels.size, weighting.requires)
    batch_stat = None
    if weighting.uses_batch_statistic:
        nll = local_token_stats(options, operands, tokens).nll
        batch_stat = weighting.batch_statistic(
            nll, tokens.mask, tokens.sequence_ids, options.axis_name
        )
    inputs = LossInputs.of(operands, tokens, batch_stat, ramp, options.vocab_axis)
    output: LossOutput = weighted_total(plan, inputs)
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
    holding the logits; `expected_rank` is computed without a sort, to within
    0.35 % of E[R] − 1. Carries no gradient.

    Args:
      hidden: Hidden states after the final norm.
      unembed: Unembedding matrix.
      labels: Target ids, already shifted.
      mask: True where statistics are wanted; None: everywhere.
      fields: Optional statistics, of `expected_rank`, `topk_entropy`, `collision`.
      chunk_size: As in `fused_weighted_nll`, like the arguments below.
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
    tokens = TokenInputs.of("hidden", hidden, labels, mask)
    operands = Operands.of(hidden, unembed, bias)
    options = FusedOptions(SFT(), chunk_size, logit_cap, vocab_size)
    return local_token_stats(options, operands, tokens, fields)


def local_token_stats(
    options: FusedOptions, operands: Operands, tokens: TokenInputs, fields: Collection[str] = ()
) -> TokenStats:
    """`fused_token_stats`, where `unembed` may be one device's rows of the vocabulary."""
    options = dataclasses.replace(options, weighting=SFT())
    plan = Plan.of(options, operands, tokens.labels.size, fields)
    tokens = dataclasses.replace(tokens, token_weights=None)
    operands = lax.stop_gradient(operands)
    inputs = LossInputs.of(operands, tokens, None, 1.0, plan.projection.vocab_axis)
    compaction, state = run_chunks(plan, inputs)

    def restore(x: Float[Array, "S"]) -> Float[Array, "..."]:
        return compaction.restore(x, inputs.tokens.mask).reshape(tokens.labels.shape)

    return jax.tree.map(restore, state.stats)
