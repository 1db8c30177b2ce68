"""The arrays that a loss is computed from, with their checks."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from ranktuner_jax.losses.stats import check_inputs
from ranktuner_jax.losses.varying import mark_varying, varying_axes

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenInputs:
    """The arrays with one entry per position, all of the same shape.

    Attributes:
      labels: Target ids, already shifted.
      mask: True where a position is supervised.
      token_weights: Static factor of each token's weight; None is 1.
      sequence_ids: Which conversation a token belongs to; None: the last axis is one.
    """

    labels: Int[Array, "..."]
    mask: Bool[Array, "..."]
    token_weights: Float[Array, "..."] | None
    sequence_ids: Int[Array, "..."] | None

    @classmethod
    def of(
        cls,
        name: str,
        inputs: Float[Array, "... X"],
        labels: Int[Array, "..."],
        mask: Bool[Array, "..."] | None,
        token_weights: Float[Array, "..."] | None = None,
        sequence_ids: Int[Array, "..."] | None = None,
    ) -> TokenInputs:
        """The arrays, checked against `inputs` (logits or hidden states; errors say `name`).

        Raises TypeError or ValueError if a dtype or shape does not fit. Without a mask
        every position is supervised.
        """
        check_inputs(name, inputs, labels)
        given = {"mask": mask, "token_weights": token_weights, "sequence_ids": sequence_ids}
        for key, value in given.items():
            if value is not None and value.shape != labels.shape:
                raise ValueError(
                    f"{key} must have the shape of labels: got {key} {value.shape}, "
                    f"labels {labels.shape}."
                )
        if mask is None:
            mask = jnp.ones(labels.shape, bool)
        elif jnp.issubdtype(mask.dtype, jnp.floating):
            raise TypeError(
                f"mask must be boolean or integer: got {mask.dtype}. Pass mask != 0, and "
                "fractional weights as token_weights."
            )
        return cls(labels, jnp.asarray(mask).astype(bool), token_weights, sequence_ids)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Operands:
    """What the logits are made of, hidden @ unembed.T + bias; or the gradient by each.

    As a gradient, None stands for what is not differentiated by.
    """

    hidden: Float[Array, "... D"]
    unembed: Float[Array, "V D"]
    bias: Float[Array, "V"] | None

    @classmethod
    def of(
        cls,
        hidden: Float[Array, "... D"],
        unembed: Float[Array, "V D"],
        bias: Float[Array, "V"] | None,
    ) -> Operands:
        """Checks that the shapes fit together; raises ValueError if they do not."""
        if unembed.ndim != 2 or unembed.shape[1] != hidden.shape[-1]:
            raise ValueError(
                f"unembed must be [V, D] with the D of hidden: got unembed {unembed.shape}, "
                f"hidden {hidden.shape}. Pass kernel.T of a Flax Dense."
            )
        if bias is not None and bias.shape != unembed.shape[:1]:
            raise ValueError(f"bias must be [V]: got bias {bias.shape}, unembed {unembed.shape}.")
        return cls(hidden, unembed, bias)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossInputs:
    """All arrays of a fused loss, with its N positions along one axis.

    Attributes:
      operands: What the loss is differentiated by.
      tokens: Per position; without sequence ids, which `batch_stat` stands for.
      batch_stat: The batch statistic of the weighting, if it uses one.
      ramp: From 0 (plain nll) to 1 (the method).
    """

    operands: Operands
    tokens: TokenInputs
    batch_stat: Float[Array, ""] | None
    ramp: Float[Array, ""]

    @classmethod
    def of(
        cls,
        operands: Operands,
        tokens: TokenInputs,
        batch_stat: Float[Array, ""] | None,
        ramp: float | Float[Array, ""],
        vocab_axis: str | None,
    ) -> LossInputs:
        """Flattens the positions, and marks all inputs as varying over the same shard_map axes.

        The transpose of that mark sums the gradient over the axes where an input was
        replicated. The vocabulary axis is marked on the operands only: the inputs of a
        token are equal on all devices that share the vocabulary, and so is the loss.
        """
        hidden, weights = operands.hidden, tokens.token_weights
        operands = dataclasses.replace(operands, hidden=hidden.reshape(-1, hidden.shape[-1]))
        tokens = TokenInputs(
            tokens.labels.ravel().astype(jnp.int32),
            tokens.mask.ravel(),
            None if weights is None else weights.ravel(),
            None,
        )
        rest = (tokens, batch_stat, jnp.asarray(ramp, jnp.float32))
        axes = varying_axes((operands, rest))
        return cls(mark_varying(operands, axes), *mark_varying(rest, axes - {vocab_axis}))


def check_vocab_size(vocab_size: int | None, rows: int) -> None:
    """Raises ValueError if there are fewer rows (or columns) than vocabulary entries."""
    if vocab_size is not None and not 0 < vocab_size <= rows:
        raise ValueError(
            f"vocab_size must be between 1 and the number of vocabulary entries given "
            f"({rows}): got {vocab_size}."
        )
