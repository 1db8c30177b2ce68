"""RankTuner: the Relative Rank Indicator, and the weights that follow from it."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Literal

import jax.numpy as jnp

from ranktuner_jax.losses.stats import TokenStats
from ranktuner_jax.losses.weighting import Weighting, check_choice

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float

__all__ = ["RankTuner", "expected_rank_bound", "relative_rank"]


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
        check_choice("base", self.base, ("prob", "one"))
        check_choice("scale", self.scale, ("bound", "exact"))
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip must be positive, or None for no clip: got {self.clip}.")

    @property
    def requires(self) -> frozenset[str]:
        """`expected_rank` for the exact scale."""
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

    def weights(self, stats: TokenStats, batch_stat: Array | None) -> Float[Array, "..."]:
        """w·S, with S cut off at `clip`."""
        scale = self._scale(stats)
        if self.clip is not None:
            scale = jnp.minimum(scale, self.clip)
        return stats.prob * scale if self.base == "prob" else scale


def expected_rank_bound(stats: TokenStats) -> Float[Array, "..."]:
    """s(H), the paper's lower bound of the expected rank.

    ¼·2^H₂ + 1 for an entropy of two bits or more (Massey's guessing bound), otherwise
    1 + (1 − p_max). It jumps up by p_max where the branches meet.
    """
    high = 0.25 * jnp.exp(stats.entropy) + 1.0
    return jnp.where(stats.entropy >= 2 * math.log(2), high, 2.0 - stats.max_prob)


def relative_rank(stats: TokenStats) -> Float[Array, "..."]:
    """The Relative Rank Indicator I = 2^(f(R) − f(E[R])), f(x) = 1/log2(x + 1).

    Args:
      stats: Without `expected_rank`, s(H) is used in place of E[R].

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
