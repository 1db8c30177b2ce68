"""The base of all methods: token statistics in, token weights out."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar

import jax
import jax.numpy as jnp

from ranktuner_jax.losses.stats import TokenStats

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int

__all__ = ["Weighting", "check_choice"]


@dataclasses.dataclass(frozen=True)
class Weighting:
    """Base of all methods: token statistics in, constant token weights out.

    A new method is one frozen dataclass that implements `weights`. In `requires` it
    names the statistics it reads beyond nll, rank, entropy and max_prob: the fused
    loss computes only those. A method that needs a statistic of the whole batch sets
    `uses_batch_statistic` and implements `batch_statistic`; the loss then makes a
    first pass for the nll of every token.

    Example:
      >>> import jax.numpy as jnp
      >>> from ranktuner_jax import losses
      >>> @dataclasses.dataclass(frozen=True)
      ... class Focal(losses.Weighting):
      ...     gamma: float = 2.0
      ...
      ...     def weights(self, stats, batch_stat):
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
          batch_stat: The result of `batch_statistic`, for methods that use one.
          token_weights: Static factors that multiply the weights; None is 1.
          ramp: From 0 (all weights 1) to 1 (the method's own).

        Returns:
          token_weights · (1 − ramp + ramp · w), in the dtype of `stats.nll`.
        """
        weights = self.weights(stats, batch_stat)
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
        axis_name: str | tuple[str, ...] | None,
    ) -> Float[Array, ""]:
        """The statistic of the whole batch that the weights depend on."""
        raise NotImplementedError

    def weights(
        self, stats: TokenStats, batch_stat: Float[Array, ""] | None
    ) -> Float[Array, "..."]:
        """The method's own weights: implement this, call the instance.

        Args:
          stats: Statistics of the tokens, with the fields named in `requires`.
          batch_stat: The result of `batch_statistic`; None for methods without one.

        Returns:
          Weights of the shape of `stats.nll`.
        """
        raise NotImplementedError


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}: got {value!r}.")
