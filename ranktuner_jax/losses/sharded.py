"""The fused loss over a device mesh: batch axes, FSDP and a split vocabulary."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

import jax
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from ranktuner_jax.losses.fused import local_token_stats, local_weighted_nll
from ranktuner_jax.losses.inputs import Operands, TokenInputs
from ranktuner_jax.losses.methods import SFT
from ranktuner_jax.losses.plan import FusedOptions
from ranktuner_jax.losses.ranktuner import RankTuner
from ranktuner_jax.losses.stats import TokenStats, check_fields
from ranktuner_jax.losses.sums import LossOutput
from ranktuner_jax.losses.varying import mark_varying
from ranktuner_jax.losses.weighting import Weighting

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int

__all__ = ["sharded_token_stats", "sharded_weighted_nll"]


def sharded_weighted_nll(
    mesh: Mesh,
    *,
    batch_axes: str | tuple[str, ...],
    vocab_axis: str | None = None,
    unembed_spec: PartitionSpec | None = None,
    weighting: Weighting = RankTuner(),  # noqa: B008 (frozen)
    chunk_size: int | None = None,
    logit_cap: float | None = None,
    vocab_size: int | None = None,
) -> Callable[..., LossOutput]:
    """A `fused_weighted_nll` over a mesh, whose sums are those of the global batch.

    Each device computes its own supervised tokens. Over `batch_axes` only the sums and
    the gradient of the unembedding are communicated. With a `vocab_axis` each device
    projects onto its rows of the vocabulary and communicates the maximum, the label's
    logit and the sums behind normaliser, entropy and rank: tokens × a constant,
    whatever V is. Axes of the mesh that are named in `unembed_spec` but are
    not the `vocab_axis` (FSDP) are gathered before the loop, and their gradient is
    scattered back after it.

    The result can be differentiated from outside (`jax.grad` of the `total` or the
    `mean()`): gradients come out summed over devices, in the sharding of the inputs.

    Args:
      mesh: The device mesh.
      batch_axes: Mesh axis or axes over which the leading axis of hidden, labels and
        mask is split.
      vocab_axis: Mesh axis over which the rows of `unembed` are split; None: not split.
      unembed_spec: How `unembed` [V, D] is sharded over the mesh. None: its rows over
        `vocab_axis` only.
      weighting: The method.
      chunk_size: As in `fused_weighted_nll`, tokens of one device.
      logit_cap: As in `fused_weighted_nll`.
      vocab_size: The number of real vocabulary entries; rows of the global `unembed`
        beyond it are padding.

    Returns:
      `f(hidden, unembed, labels, mask=None, *, token_weights=None, sequence_ids=None,
      ramp=1.0) -> LossOutput` on global arrays, to be called under `jit`. Sequences
      of different devices may have the same id.

    Raises:
      ValueError: If an axis is not in the mesh, `unembed_spec` does not split the
        rows over `vocab_axis` first, or the chunk size or cap is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> auto = (jax.sharding.AxisType.Auto,) * 2
      >>> mesh = jax.make_mesh((1, 1), ("data", "tensor"), axis_types=auto)
      >>> loss = sharded_weighted_nll(mesh, batch_axes="data", vocab_axis="tensor")
      >>> output = jax.jit(loss)(jnp.eye(3, 4), jnp.eye(5, 4), jnp.array([0, 1, 3]))
      >>> round(float(output.mean()), 3)
      0.371
    """
    axes = _Axes.of(mesh, batch_axes, vocab_axis, unembed_spec)
    options = FusedOptions(
        weighting, chunk_size, logit_cap, vocab_size, axes.batch or None, axes.vocab
    )

    def local(
        hidden: Float[Array, "b ... D"],
        unembed: Float[Array, "v d"],
        ramp: float | Float[Array, ""],
        tokens: TokenInputs,
    ) -> LossOutput:
        operands = axes.operands(hidden, unembed)
        return local_weighted_nll(options, operands, tokens, ramp).psum(axes.batch)

    mapped = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(axes.per_token, axes.unembed_spec, PartitionSpec(), axes.per_token),
        out_specs=PartitionSpec(),
    )

    def loss(
        hidden: Float[Array, "B ... D"],
        unembed: Float[Array, "V D"],
        labels: Int[Array, "B ..."],
        mask: Bool[Array, "B ..."] | None = None,
        *,
        token_weights: Float[Array, "B ..."] | None = None,
        sequence_ids: Int[Array, "B ..."] | None = None,
        ramp: float | Float[Array, ""] = 1.0,
    ) -> LossOutput:
        tokens = TokenInputs.of("hidden", hidden, labels, mask, token_weights, sequence_ids)
        return mapped(hidden, unembed, ramp, tokens)

    return loss


def sharded_token_stats(
    mesh: Mesh,
    *,
    batch_axes: str | tuple[str, ...],
    vocab_axis: str | None = None,
    unembed_spec: PartitionSpec | None = None,
    fields: Collection[str] = (),
    chunk_size: int | None = None,
    logit_cap: float | None = None,
    vocab_size: int | None = None,
) -> Callable[..., TokenStats]:
    """A `fused_token_stats` over a mesh.

    Each device computes its own supervised tokens; what is communicated is as in
    `sharded_weighted_nll`, like the arguments. Carries no gradient.

    Args:
      mesh: The device mesh.
      batch_axes: Mesh axis or axes over which the leading axis of hidden, labels and
        mask is split.
      vocab_axis: Mesh axis over which the rows of `unembed` are split.
      unembed_spec: How `unembed` [V, D] is sharded over the mesh.
      fields: Optional statistics, of `expected_rank`, `topk_entropy`, `collision`.
      chunk_size: Tokens of one device whose logits are held at a time.
      logit_cap: Soft cap of the logits.
      vocab_size: The number of real vocabulary entries.

    Returns:
      `f(hidden, unembed, labels, mask=None) -> TokenStats` on global arrays, to be
      called under `jit`. The statistics are split over `batch_axes` like the labels,
      and 0 where the mask is false.

    Raises:
      ValueError: As `sharded_weighted_nll`, or if a field is unknown.

    Example:
      >>> import jax.numpy as jnp
      >>> auto = (jax.sharding.AxisType.Auto,) * 2
      >>> mesh = jax.make_mesh((1, 1), ("data", "tensor"), axis_types=auto)
      >>> stats = sharded_token_stats(mesh, batch_axes="data", vocab_axis="tensor")
      >>> jax.jit(stats)(jnp.eye(2, 4), jnp.eye(5, 4), jnp.array([0, 3])).rank.tolist()
      [1, 5]
    """
    check_fields(fields)
    axes = _Axes.of(mesh, batch_axes, vocab_axis, unembed_spec)
    options = FusedOptions(SFT(), chunk_size, logit_cap, vocab_size, None, axes.vocab)

    def local(
        hidden: Float[Array, "b ... D"], unembed: Float[Array, "v d"], tokens: TokenInputs
    ) -> TokenStats:
        return local_token_stats(options, axes.operands(hidden, unembed), tokens, fields)

    mapped = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(axes.per_token, axes.unembed_spec, axes.per_token),
        out_specs=axes.per_token,
    )

    def stats(
        hidden: Float[Array, "B ... D"],
        unembed: Float[Array, "V D"],
        labels: Int[Array, "B ..."],
        mask: Bool[Array, "B ..."] | None = None,
    ) -> TokenStats:
        return mapped(hidden, unembed, TokenInputs.of("hidden", hidden, labels, mask))

    return stats


@dataclasses.dataclass(frozen=True)
class _Axes:
    """The axes of the mesh that really divide something.

    Attributes:
      batch: Axes over which the tokens are split.
      vocab: The axis over which the vocabulary is split; None: not split.
      unembed_spec: How the unembedding is sharded.
    """

    batch: tuple[str, ...]
    vocab: str | None
    unembed_spec: PartitionSpec

    @classmethod
    def of(
        cls,
        mesh: Mesh,
        batch_axes: str | tuple[str, ...],
        vocab_axis: str | None,
        unembed_spec: PartitionSpec | None,
    ) -> _Axes:
        """Checks the axes; collectives over an axis of one device would still copy their inputs."""
        batch_axes = (batch_axes,) if isinstance(batch_axes, str) else tuple(batch_axes)
        if unembed_spec is None:
            unembed_spec = PartitionSpec(vocab_axis)
        _check_axes(mesh, batch_axes, vocab_axis, unembed_spec)
        split = {axis for axis in mesh.axis_names if mesh.shape[axis] > 1}
        return cls(
            tuple(axis for axis in batch_axes if axis in split),
            vocab_axis if vocab_axis in split else None,
            PartitionSpec(
                *(tuple(axis for axis in _names(entry) if axis in split) for entry in unembed_spec)
            ),
        )

    @property
    def per_token(self) -> PartitionSpec:
        """How arrays with one entry per token are sharded."""
        return PartitionSpec(self.batch)

    def operands(self, hidden: Float[Array, "b ... D"], unembed: Float[Array, "v d"]) -> Operands:
        """What a device computes logits from: its rows of the vocabulary are gathered."""
        # Marked before the gather, its gradient is scattered before it is summed over
        # the remaining batch axes: the sum then moves one shard, not the whole.
        unembed = mark_varying(unembed, self.batch)
        return Operands.of(hidden, _gather_rows(unembed, self.unembed_spec, self.vocab), None)


def _gather_rows(
    unembed: Float[Array, "v d"], spec: PartitionSpec, vocab_axis: str | None
) -> Float[Array, "V D"]:
    """The rows of this device's part of the vocabulary, gathered over all other axes."""
    for dimension, names in enumerate(spec):
        for name in reversed(_names(names)):
            if name != vocab_axis:
                unembed = lax.all_gather(unembed, name, axis=dimension, tiled=True)
    return unembed


def _names(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def _check_axes(
    mesh: Mesh,
    batch_axes: tuple[str, ...],
    vocab_axis: str | None,
    unembed_spec: PartitionSpec,
) -> None:
    spec_axes = [name for entry in unembed_spec for name in _names(entry)]
    used = {*batch_axes, *spec_axes, *_names(vocab_axis)}
    if missing := used - set(mesh.axis_names):
        raise ValueError(
            f"axes must be among those of the mesh {mesh.axis_names}: got {sorted(missing)}."
        )
    if vocab_axis in batch_axes:
        raise ValueError(
            f"vocab_axis must not be a batch axis, since its devices share the tokens: "
            f"got vocab_axis {vocab_axis!r}, batch_axes {batch_axes}."
        )
    rows = _names(unembed_spec[0]) if len(unembed_spec) else ()
    if vocab_axis is not None and rows[:1] != (vocab_axis,):
        raise ValueError(
            f"unembed_spec must split the rows over vocab_axis {vocab_axis!r} first: "
            f"got {unembed_spec}."
        )
    if stray := set(spec_axes) - set(batch_axes) - {vocab_axis}:
        raise ValueError(
            f"unembed_spec may name vocab_axis and batch axes only: got {sorted(stray)}."
        )
