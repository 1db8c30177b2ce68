"""The loss from logits: the definition of every faster variant."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.numpy as jnp

from ranktuner_jax.losses.inputs import TokenInputs, check_vocab_size
from ranktuner_jax.losses.ranktuner import RankTuner
from ranktuner_jax.losses.stats import token_stats
from ranktuner_jax.losses.sums import LossOutput, weighted_sums
from ranktuner_jax.losses.weighting import Weighting

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int

__all__ = ["weighted_nll"]


def weighted_nll(
    logits: Float[Array, "... V"],
    labels: Int[Array, "..."],
    mask: Bool[Array, "..."] | None = None,
    *,
    weighting: Weighting = RankTuner(),  # noqa: B008 (frozen)
    token_weights: Float[Array, "..."] | None = None,
    sequence_ids: Int[Array, "..."] | None = None,
    vocab_size: int | None = None,
    ramp: float | Float[Array, ""] = 1.0,
    axis_name: str | tuple[str, ...] | None = None,
) -> LossOutput:
    """Weighted negative log-likelihood from logits: Σ w · nll over supervised tokens.

    Use this if you have the logits; `fused_weighted_nll` gives the same numbers
    without ever holding all of them.

    Args:
      logits: Unnormalised log-probabilities (nats), any float dtype; statistics,
        weights and sums are float32 (float64 for float64 logits).
      labels: Target ids, already shifted. Any integer is allowed at unsupervised
        positions; a supervised label outside the vocabulary gives NaN.
      mask: True where a position is supervised; None: everywhere. Logits at
        unsupervised positions are not read, even if they are NaN.
      weighting: The method; its weights are constants to the gradient.
      token_weights: Static factor of each token's weight, constant to the gradient.
      sequence_ids: Which conversation a token belongs to, for methods that take a
        statistic over sequences (TALR); None: the last axis is one.
      vocab_size: The number of real vocabulary entries; columns beyond it are
        padding and ignored. None: all of them.
      ramp: From 0 (plain nll) to 1 (the method); may be traced.
      axis_name: The pmap or shard_map axis (or axes) over which the batch is
        split, for methods that take a statistic of the whole batch.

    Returns:
      LossOutput. `output.mean()` is the loss; where nothing is supervised it is 0,
      with a gradient of 0. NaN logits at a supervised position give NaN.

    Raises:
      TypeError, ValueError: If dtypes or shapes do not fit.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> logits = jnp.array([[2.0, 1.0, 0.0], [0.0, 3.0, 0.0]])
      >>> labels = jnp.array([0, 2])
      >>> loss = lambda logits: weighted_nll(logits, labels).mean()
      >>> round(float(loss(logits)), 3)
      0.295
      >>> jax.grad(loss)(logits).shape
      (2, 3)

    References:
      Yu et al., Probability-Entropy Calibration, arXiv:2602.01745, 2026.
    """
    mask = TokenInputs.of("logits", logits, labels, mask, token_weights, sequence_ids).mask
    check_vocab_size(vocab_size, logits.shape[-1])
    # Replaced before any arithmetic: a NaN that is only masked afterwards still
    # poisons the gradient (0 · NaN).
    stats = token_stats(
        jnp.where(mask[..., None], logits[..., :vocab_size], 0),
        jnp.where(mask, labels, 0),
        fields=weighting.requires,
    )
    batch_stat = None
    if weighting.uses_batch_statistic:
        batch_stat = weighting.batch_statistic(stats.nll, mask, sequence_ids, axis_name)
    weights = weighting(stats, batch_stat, token_weights=token_weights, ramp=ramp)
    return weighted_sums(stats, mask, weighting, weights)
