"""LossOutput: the sums that every loss variant returns, divided once by the caller."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import jax
import jax.numpy as jnp

from ranktuner_jax.losses.ranktuner import relative_rank
from ranktuner_jax.losses.stats import TokenStats
from ranktuner_jax.losses.weighting import Weighting

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float

__all__ = ["HISTOGRAM_EDGES", "NOISE_WIDTH", "LossOutput", "summarize", "weighted_sums"]

# 64 bins of weights, 8 a decade from 1e-5 to 1e3; the first and the last also
# count the weights outside.
_BINS = 64
_BINS_PER_DECADE = 8
_LOWEST_DECADE = -5
HISTOGRAM_EDGES = tuple(10 ** (_LOWEST_DECADE + i / _BINS_PER_DECADE) for i in range(_BINS + 1))

# |I − 1| below this is the Noise Region of the paper.
NOISE_WIDTH = 0.05


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossOutput:
    """Sums over the supervised tokens: numerator, denominator and statistics.

    Sums merge over micro-batches, devices and hosts by adding; the division comes
    last, so a token counts the same wherever it was computed.

    Only `total` carries a gradient, and it is linear in its cotangent. Across
    devices, differentiate the local `total`, `psum` the gradients and the
    LossOutput, then divide: a gradient taken through a `psum` is too large by the
    number of devices.

    Attributes:
      total: Σ weight · nll, nats.
      denom: The number of supervised tokens; never a sum of weights.
      metrics: Sums of `nll` (nats), `correct` (rank 1), `rank`, `entropy` (nats),
        `weight`, `weight_sq`, `clipped` (tokens at the clip), `weight_histogram`
        (64 bins, see `HISTOGRAM_EDGES`), and the tokens in the Noise Region,
        |I − 1| < 0.05 with R > 1: `noise_region` if the weighting reads the
        expected rank, `noise_region_bound` if s(H) is used in its place.

    Example:
      >>> import jax.numpy as jnp
      >>> a = LossOutput(jnp.float32(6.0), jnp.float32(3.0), {"weight": jnp.float32(1.5)})
      >>> both = a.merge(a)
      >>> float(both.mean()), float(both.mean(normalize="weights"))
      (2.0, 4.0)
    """

    total: Float[Array, ""]
    denom: Float[Array, ""]
    metrics: Mapping[str, Float[Array, "..."]]

    def mean(self, normalize: Literal["tokens", "weights"] = "tokens") -> Float[Array, ""]:
        """The loss: `total` over the number of supervised tokens.

        Args:
          normalize: "tokens" is the paper's mean. "weights" divides by Σ weight, as
            if the mean weight were one, so that learning rates carry over between
            methods.

        Returns:
          The mean in nats; 0 where nothing is supervised (or all weights are 0).

        Raises:
          ValueError: If `normalize` is neither "tokens" nor "weights".
        """
        if normalize not in ("tokens", "weights"):
            raise ValueError(f"normalize must be 'tokens' or 'weights': got {normalize!r}.")
        denom = self.denom if normalize == "tokens" else self.metrics["weight"]
        # A NaN in `total` survives: only a denominator of exactly zero is replaced.
        return self.total / jnp.where(denom == 0, 1.0, denom)

    def merge(self, other: LossOutput) -> LossOutput:
        """The sums over both sets of tokens."""
        return jax.tree.map(jnp.add, self, other)

    def psum(self, axis_name: str | tuple[str, ...]) -> LossOutput:
        """The sums over all devices of a pmap or shard_map axis."""
        return jax.lax.psum(self, axis_name)


def weighted_sums(
    stats: TokenStats,
    mask: Bool[Array, "..."],
    weighting: Weighting,
    weights: Float[Array, "..."],
) -> LossOutput:
    """Sums over the supervised tokens, shared by every variant.

    Args:
      stats: Statistics of all positions.
      mask: True where a position is supervised; elsewhere the statistics are not read.
      weighting: The method that the weights come from.
      weights: The factor of each token's nll, already constant to the gradient.
    """

    def total(x: Float[Array, "..."]) -> Float[Array, ""]:
        return jnp.sum(jnp.where(mask, x.astype(stats.nll.dtype), 0))

    exact = stats.expected_rank is not None
    noise = (jnp.abs(relative_rank(stats) - 1.0) < NOISE_WIDTH) & (stats.rank > 1)
    metrics = {
        "nll": total(stats.nll),
        "correct": total(stats.rank == 1),
        "rank": total(stats.rank),
        "entropy": total(stats.entropy),
        "weight": total(weights),
        "weight_sq": total(weights**2),
        "clipped": total(weighting.clipped(stats)),
        "noise_region" if exact else "noise_region_bound": total(noise),
        "weight_histogram": _histogram(weights, mask),
    }
    return LossOutput(
        total=total(weights * stats.nll),
        denom=jnp.sum(mask, dtype=stats.nll.dtype),
        metrics=jax.lax.stop_gradient(metrics),
    )


def _histogram(weights: Float[Array, "..."], mask: Bool[Array, "..."]) -> Float[Array, "64"]:
    bins = jnp.floor((jnp.log10(weights) - _LOWEST_DECADE) * _BINS_PER_DECADE)
    bins = jnp.clip(bins, 0, _BINS - 1)
    # Comparing with every bin is a vectorised pass over N·64; a scatter is slower on every backend.
    hits = (bins.ravel()[:, None] == jnp.arange(_BINS, dtype=bins.dtype)[None]) & mask.ravel()[
        :, None
    ]
    return jnp.sum(hits, axis=0, dtype=weights.dtype)


def summarize(output: LossOutput) -> dict[str, Float[Array, ""]]:
    """Means, shares and quantiles for logging, from sums.

    Args:
      output: Sums over all tokens to summarise.

    Returns:
      Scalars by name: `loss`, `nll` and `entropy` (nats), `perplexity`, `accuracy`,
      `rank/mean`, `weight/mean`, `weight/effective_fraction` ((Σw)²/(N·Σw²), 1 for
      equal weights), `weight/clipped` and `noise_region…` (shares), and the
      quantiles `weight/p05`, `weight/p50`, `weight/p95` (to the width of a bin, a
      third). All are 0 where nothing is supervised.

    Example:
      >>> import jax.numpy as jnp
      >>> from ranktuner_jax import losses
      >>> logits, labels = jnp.zeros((3, 8)), jnp.array([0, 1, 2])
      >>> summary = losses.summarize(losses.weighted_nll(logits, labels))
      >>> round(float(summary["perplexity"]), 3)
      8.0
    """
    sums = output.metrics
    count = jnp.maximum(output.denom, 1)
    power = output.denom * sums["weight_sq"]
    summary = {
        "loss": output.mean(),
        "nll": sums["nll"] / count,
        "perplexity": jnp.exp(sums["nll"] / count),
        "accuracy": sums["correct"] / count,
        "entropy": sums["entropy"] / count,
        "rank/mean": sums["rank"] / count,
        "weight/mean": sums["weight"] / count,
        "weight/effective_fraction": sums["weight"] ** 2 / jnp.where(power == 0, 1.0, power),
        "weight/clipped": sums["clipped"] / count,
    }
    for name in ("noise_region", "noise_region_bound"):
        if name in sums:
            summary[name] = sums[name] / count
    for percent in (5, 50, 95):
        summary[f"weight/p{percent:02d}"] = _quantile(sums["weight_histogram"], percent / 100)
    return summary


def _quantile(histogram: Float[Array, "64"], q: float) -> Float[Array, ""]:
    """The weight below which a share q lies, interpolated in the logarithm."""
    below = jnp.cumsum(histogram)
    target = q * below[-1]
    index = jnp.clip(jnp.searchsorted(below, target), 0, _BINS - 1)
    inside = (target - (below[index] - histogram[index])) / jnp.maximum(histogram[index], 1)
    decade = _LOWEST_DECADE + (index.astype(histogram.dtype) + inside) / _BINS_PER_DECADE
    return jnp.where(below[-1] > 0, jnp.exp(decade * math.log(10)), 0.0)
