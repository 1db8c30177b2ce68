"""Weightings: one frozen dataclass a method, from TokenStats to token weights."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, ClassVar, Literal

import jax
import jax.numpy as jnp

from ranktuner_jax.losses.stats import TokenStats

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int

__all__ = [
    "DEFT",
    "DFT",
    "EAFT",
    "IDFT",
    "SFT",
    "TALR",
    "WEIGHTINGS",
    "Entropy",
    "ProFit",
    "RankTuner",
    "Weighting",
    "relative_rank",
]

_AxisName = str | tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Weighting:
    """Base of all methods: token statistics in, constant token weights out.

    A new method is one frozen dataclass that implements `_weights`. It names the
    statistics it reads beyond nll, rank, entropy and max_prob in `requires`, so
    that fused code gathers only those. A method that needs a figure of the whole
    batch sets `uses_batch_statistic` and implements `batch_statistic`; the loss
    then makes a first pass for the nll of every token.

    Example:
      >>> import jax.numpy as jnp
      >>> from ranktuner_jax import losses
      >>> @dataclasses.dataclass(frozen=True)
      ... class Focal(losses.Weighting):
      ...     gamma: float = 2.0
      ...
      ...     def _weights(self, stats, batch_stat):
      ...         return (1.0 - stats.prob) ** self.gamma
      >>> output = losses.weighted_nll(jnp.zeros((1, 4)), jnp.array([3]), weighting=Focal())
      >>> round(float(output.metrics["weight"]), 4)
      0.5625
    """

    uses_batch_statistic: ClassVar[bool] = False

    @property
    def requires(self) -> frozenset[str]:
        """The optional fields of TokenStats that this method reads."""
        return frozenset()

    def __call__(
        self,
        stats: TokenStats,
        batch_stat: Float[Array, ""] | None = None,
        *,
        token_weights: Float[Array, "..."] | None = None,
        ramp: float | Float[Array, ""] = 1.0,
    ) -> Float[Array, "..."]:
        """Weights of the tokens, constant to the gradient.

        Args:
          stats: Statistics of the tokens.
          batch_stat: What `batch_statistic` gave, for methods that use one.
          token_weights: Static factors that multiply the weights; None is 1.
          ramp: From 0 (all weights 1) to 1 (the method's own).

        Returns:
          token_weights · (1 − ramp + ramp · w), in the dtype of `stats.nll`.
        """
        weights = self._weights(stats, batch_stat)
        weights = (1.0 - ramp) + ramp * weights
        if token_weights is not None:
            weights = weights * token_weights
        # Weights become constants here: every method of the paper's comparison weights
        # the gradient of the nll and has none of its own. The fused VJP, which does not
        # differentiate weights, is tested against this line.
        return jax.lax.stop_gradient(weights.astype(stats.nll.dtype))

    def clipped(self, stats: TokenStats) -> Bool[Array, "..."]:
        """True where a token's weight was cut off by the method's clip."""
        return jnp.zeros_like(stats.rank, dtype=bool)

    def batch_statistic(
        self,
        nll: Float[Array, "..."],
        mask: Bool[Array, "..."],
        sequence_ids: Int[Array, "..."] | None,
        axis_name: _AxisName | None,
    ) -> Float[Array, ""]:
        """The figure of the whole batch that the weights depend on."""
        raise NotImplementedError

    def _weights(
        self, stats: TokenStats, batch_stat: Float[Array, ""] | None
    ) -> Float[Array, "..."]:
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class RankTuner(Weighting):
    r"""RankTuner: the Relative Scale S, the inverse of the Relative Rank Indicator I.

    With R the label's rank, E[R] its expectation under the model and
    f(x) = 1/log2(x + 1), I = 2^(f(R) − f(E[R])); both ranks large gives I ≈ 1, the
    Noise Region. The weight is w·S with

        scale="exact":  S = 1/I = 2^(f(E[R]) − f(R)), in (0.5, 2)
        scale="bound":  S = max(p·s(H), 1e-6)^(−K),  K = 1/log2(max(s(H), R) + 1)²

    where s(H) = ¼·2^H₂ + 1 for entropies H₂ ≥ 2 bits, else 2 − p_max, bounds E[R]
    from below; "bound" is what the paper trains with.

    Attributes:
      base: w: "prob" is the label's probability (the paper's choice for
        mathematics), "one" is 1 (its choice for general tasks).
      scale: "bound" or "exact".
      clip: Upper bound of S. With base "one", S reaches 245 on a confident
        conflict (R = 2, p → 0).

    Example:
      >>> import jax.numpy as jnp
      >>> stats = TokenStats(
      ...     nll=jnp.log(jnp.array([2.0, 1e6])),
      ...     rank=jnp.array([1, 2]),
      ...     entropy=jnp.array([0.7, 0.1]),
      ...     max_prob=jnp.array([0.5, 0.99]),
      ... )
      >>> [round(float(w), 2) for w in RankTuner(base="one")(stats)]
      [1.18, 243.62]
      >>> [round(float(w), 2) for w in RankTuner(base="one", clip=5.0)(stats)]
      [1.18, 5.0]

    References:
      Yu et al., Probability-Entropy Calibration, arXiv:2602.01745, 2026.
    """

    base: Literal["prob", "one"] = "prob"
    scale: Literal["bound", "exact"] = "bound"
    clip: float | None = None

    def __post_init__(self) -> None:
        _check_choice("base", self.base, ("prob", "one"))
        _check_choice("scale", self.scale, ("bound", "exact"))
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip must be positive, or None for no clip: got {self.clip}.")

    @property
    def requires(self) -> frozenset[str]:
        """`expected_rank` where the scale is exact."""
        return frozenset({"expected_rank"} if self.scale == "exact" else ())

    def clipped(self, stats: TokenStats) -> Bool[Array, "..."]:
        """True where S was above `clip`."""
        if self.clip is None:
            return super().clipped(stats)
        return self._scale(stats) > self.clip

    def _scale(self, stats: TokenStats) -> Float[Array, "..."]:
        if self.scale == "exact":
            return 1.0 / relative_rank(stats)
        bound = expected_rank_bound(stats)
        rank = stats.rank.astype(bound.dtype)
        exponent = 1.0 / jnp.log2(jnp.maximum(bound, rank) + 1.0) ** 2
        # log(p·s) rather than p·s: p underflows long before its logarithm does.
        log_ratio = jnp.maximum(jnp.log(bound) - stats.nll, math.log(1e-6))
        return jnp.exp(-exponent * log_ratio)

    def _weights(
        self, stats: TokenStats, batch_stat: Float[Array, ""] | None
    ) -> Float[Array, "..."]:
        scale = self._scale(stats)
        if self.clip is not None:
            scale = jnp.minimum(scale, self.clip)
        return stats.prob * scale if self.base == "prob" else scale


@dataclasses.dataclass(frozen=True)
class SFT(Weighting):
    """Plain supervised fine-tuning: every weight is 1.

    Example:
      >>> import jax.numpy as jnp
      >>> from ranktuner_jax import losses
      >>> SFT()(losses.token_stats(jnp.zeros((2, 4)), jnp.array([0, 1]))).tolist()
      [1.0, 1.0]
    """

    def _weights(
        self, stats: TokenStats, batch_stat: Float[Array, ""] | None
    ) -> Float[Array, "..."]:
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

    def _weights(
        self, stats: TokenStats, batch_stat: Float[Array, ""] | None
    ) -> Float[Array, "..."]:
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
        _check_choice("gate", self.gate, ("linear", "power", "sigmoid"))
        if self.gate != "power" and self.alpha != 1.0:
            raise ValueError(
                f"alpha is read by gate='power' only: got alpha={self.alpha}, gate={self.gate!r}."
            )

    @property
    def requires(self) -> frozenset[str]:
        """`topk_entropy`."""
        return frozenset({"topk_entropy"})

    def _weights(
        self, stats: TokenStats, batch_stat: Float[Array, ""] | None
    ) -> Float[Array, "..."]:
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
    figure of one micro-batch on all devices, so gradient accumulation changes it.

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
        axis_name: _AxisName | None,
    ) -> Float[Array, ""]:
        """τ: the median over sequences of the mean nll of their supervised tokens.

        Args:
          nll: nll of each token, nats.
          mask: True where a token is supervised.
          sequence_ids: Tokens with equal ids belong to one sequence (of this
            device). None: each row of the last axis is a sequence.
          axis_name: Axis or axes over whose devices the batch is spread.
        """
        means = _sequence_means(jax.lax.stop_gradient(nll), mask, sequence_ids)
        if axis_name is not None:
            means = jax.lax.all_gather(means, axis_name).ravel()
        count = jnp.sum(~jnp.isposinf(means))
        rising = jnp.sort(means)
        middle = rising[jnp.maximum((count - 1) // 2, 0)], rising[count // 2]
        median = jnp.where(count > 0, (middle[0] + middle[1]) / 2, 0.0)
        return jnp.maximum(median, 1e-6)

    def _weights(
        self, stats: TokenStats, batch_stat: Float[Array, ""] | None
    ) -> Float[Array, "..."]:
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

    def _weights(
        self, stats: TokenStats, batch_stat: Float[Array, ""] | None
    ) -> Float[Array, "..."]:
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

    def _weights(
        self, stats: TokenStats, batch_stat: Float[Array, ""] | None
    ) -> Float[Array, "..."]:
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

    def _weights(
        self, stats: TokenStats, batch_stat: Float[Array, ""] | None
    ) -> Float[Array, "..."]:
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

    def _weights(
        self, stats: TokenStats, batch_stat: Float[Array, ""] | None
    ) -> Float[Array, "..."]:
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


def expected_rank_bound(stats: TokenStats) -> Float[Array, "..."]:
    """s(H), the paper's lower bound of the expected rank.

    ¼·2^H₂ + 1 from two bits of entropy on (Massey's guessing bound), below that
    1 + (1 − p_max). It jumps up by p_max where the branches meet.
    """
    high = 0.25 * jnp.exp(stats.entropy) + 1.0
    return jnp.where(stats.entropy >= 2 * math.log(2), high, 2.0 - stats.max_prob)


def relative_rank(stats: TokenStats) -> Float[Array, "..."]:
    """The Relative Rank Indicator I = 2^(f(R) − f(E[R])), f(x) = 1/log2(x + 1).

    Args:
      stats: Where `expected_rank` was not gathered, s(H) stands in for E[R].

    Returns:
      I in (0.5, 2): below 1 where the label ranks worse than expected.

    Example:
      >>> import jax.numpy as jnp
      >>> from ranktuner_jax import losses
      >>> stats = losses.token_stats(jnp.array([[3.0, 0.0]]), jnp.array([1]), ["expected_rank"])
      >>> round(float(relative_rank(stats)[0]), 3)
      0.792
    """
    expected = stats.expected_rank
    if expected is None:
        expected = expected_rank_bound(stats)
    rank = stats.rank.astype(expected.dtype)
    return jnp.exp2(1.0 / jnp.log2(rank + 1.0) - 1.0 / jnp.log2(expected + 1.0))


def _sequence_means(
    nll: Float[Array, "..."],
    mask: Bool[Array, "..."],
    sequence_ids: Int[Array, "..."] | None,
) -> Float[Array, "S"]:
    """Mean nll of each sequence; +inf in slots that hold no supervised token."""
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


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}: got {value!r}.")
