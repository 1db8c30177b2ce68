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

__all__ = ["BACKENDS", "FusedOptions", "Plan", "default_chunk_size"]

# The backends of XLA that the loop over chunks has a form for.
BACKENDS = ("cpu", "tpu", "gpu")

# The chunks of `default_chunk_size`: bytes of logits that any may have, and tokens of one on
# accelerators, where there are few in all and where there are many.
_LOGIT_BYTES = 256 * 2**20
_FEW_TOKENS, _FEW_CHUNK, _CHUNK = 8192, 1024, 2048


def default_chunk_size(
    num_tokens: int,
    features: int,
    vocab_size: int,
    *,
    fields: Collection[str] = (),
    backend: str = "cpu",
) -> int:
    """The number of tokens in a chunk, whose logits are held at a time.

    Each chunk reads and writes the float32 gradient of the unembedding once, 8·V·D
    bytes for 6·C·V·D operations, so small chunks are bound by memory. A chunk has as many
    tokens as 256 MiB of float32 logits hold, or more: on CPUs D/2, whose logits take half
    of what that gradient does; on accelerators, which do some hundred operations in the
    time of a byte, 2048, or 1024 in batches of fewer than 8192. The bins in which
    `expected_rank` is counted may take 128 MiB, or a quarter of what that gradient does.
    The number of tokens is rounded down to a power of two.

    Args:
      num_tokens: Positions in the batch, supervised or not.
      features: Width D of the hidden states.
      vocab_size: Rows of the unembedding on this device.
      fields: Optional statistics that are computed, as named in a weighting's `requires`.
      backend: The backend of XLA: "cpu", "tpu" or "gpu".

    Example:
      >>> default_chunk_size(2048, 576, 49152), default_chunk_size(8192, 4096, 151936)
      (1024, 2048)
      >>> default_chunk_size(16384, 64, 256, fields=("expected_rank",))
      1024
      >>> default_chunk_size(8192, 1024, 151936)
      512
      >>> default_chunk_size(8192, 1024, 151936, backend="tpu")
      2048
    """
    if backend == "cpu":
        tokens = features // 2
    else:
        tokens = _FEW_CHUNK if num_tokens < _FEW_TOKENS else _CHUNK
    tokens = max(tokens, _LOGIT_BYTES // (4 * vocab_size), 1)
    if "expected_rank" in fields:
        bins = max(_LOGIT_BYTES // 2, vocab_size * features)
        tokens = min(tokens, bins // RANK_BYTES)
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
      num_tokens: Positions in the batch, supervised or not.
      features: Width D of the hidden states.
      chunk_size: Tokens in a chunk of the main loop; None chooses by the backend.
      weighting: The method.
      fields: Optional statistics to compute.
    """

    projection: Projection
    num_tokens: int
    features: int
    chunk_size: int | None
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
        return cls(
            Projection(rows, options.vocab_size or all_rows, options.logit_cap, axis),
            num_tokens,
            features,
            options.chunk_size,
            options.weighting,
            frozenset(fields),
        )

    def on(self, backend: str) -> Plan:
        """The plan for a backend of XLA: "cpu", "tpu" or "gpu"."""
        projection = dataclasses.replace(self.projection, backend=backend)
        return dataclasses.replace(self, projection=projection)

    @property
    def chunk_sizes(self) -> tuple[int, ...]:
        """Tokens in a chunk of the main loop, and of the loop over the remainder."""
        chunk_size = self.chunk_size or default_chunk_size(
            self.num_tokens,
            self.features,
            self.projection.rows,
            fields=self.fields,
            backend=self.projection.backend,
        )
        chunk = min(chunk_size, self.num_tokens) or 1
        return (chunk, chunk // 4) if chunk >= 64 else (chunk,)

    @property
    def slots(self) -> int:
        """Tokens of as many whole chunks as there may be, and of one more, on any backend."""
        chunks = {self.on(backend).chunk_sizes[0] for backend in BACKENDS}
        return max(math.ceil(self.num_tokens / chunk + 1) * chunk for chunk in chunks)
