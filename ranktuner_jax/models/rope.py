"""Rotary position embeddings, with the frequency scalings that checkpoints ship."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from ranktuner_jax.errors import UserError

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

__all__ = ["ROPE_TYPES", "RopeConfig", "apply_rotary", "rotary_tables"]

# Hugging Face's names, each with the settings it reads beside `rope_theta`.
ROPE_TYPES: dict[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "dynamic": frozenset({"factor"}),
    "llama3": frozenset(
        {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
    ),
    "yarn": frozenset(
        {
            "factor",
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        }
    ),
}
_REQUIRED = ROPE_TYPES | {"yarn": frozenset({"factor", "original_max_position_embeddings"})}


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """How positions turn into angles; fields as in Hugging Face's `rope_parameters`.

    Example:
      >>> RopeConfig.from_parameters({"rope_type": "linear", "factor": 2.0, "rope_theta": 1e5})
      RopeConfig(rope_type='linear', rope_theta=100000.0, settings=(('factor', 2.0),))
    """

    rope_type: str = "default"
    rope_theta: float = 10_000.0
    settings: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, Any]) -> RopeConfig:
        """Reads Hugging Face's `rope_parameters` (transformers 5 converts other keys to it)."""
        given = {k: v for k, v in parameters.items() if v is not None}
        rope_type = given.pop("rope_type", given.pop("type", "default"))
        given.pop("type", None)
        if rope_type not in ROPE_TYPES:
            raise UserError(
                f"rope type {rope_type!r} is not supported; supported: {', '.join(ROPE_TYPES)}"
            )
        theta = float(given.pop("rope_theta", cls.rope_theta))
        if given.pop("partial_rotary_factor", 1.0) != 1.0:
            raise UserError("rope: partial_rotary_factor other than 1 is not supported")
        if missing := sorted(_REQUIRED.get(rope_type, frozenset()) - given.keys()):
            raise UserError(f"rope type {rope_type!r}: missing settings {', '.join(missing)}")
        # A default rope may carry `original_max_position_embeddings` and the like; it reads none.
        known = ROPE_TYPES[rope_type]
        if unknown := sorted(given.keys() - known) if known else []:
            raise UserError(
                f"rope type {rope_type!r}: unknown settings {', '.join(unknown)}; "
                f"known: {', '.join(sorted(known))}"
            )
        return cls(rope_type, theta, tuple(sorted((k, v) for k, v in given.items() if k in known)))

    def to_parameters(self) -> dict[str, Any]:
        """The inverse of `from_parameters`."""
        return {"rope_type": self.rope_type, "rope_theta": self.rope_theta, **dict(self.settings)}


def _inverse_frequencies(theta: float, dim: int) -> np.ndarray:
    # float32 throughout, as transformers does: at position 8,192 the last bit matters.
    return (1.0 / np.float32(theta) ** (np.arange(0, dim, 2, dtype=np.float32) / dim)).astype(
        np.float32
    )


def _llama3(inverse: np.ndarray, s: Mapping[str, Any]) -> np.ndarray:
    context = s["original_max_position_embeddings"]
    low, high = s["low_freq_factor"], s["high_freq_factor"]
    wavelength = 2 * math.pi / inverse
    smooth = np.clip((context / wavelength - low) / (high - low), 0, 1)
    return (1 - smooth) * inverse / s["factor"] + smooth * inverse


def _yarn(theta: float, dim: int, s: Mapping[str, Any]) -> tuple[np.ndarray, float]:
    context, factor = s["original_max_position_embeddings"], s["factor"]

    def correction(rotations: float) -> float:
        return dim * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = correction(s.get("beta_fast", 32)), correction(s.get("beta_slow", 1))
    if s.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / max(high - low, 0.001), 0, 1)
    inverse = _inverse_frequencies(theta, dim)

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    scaling = s.get("attention_factor")
    if scaling is None:
        both = s.get("mscale") and s.get("mscale_all_dim")
        scaling = mscale(s["mscale"]) / mscale(s["mscale_all_dim"]) if both else mscale(1.0)
    return inverse / factor * ramp + inverse * (1 - ramp), float(scaling)


def rotary_tables(
    rope: RopeConfig | None, positions: Int[Array, "B T"], head_dim: int, max_positions: int
) -> tuple[Float[Array, "B T half"], Float[Array, "B T half"]]:
    """Cosines and sines (float32) of every position's angles.

    `dynamic` stretches the base once the largest position of this call passes
    `max_positions`, as transformers does; the other types ignore `max_positions`.

    Args:
      rope: The frequencies and their scaling; without one, nothing is rotated.
      positions: Position of each token in its conversation.
      head_dim: Size of one head; half as many angles a position.
      max_positions: The model's `max_position_embeddings`.

    Returns:
      `(cos, sin)`, each scaled by the type's attention factor.

    Example:
      >>> cos, sin = rotary_tables(RopeConfig(), jnp.array([[0, 1]]), 4, 16)
      >>> cos.shape, cos[0, 0].tolist()
      ((1, 2, 2), [1.0, 1.0])
    """
    if rope is None:
        still = jnp.zeros((*positions.shape, head_dim // 2), jnp.float32)
        return still + 1, still
    s, scaling = dict(rope.settings), 1.0
    plain = _inverse_frequencies(rope.rope_theta, head_dim)
    inverse: np.ndarray | jax.Array = plain
    match rope.rope_type:
        case "linear":
            inverse = plain / s["factor"]
        case "llama3":
            inverse = _llama3(plain, s)
        case "yarn":
            inverse, scaling = _yarn(rope.rope_theta, head_dim, s)
        case "dynamic":
            longest = jnp.maximum(positions.max() + 1, max_positions).astype(jnp.float32)
            stretch = s["factor"] * longest / max_positions - (s["factor"] - 1)
            theta = rope.rope_theta * stretch ** (head_dim / (head_dim - 2))
            inverse = 1.0 / theta ** (jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = (
        positions[..., None].astype(jnp.float32) * jnp.asarray(inverse, jnp.float32)[None, None]
    )
    return jnp.cos(angles) * scaling, jnp.sin(angles) * scaling


def apply_rotary(
    x: Float[Array, "B T H half*2"],
    tables: tuple[Float[Array, "B T half"], Float[Array, "B T half"]],
) -> Float[Array, "B T H half*2"]:
    """Rotates the two halves of each head against each other, in float32.

    Example:
      >>> x = jnp.ones((1, 2, 1, 4))
      >>> tables = rotary_tables(RopeConfig(), jnp.array([[0, 1]]), 4, 16)
      >>> apply_rotary(x, tables)[0, 0, 0].tolist()
      [1.0, 1.0, 1.0, 1.0]
    """
    cos, sin = (table[:, :, None, :] for table in tables)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
