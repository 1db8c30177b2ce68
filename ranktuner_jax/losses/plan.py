"""The static side of the fused losses: options, and the plan that follows from the shapes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection

from jax import lax

from ranktuner_jax.losses.expected_rank import RANK_BYTES
from ranktuner_jax.losses.inputs import Operands, check_vocab_size
from ranktuner_jax.losses.projection import Projection
from ranktuner_jax.losses.weighting import Weighting

__all__ = ["FusedOptions", "Plan", "default_chunk_size"]

# Default bytes of the float32 logits of a chunk; see `default_chunk_size`.
_CHUNK_BYTES = 256 * 2**20


def default_chunk_size(
    num_tokens: int, features: int, vocab_size: int, *, fields: Collection[str] = ()
) -> int:
    """The number of tokens in a chunk, whose logits are held at a time.

    Each chunk reads and writes the float32 gradient of the unembedding once, 8·V·D
    bytes for 6·C·V·D operations, so small chunks are bound by memory. The logits may
    take 256 MiB, or half of what that gradient takes where this is more, and the bins
    in which `expected_rank` is counted may take half as much as the logits may. The
    number of tokens is rounded down to a power of two.

    Args:
      num_tokens: Positions in the batch, supervised or not.
      features: Width D of the hidden states.
      vocab_size: Rows of the unembedding on this device.
      fields: Optional statistics that are computed, as named in a weighting's `requires`.

    Example:
      >>> default_chunk_size(2048, 576, 49152), default_chunk_size(8192, 4096, 151936)
      (1024, 2048)
      >>> default_chunk_size(16384, 64, 256, fields=("expected_rank",))
      1024
    """
    bound = max(_CHUNK_BYTES, 2 * vocab_size * features)
    tokens = max(bound // (4 * vocab_size), 1)
    if "expected_rank" in fields:
        tokens = min(tokens, bound // 2 // RANK_BYTES)
    return max(1, min(num_tokens, 2 ** int(math.log2(tokens))))


@dataclasses.dataclass(frozen=True)
class FusedOptions:
    """The static options of a fused loss: those of `fused_weighted_nll`, and `vocab_axis`.

    The latter is the shard_map axis over which the rows of the unembedding are split;
    `vocab_size` counts the rows of all its devices.
    """

    weighting: Weighting
    chunk_size: int | None
    logit_cap: float | None
    vocab_size: int | None
    axis_name: str | tuple[str, ...] | None = None
    vocab_axis: str | None = None

    def __post_init__(self) -> None:
        if self.chunk_size is not None and self.chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, or None: got {self.chunk_size}.")
        if self.logit_cap is not None and not self.logit_cap > 0:
            raise ValueError(f"logit_cap must be positive, or None: got {self.logit_cap}.")


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static part of a call: hashable, so that jit traces once.

    Attributes:
      projection: How hidden states become logits.
      chunk_sizes: Tokens in a chunk of the main loop, and of the loop over the remainder.
      weighting: The method.
      fields: Optional statistics to compute.
    """

    projection: Projection
    chunk_sizes: tuple[int, ...]
    weighting: Weighting
    fields: frozenset[str]

    @classmethod
    def of(
        cls, options: FusedOptions, operands: Operands, num_tokens: int, fields: Collection[str]
    ) -> Plan:
        """The plan for operands of these shapes; raises ValueError if vocab_size does not fit."""
        rows, features = operands.unembed.shape
        axis = options.vocab_axis
        all_rows = rows if axis is None else rows * lax.axis_size(axis)
        check_vocab_size(options.vocab_size, all_rows)
        chunk_size = options.chunk_size
        if chunk_size is None:
            chunk_size = default_chunk_size(num_tokens, features, rows, fields=fields)
        chunk = min(chunk_size, num_tokens) or 1
        return cls(
            Projection(rows, options.vocab_size or all_rows, options.logit_cap, axis),
            (chunk, chunk // 4) if chunk >= 64 else (chunk,),
            options.weighting,
            frozenset(fields),
        )
