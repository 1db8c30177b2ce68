"""TokenStats: the statistics of each prediction that weightings read."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int

__all__ = ["OPTIONAL_FIELDS", "TOP_K", "TokenStats", "token_stats"]

# Statistics computed only for weightings that read them.
OPTIONAL_FIELDS = frozenset({"expected_rank", "topk_entropy", "collision"})

# EAFT (arXiv:2601.02151) takes its entropy over the 20 largest logits.
TOP_K = 20


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenStats:
    """Statistics of the model's prediction at each position.

    All arrays have the shape of the labels. Nothing here is of size vocabulary,
    so a weighting written against `TokenStats` runs unchanged on whole logits, in
    the fused loss and over a sharded vocabulary.

    Attributes:
      nll: −log p of the label, nats; the one field that losses are differentiated through.
      rank: int32, `#{v : z_v >= z_label}` ≥ 1; ties take the worst rank.
      entropy: −Σ p log p over the vocabulary, nats.
      max_prob: The largest probability.
      expected_rank: E[R] = Σ i·p_(i), p sorted falling; None unless requested.
      topk_entropy: Entropy in nats of the softmax renormalised over the 20
        largest logits; None unless requested.
      collision: Σ p²; None unless requested.
      vocab_size: The number of real vocabulary entries (static).
    """

    nll: Float[Array, "..."]
    rank: Int[Array, "..."]
    entropy: Float[Array, "..."]
    max_prob: Float[Array, "..."]
    expected_rank: Float[Array, "..."] | None = None
    topk_entropy: Float[Array, "..."] | None = None
    collision: Float[Array, "..."] | None = None
    vocab_size: int = dataclasses.field(default=0, metadata={"static": True})

    @property
    def prob(self) -> Float[Array, "..."]:
        """The label's probability."""
        return jnp.exp(-self.nll)


def token_stats(
    logits: Float[Array, "... V"],
    labels: Int[Array, "..."],
    fields: Collection[str] = (),
) -> TokenStats:
    """Statistics of each label under the model's own distribution.

    This is the definition that every faster variant is tested against. It sorts
    the vocabulary if `expected_rank` is requested.

    Args:
      logits: Unnormalised log-probabilities (nats), any float dtype; −inf removes
        an entry from the distribution.
      labels: Target ids in `[0, V)`, already shifted. A label outside the range
        gives NaN.
      fields: Optional statistics to compute, of `expected_rank`, `topk_entropy`
        and `collision`.

    Returns:
      TokenStats in float32 (float64 for float64 logits), with a gradient through
      every field but `rank`.

    Raises:
      TypeError: If `logits` is not floating or `labels` is not integer.
      ValueError: If the shapes do not fit, or a field is unknown.

    Example:
      >>> import jax.numpy as jnp
      >>> stats = token_stats(jnp.array([[2.0, 0.5, 2.0]]), jnp.array([2]))
      >>> int(stats.rank[0]), round(float(stats.nll[0]), 4)
      (2, 0.7989)

    References:
      Yu et al., Probability-Entropy Calibration, arXiv:2602.01745, 2026.
    """
    check_fields(fields)
    check_inputs("logits", logits, labels)
    vocab_size = logits.shape[-1]
    logits = logits.astype(np.promote_types(logits.dtype, jnp.float32))
    log_probs = jax.nn.log_softmax(logits)
    probs = jnp.exp(log_probs)

    in_range = label_in_range(labels, vocab_size)
    index = jnp.where(in_range, labels, 0)[..., None]
    label_logit = jnp.take_along_axis(logits, index, axis=-1)
    label_log_prob = jnp.take_along_axis(log_probs, index, axis=-1)[..., 0]

    expected_rank = topk_entropy = collision = None
    if "expected_rank" in fields:
        falling = -jnp.sort(-probs, axis=-1)
        position = jnp.arange(1, vocab_size + 1, dtype=probs.dtype)
        expected_rank = jnp.einsum("...v,v->...", falling, position)
    if "topk_entropy" in fields:
        topk_entropy = entropy(jax.lax.top_k(logits, min(TOP_K, vocab_size))[0])
    if "collision" in fields:
        collision = jnp.sum(probs**2, axis=-1)
    return TokenStats(
        nll=jnp.where(in_range, -label_log_prob, jnp.nan),
        rank=jnp.sum(logits >= label_logit, axis=-1, dtype=jnp.int32),
        entropy=entropy(logits),
        max_prob=jnp.max(probs, axis=-1),
        expected_rank=expected_rank,
        topk_entropy=topk_entropy,
        collision=collision,
        vocab_size=vocab_size,
    )


def entropy(logits: Float[Array, "... V"]) -> Float[Array, "..."]:
    """Entropy in nats of softmax(logits), where −inf logits are ignored."""
    log_probs = jax.nn.log_softmax(logits)
    # p·log p → 0 as p → 0, but 0·(−inf) is NaN in floating point; a NaN stays one.
    impossible = jnp.isneginf(log_probs)
    return -jnp.sum(jnp.exp(log_probs) * jnp.where(impossible, 0.0, log_probs), axis=-1)


def label_in_range(labels: Int[Array, "..."], vocab_size: int) -> Bool[Array, "..."]:
    """True where a label is a vocabulary entry."""
    return (labels >= 0) & (labels < vocab_size)


def check_fields(fields: Collection[str]) -> None:
    """Raises ValueError if a field is not an optional statistic."""
    if unknown := set(fields) - OPTIONAL_FIELDS:
        raise ValueError(
            f"fields must be among {sorted(OPTIONAL_FIELDS)}: got {sorted(unknown)}. "
            "nll, rank, entropy and max_prob are always included."
        )


def check_inputs(name: str, inputs: Float[Array, "... X"], labels: Int[Array, "..."]) -> None:
    """Raises if `inputs` is not floating, or `labels` is not integer or of another shape."""
    if not jnp.issubdtype(inputs.dtype, jnp.floating):
        raise TypeError(f"{name} must be floating: got {inputs.dtype}.")
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"labels must be integers: got {labels.dtype}. Pass token ids.")
    if labels.shape != inputs.shape[:-1]:
        raise ValueError(
            f"labels must have the shape of {name} without its last axis: got labels "
            f"{labels.shape}, {name} {inputs.shape}. Shift labels before the call."
        )
