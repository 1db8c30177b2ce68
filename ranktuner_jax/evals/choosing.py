"""The choice of the next token: the likeliest, or one drawn by temperature, top-k and top-p."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ranktuner_jax.errors import UserError

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

__all__ = ["Rule", "choose"]


class Rule(NamedTuple):
    """How tokens are chosen; what is None is left out of the program.

    Attributes:
      temperature: What logits are divided by; None takes the likeliest token.
      top_k: Only this many of the likeliest tokens can be drawn.
      top_p: Only the likeliest tokens can be drawn, as many as are needed for this probability.
    """

    temperature: np.float32 | None = None
    top_k: np.int32 | None = None
    top_p: np.float32 | None = None

    @classmethod
    def of(cls, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0) -> Rule:
        """Reads the usual settings: 0 is greedy, and 0 and 1 leave top-k and top-p out.

        Raises:
          UserError: If one of them is out of its range.

        Example:
          >>> Rule.of(temperature=0.5, top_k=40)
          Rule(temperature=np.float32(0.5), top_k=np.int32(40), top_p=None)
        """
        if not 0 <= temperature < float("inf"):
            raise UserError(f"temperature: expected 0 (greedy) or more, got {temperature}")
        if top_k < 0:
            raise UserError(f"top_k: expected 0 (all tokens) or more, got {top_k}")
        if not 0 < top_p <= 1:
            raise UserError(f"top_p: expected more than 0 and at most 1, got {top_p}")
        if not temperature:
            return cls()
        return cls(
            np.float32(temperature),
            np.int32(top_k) if top_k else None,
            np.float32(top_p) if top_p < 1 else None,
        )


def choose(
    logits: Float[Array, "B V"], rule: Rule, keys: Array, steps: Int[Array, " B"]
) -> Int[Array, " B"]:
    """The next token of each row; of equal ones the lowest id.

    Args:
      logits: Of the next token, float32.
      rule: How it is chosen.
      keys: The random key of each row; greedy choices do not use them.
      steps: The number of tokens that the row has written, folded into its key.

    Example:
      >>> keys = jax.random.split(jax.random.key(0), 1)
      >>> choose(jnp.array([[0.0, 2.0, 1.0]]), Rule.of(), keys, jnp.array([0])).tolist()
      [1]
    """
    if rule.temperature is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / rule.temperature
    if rule.top_k is not None:
        logits = _keep_likeliest(logits, rule.top_k, by_count=True)
    if rule.top_p is not None:
        logits = _keep_likeliest(logits, rule.top_p, by_count=False)
    step_keys = jax.vmap(jax.random.fold_in)(keys, steps)
    return jax.vmap(jax.random.categorical)(step_keys, logits).astype(jnp.int32)


def _keep_likeliest(
    logits: Float[Array, "B V"], amount: Any, *, by_count: bool
) -> Float[Array, "B V"]:
    """The logits, minus infinity but for the fewest of the largest that make up `amount`.

    The least probability that is kept is found by bisection over the bits of a float32, whose
    order is that of the numbers: 31 sums over the vocabulary take less time than a sort.
    """
    probabilities = jax.nn.softmax(logits, axis=-1)
    masses = jnp.ones_like(probabilities) if by_count else probabilities
    bits = jax.lax.bitcast_convert_type(probabilities, jnp.int32)

    def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low + high) // 2
        mass = jnp.sum(jnp.where(bits >= middle[:, None], masses, 0.0), axis=-1)
        enough = mass >= amount
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    # From `low` up there is enough, from `high` up there is not: no probability is above 1.
    above_one = int(np.nextafter(np.float32(1), np.float32(2)).view(np.int32))
    low = jnp.zeros(logits.shape[0], jnp.int32)
    low, _ = jax.lax.fori_loop(0, 31, halve, (low, low + above_one))
    return jnp.where(bits >= low[:, None], logits, -jnp.inf)
