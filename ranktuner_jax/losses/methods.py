"""The methods that RankTuner is compared with, one class each, and all methods by name."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, ClassVar, Literal

import jax
import jax.numpy as jnp

from ranktuner_jax.losses.ranktuner import RankTuner
from ranktuner_jax.losses.stats import TokenStats
from ranktuner_jax.losses.weighting import Weighting, check_choice

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int

__all__ = ["DEFT", "DFT", "EAFT", "IDFT", "SFT", "TALR", "WEIGHTINGS", "Entropy", "ProFit"]


@dataclasses.dataclass(frozen=True)
class SFT(Weighting):
    """Plain supervised fine-tuning: every weight is 1.

    Example:
      >>> import jax.numpy as jnp
      >>> from ranktuner_jax import losses
      >>> SFT()(losses.token_stats(jnp.zeros((2, 4)), jnp.array([0, 1]))).tolist()
      [1.0, 1.0]
    """

    def weights(self, stats: TokenStats, batch_stat: Array | None) -> Float[Array, "..."]:
        """1 for every token."""
        return jnp.ones_like(stats.nll)


@dataclasses.dataclass(frozen=True)
class DFT(Weighting):
    """Dynamic fine-tuning (arXiv:2508.05629): the label's probability.

    Example:
      >>> import jax.numpy as jnp
      >>> from ranktuner_jax import losses
      >>> DFT()(losses.token_stats(jnp.zeros((1, 4)), jnp.array([0]))).tolist()
      [0.25]
    """

    def weights(self, stats: TokenStats, batch_stat: Array | None) -> Float[Array, "..."]:
        """The label's probability p."""
        return stats.prob


@dataclasses.dataclass(frozen=True)
class EAFT(Weighting):
    """Entropy-adaptive fine-tuning (arXiv:2601.02151): u = H₂₀/3.

    H₂₀ is the entropy in nats of the softmax renormalised over the 20 largest
    logits; 3 ≈ ln 20.

    Attributes:
      gate: "linear" is u; "power" is u^alpha; "sigmoid" is sigmoid(30·(u − 0.17)).
      alpha: Exponent of the power gate.

    Example:
      >>> import jax.numpy as jnp
      >>> from ranktuner_jax import losses
      >>> flat = losses.token_stats(jnp.zeros((1, 20)), jnp.array([0]), fields=EAFT().requires)
      >>> round(float(EAFT()(flat)[0]), 4)  # ln 20 / 3
      0.9986
    """

    gate: Literal["linear", "power", "sigmoid"] = "linear"
    alpha: float = 1.0

    def __post_init__(self) -> None:
        check_choice("gate", self.gate, ("linear", "power", "sigmoid"))
        if self.gate != "power" and self.alpha != 1.0:
            raise ValueError(
                f"alpha is read by gate='power' only: got alpha={self.alpha}, gate={self.gate!r}."
            )

    @property
    def requires(self) -> frozenset[str]:
        """`topk_entropy`."""
        return frozenset({"topk_entropy"})

    def weights(self, stats: TokenStats, batch_stat: Array | None) -> Float[Array, "..."]:
        """The gate of u = H₂₀/3."""
        assert stats.topk_entropy is not None
        share = stats.topk_entropy / 3.0
        if self.gate == "sigmoid":
            return jax.nn.sigmoid(30.0 * (share - 0.17))
        return share**self.alpha if self.gate == "power" else share


