"""Checks of the arguments that all loss variants share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int


def resolve_mask(mask: Bool[Array, "..."] | None, labels: Int[Array, "..."]) -> Bool[Array, "..."]:
    """The mask as booleans; None supervises every position."""
    if mask is None:
        return jnp.ones(labels.shape, bool)
    if mask.shape != labels.shape:
        raise ValueError(
            f"mask must have the shape of labels: got mask {mask.shape}, labels {labels.shape}."
        )
    if jnp.issubdtype(mask.dtype, jnp.floating):
        raise TypeError(
            f"mask must be boolean or integer: got {mask.dtype}. Pass mask != 0, and "
            "fractional weights as token_weights."
        )
    return jnp.asarray(mask).astype(bool)


def check_options(
    labels: Int[Array, "..."],
    token_weights: Float[Array, "..."] | None,
    sequence_ids: Int[Array, "..."] | None,
    vocab_size: int | None,
    rows: int,
) -> None:
    """Raises ValueError if an option does not fit the labels or the vocabulary."""
    for name, value in (("token_weights", token_weights), ("sequence_ids", sequence_ids)):
        if value is not None and value.shape != labels.shape:
            raise ValueError(
                f"{name} must have the shape of labels: got {name} {value.shape}, "
                f"labels {labels.shape}."
            )
    if vocab_size is not None and not 0 < vocab_size <= rows:
        raise ValueError(
            f"vocab_size must be between 1 and the number of vocabulary entries given "
            f"({rows}): got {vocab_size}."
        )
