"""One optimizer step: sums of gradients and counts over micro-batches, divided once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ranktuner_jax import losses, models
from ranktuner_jax.data import Batch
from ranktuner_jax.train.runtime.mesh import BATCH_AXES
from ranktuner_jax.train.step.state import TrainState

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int

__all__ = ["make_train_step", "sequence_ids"]

Metrics = dict[str, jax.Array]


def make_train_step(
    state: TrainState,
    mesh: Mesh,
    *,
    weighting: losses.Weighting,
    normalize: Literal["tokens", "weights"] = "tokens",
    ramp_steps: int = 0,
    chunk_size: int | None = None,
    clip_norm: float = 0.0,
    schedule: optax.Schedule | None = None,
    make_loss: Callable[..., Callable[..., losses.LossOutput]] = losses.sharded_weighted_nll,
) -> jax.stages.Wrapped:
    """Builds the jitted step `(state, batch, hold=False) -> (state, metrics)`.

    The state is donated. The loss is a sum and a count. Both are added over micro-batches, and the
    gradient of the sum is divided once by the total count, so that the split into micro-batches
    affects only rounding. A step with a non-finite loss or gradient returns the state unchanged,
    with `metrics["nonfinite"]` true; a step with `hold` returns it unchanged too.

    Args:
      state: The state, for its shardings.
      mesh: The mesh that the state is on.
      weighting: How tokens are weighted.
      normalize: "tokens" or "weights", see `losses.LossOutput.mean`.
      ramp_steps: Steps over which the weights ramp from 1 to their full values; 0 for no ramp.
      chunk_size: Tokens per chunk of logits; None lets the loss choose.
      clip_norm: Maximum global gradient norm; 0 disables clipping.
      schedule: Learning rate by optimizer step, for `metrics["learning_rate"]`.
      make_loss: Builds the loss on the mesh, with the signature of `losses.sharded_weighted_nll`.

    Returns:
      The step; it takes batches from `place_batch`, `[micro-batches, rows, T]`.
    """

    def loss_fn(
        params: Any, batch: Batch, state: TrainState
    ) -> tuple[Float[Array, ""], losses.LossOutput]:
        model = state.model(params)
        dropout = models.dropout_keys(model, state.step, batch.row_index)
        hidden = model(batch.tokens, batch.positions, batch.segment_ids, dropout=dropout)
        loss = make_loss(
            mesh,
            batch_axes=BATCH_AXES,
            vocab_axis=model.unembed_spec[0],
            unembed_spec=model.unembed_spec,
            weighting=weighting,
            chunk_size=chunk_size,
            vocab_size=model.vocab_size,
        )
        output = loss(
            *model.unembedding(hidden, dropout),
            batch.labels,
            batch.mask,
            token_weights=batch.token_weights,
            sequence_ids=sequence_ids(batch.segment_ids),
            ramp=jnp.minimum(1.0, (state.step + 1) / ramp_steps) if ramp_steps else 1.0,
        )
        return output.total, output

    def gradients(state: TrainState, batch: Batch) -> tuple[Any, losses.LossOutput]:
        (_, output), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, batch, state)
        return grads, output

    def accumulate(state: TrainState, batch: Batch) -> tuple[Any, losses.LossOutput]:
        first = jax.tree.map(lambda array: array[0], batch)
        if batch.tokens.shape[0] == 1:
            return gradients(state, first)

        def add(sums: Any, micro: Batch) -> tuple[Any, None]:
            # Otherwise XLA:TPU moves the sum over devices out of the loop, which then carries whole
            # gradients instead of each device's share.
            new = jax.lax.optimization_barrier(gradients(state, micro))
            sums = jax.tree.map(jnp.add, sums, new)
            return jax.lax.with_sharding_constraint(sums, models.param_shardings(sums, mesh)), None

        # In float32 at least: sums of many micro-batches accumulate rounding errors.
        zeros = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32)),
            jax.eval_shape(gradients, state, first),
        )
        return jax.lax.scan(add, zeros, batch)[0]

    def train_step(
        state: TrainState, batch: Batch, hold: Bool[Array, ""] | bool = False
    ) -> tuple[TrainState, Metrics]:
        grads, output = accumulate(state, batch)
        loss = output.mean(normalize)
        # The factor from the sum to the mean, 0 if nothing is supervised.
        scale = dataclasses.replace(output, total=jnp.ones_like(output.total)).mean(normalize)
        grad_norm = scale * optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        if clip_norm:
            scale = scale * jnp.minimum(1.0, clip_norm / grad_norm)
        scaled = jax.tree.map(
            lambda grad, param: (grad * scale).astype(param.dtype), grads, state.params
        )
        # A branch, not an elementwise select, so that the state is updated in place. The gradients
        # are scaled outside of it, so that they are scaled in place too.
        new_state = jax.lax.cond(
            finite & jnp.logical_not(hold),
            lambda state, grads: state.apply_gradients(grads=grads),
            lambda state, _: state,
            state.replace(base=None),  # It never changes, and needs no branch.
            scaled,
        ).replace(base=state.base)
        real = batch.segment_ids > 0
        metrics = losses.summarize(output) | {
            "loss": loss,
            "grad_norm": grad_norm,
            "supervised_tokens": output.denom,
            "tokens": jnp.sum(real),
            "seen": jnp.sum(jnp.where(real, batch.positions + 1, 0).astype(jnp.float32)),
            "nonfinite": jnp.logical_not(finite),
        }
        if schedule is not None:
            metrics["learning_rate"] = schedule(state.step)
        return new_state, metrics

    # XLA:TPU would otherwise compute products with gathered parameters part by part, and write and
    # read their float32 sum once a part: half of the time of a 7B model's step.
    options = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": 10**6}
    return jax.jit(
        train_step,
        donate_argnums=0,
        compiler_options=options if mesh.devices.flat[0].platform == "tpu" else None,
        out_shardings=(models.param_shardings(state, mesh), NamedSharding(mesh, PartitionSpec())),
    )


def sequence_ids(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Unique ids, below B·T, of the conversations of a batch; padding shares an id of its row.

    Example:
      >>> sequence_ids(jnp.array([[1, 1, 2], [1, 2, 0]]))
      Array([[0, 0, 1],
             [3, 4, 3]], dtype=int32)
    """
    rows, length = segment_ids.shape
    first = length * jnp.arange(rows, dtype=segment_ids.dtype)[:, None]
    return jnp.maximum(segment_ids - 1, 0) + first