@dataclasses.dataclass(frozen=True)
class TALR(Weighting):
    """Token-adaptive loss reweighting (arXiv:2509.20758): max(p^(1/τ), min_weight).

    τ is the median over the batch's sequences of their mean nll, at least 1e-6; of
    an even number of sequences it is the mean of the two in the middle. It is a
    statistic of one micro-batch over all devices, so gradient accumulation changes it.

    Attributes:
      min_weight: The smallest weight.

    Example:
      >>> import jax.numpy as jnp
      >>> from ranktuner_jax import losses
      >>> logits, labels = jnp.zeros((2, 3, 8)), jnp.zeros((2, 3), int)
      >>> output = losses.weighted_nll(logits, labels, weighting=TALR())
      >>> round(float(output.metrics["weight"]) / 6, 4)  # p = e^−nll and τ = nll: e^−1
      0.3679
    """

    uses_batch_statistic: ClassVar[bool] = True
    min_weight: float = 0.01

    def batch_statistic(
        self,
        nll: Float[Array, "..."],
        mask: Bool[Array, "..."],
        sequence_ids: Int[Array, "..."] | None,
        axis_name: str | tuple[str, ...] | None,
    ) -> Float[Array, ""]:
        """τ: the median over sequences of the mean nll of their supervised tokens.

        Args:
          nll: nll of each token, nats.
          mask: True where a token is supervised.
          sequence_ids: Tokens with equal ids belong to one sequence (of this
            device). None: the last axis of nll is one sequence.
          axis_name: Axis or axes over which the batch is split.
        """
        means = _sequence_means(jax.lax.stop_gradient(nll), mask, sequence_ids)
        if axis_name is not None:
            means = jax.lax.all_gather(means, axis_name).ravel()
        count = jnp.sum(~jnp.isposinf(means))
        rising = jnp.sort(means)
        middle = rising[jnp.maximum((count - 1) // 2, 0)], rising[count // 2]
        median = jnp.where(count > 0, (middle[0] + middle[1]) / 2, 0.0)
        return jnp.maximum(median, 1e-6)

    def weights(self, stats: TokenStats, batch_stat: Array | None) -> Float[Array, "..."]:
        """max(p^(1/τ), min_weight), where τ is `batch_stat`."""
        if batch_stat is None:
            raise ValueError(
                "TALR needs a batch statistic: got none. Use weighted_nll or "
                "fused_weighted_nll, or pass batch_stat=TALR().batch_statistic(...)."
            )
        return jnp.maximum(jnp.exp(-stats.nll / batch_stat), self.min_weight)


@dataclasses.dataclass(frozen=True)
class ProFit(Weighting):
    """ProFit (arXiv:2601.09195): 1 where p ≥ threshold, else 0.

    The loss still divides by all supervised tokens; `mean(normalize="weights")`
    divides by the kept ones.

    Attributes:
      threshold: The smallest probability that is kept.

    Example:
      >>> import jax.numpy as jnp
      >>> from ranktuner_jax import losses
      >>> ProFit()(losses.token_stats(jnp.array([[5.0, 0.0]] * 2), jnp.array([0, 1]))).tolist()
      [1.0, 0.0]
    """

    threshold: float = 0.1

    def weights(self, stats: TokenStats, batch_stat: Array | None) -> Float[Array, "..."]:
        """1 where p ≥ threshold, else 0."""
        return jnp.where(stats.prob >= self.threshold, 1.0, 0.0)


@dataclasses.dataclass(frozen=True)
class DEFT(Weighting):
    """DEFT (arXiv:2602.11424): p^α with α = Σ p_v², the collision probability.

    Example:
      >>> import jax.numpy as jnp
      >>> from ranktuner_jax import losses
      >>> stats = losses.token_stats(jnp.zeros((1, 4)), jnp.array([0]), fields=DEFT().requires)
      >>> round(float(DEFT()(stats)[0]), 4)  # 0.25 ** 0.25
      0.7071
    """

    @property
    def requires(self) -> frozenset[str]:
        """`collision`."""
        return frozenset({"collision"})

    def weights(self, stats: TokenStats, batch_stat: Array | None) -> Float[Array, "..."]:
        """p^α with α = Σ p_v²."""
        assert stats.collision is not None
        return jnp.exp(-stats.nll * stats.collision)


@dataclasses.dataclass(frozen=True)
class IDFT(Weighting):
    """IDFT (arXiv:2602.12222): p^γ, γ = clip(exp(−(log p + H)/β), 0.1, 2).

    Attributes:
      beta: β, in nats.

    Example:
      >>> import jax.numpy as jnp
      >>> from ranktuner_jax import losses
      >>> IDFT()(losses.token_stats(jnp.zeros((1, 4)), jnp.array([0]))).round(4).tolist()
      [0.25]
    """

    beta: float = 1.0

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ValueError(f"beta must be positive: got {self.beta}.")

    def weights(self, stats: TokenStats, batch_stat: Array | None) -> Float[Array, "..."]:
        """p^γ."""
        gamma = jnp.clip(jnp.exp((stats.nll - stats.entropy) / self.beta), 0.1, 2.0)
        return jnp.exp(-stats.nll * gamma)


@dataclasses.dataclass(frozen=True)
class Entropy(Weighting):
    """A control: H / ln V, the entropy as a share of its maximum.

    Example:
      >>> import jax.numpy as jnp
      >>> from ranktuner_jax import losses
      >>> Entropy()(losses.token_stats(jnp.zeros((1, 4)), jnp.array([0]))).round(4).tolist()
      [1.0]
    """

    def weights(self, stats: TokenStats, batch_stat: Array | None) -> Float[Array, "..."]:
        """H / ln V."""
        return stats.entropy / math.log(stats.vocab_size)


WEIGHTINGS: dict[str, type[Weighting]] = {
    "ranktuner": RankTuner,
    "sft": SFT,
    "dft": DFT,
    "eaft": EAFT,
    "talr": TALR,
    "profit": ProFit,
    "deft": DEFT,
    "idft": IDFT,
    "entropy": Entropy,
}


def _sequence_means(
    nll: Float[Array, "..."],
    mask: Bool[Array, "..."],
    sequence_ids: Int[Array, "..."] | None,
) -> Float[Array, "S"]:
    """Mean nll of each sequence; +inf in slots without a supervised token."""
    nll, mask = jnp.where(mask, nll, 0), jnp.asarray(mask)
    if sequence_ids is None:
        sums, counts = jnp.atleast_1d(nll.sum(-1).ravel()), jnp.atleast_1d(mask.sum(-1).ravel())
    else:
        # Any integers are ids: sorted, a new sequence begins where the id changes.
        ids = jnp.asarray(sequence_ids).ravel()
        order = jnp.argsort(ids)
        ids = ids[order]
        slot = jnp.cumsum(jnp.concatenate([ids[:1] * 0, (ids[1:] != ids[:-1]).astype(ids.dtype)]))
        sums = jax.ops.segment_sum(nll.ravel()[order], slot, num_segments=ids.size)
        counts = jax.ops.segment_sum(
            mask.ravel()[order].astype(jnp.int32), slot, num_segments=ids.size
        )
    return jnp.where(counts > 0, sums / jnp.maximum(counts, 1).astype(sums.dtype), jnp.inf)
