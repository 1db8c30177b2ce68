"""One optimizer step: gradients over micro-batches, summed apart from their count, applied once."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax
from flax.training.train_state import TrainState
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ranktuner_jax import losses, models
from ranktuner_jax.train.config import TrainConfig
from ranktuner_jax.train.sharding import BATCH_AXES
from ranktuner_jax.train.state import make_schedule

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int

__all__ = ["make_train_step", "sequence_ids"]

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


def make_train_step(
    config: TrainConfig, steps: int, mesh: Mesh, state: TrainState
) -> jax.stages.Wrapped:
    """Builds the jitted step `(state, batch) -> (state, metrics)`; the state is donated.

    The loss is a sum and a count. Both are added over micro-batches (`place_batch`), and the
    gradient of the sum is divided by the whole count once, so that how a batch is cut changes
    nothing but rounding. A step whose loss or gradient is not finite returns the state that it
    was given, with `metrics["nonfinite"] == 1`; a third argument, `hold`, keeps the state in any
    case.

    Args:
      config: The run.
      steps: The optimizer steps of the whole run, for the learning rate that is logged.
      mesh: The mesh on which the state lies.
      state: The state, for its shardings.

    Returns:
      The step.
    """
    weighting = config.loss.make_weighting()
    schedule = make_schedule(config.optimizer, steps)
    ramp_steps = config.loss.ramp_steps

    def loss_fn(
        params: Any, batch: Batch, state: TrainState
    ) -> tuple[Float[Array, ""], losses.LossOutput]:
        model = state.apply_fn(params)
        hidden = model(batch["tokens"], batch["positions"], batch["segment_ids"])
        unembed_spec = models.param_shardings({"head": model.unembed}, mesh)["head"].spec
        loss = losses.sharded_weighted_nll(
            mesh,
            batch_axes=BATCH_AXES,
            vocab_axis=unembed_spec[0],
            unembed_spec=unembed_spec,
            weighting=weighting,
            chunk_size=config.loss.chunk_size or None,
            vocab_size=model.vocab_size,
        )
        output = loss(
            hidden,
            model.unembed,
            batch["labels"],
            batch["mask"],
            token_weights=batch["token_weights"],
            sequence_ids=sequence_ids(batch["segment_ids"]),
            ramp=jnp.minimum(1.0, (state.step + 1) / ramp_steps) if ramp_steps else 1.0,
        )
        return output.total, output

    def gradients(state: TrainState, batch: Batch) -> tuple[Any, losses.LossOutput]:
        (_, output), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, batch, state)
        return grads, output

    def accumulate(state: TrainState, batch: Batch) -> tuple[Any, losses.LossOutput]:
        first = jax.tree.map(lambda array: array[0], batch)
        if config.train.accumulation == 1:
            return gradients(state, first)

        def add(sums: Any, micro: Batch) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, sums, gradients(state, micro)), None

        # In float32, whatever the parameters are: a sum of many rounds more than each of them.
        zeros = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32)),
            jax.eval_shape(gradients, state, first),
        )
        return jax.lax.scan(add, zeros, batch)[0]

    def train_step(
        state: TrainState, batch: Batch, hold: Bool[Array, ""] | bool = False
    ) -> tuple[TrainState, Metrics]:
        grads, output = accumulate(state, batch)
        loss = output.mean(config.loss.normalize)
        # The factor between the sum and the mean, 0 where nothing is supervised.
        scale = dataclasses.replace(output, total=jnp.ones_like(output.total)).mean(
            config.loss.normalize
        )
        grad_norm = scale * optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        taken = finite & jnp.logical_not(hold)
        scaled = jax.tree.map(
            lambda grad, param: (grad * scale).astype(param.dtype), grads, state.params
        )
        # A branch, not a choice element by element: the state is then updated where it lies. The
        # scaling is not in it: out here it takes the place of the gradient.
        new_state = jax.lax.cond(
            taken,
            lambda state, grads: state.apply_gradients(grads=grads),
            lambda state, _: state,
            state,
            scaled,
        )
        real = batch["segment_ids"] > 0
        return new_state, losses.summarize(output) | {
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": schedule(state.step),
            "supervised_tokens": output.denom,
            "tokens": jnp.sum(real),
            "seen": jnp.sum(jnp.where(real, batch["positions"] + 1, 0).astype(jnp.float32)),
            "nonfinite": jnp.logical_not(finite),
        }

    return jax.jit(
        train_step,
        donate_argnums=0,
        out_shardings=(models.param_shardings(state, mesh), NamedSharding(mesh, PartitionSpec())),
    )


def sequence_ids(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Numbers the conversations of a batch, below B·T; padding goes to any of its row.

    Example:
      >>> sequence_ids(jnp.array([[1, 1, 2], [1, 2, 0]]))
      Array([[0, 0, 1],
             [3, 4, 3]], dtype=int32)
    """
    rows, length = segment_ids.shape
    first = length * jnp.arange(rows, dtype=segment_ids.dtype)[:, None]
    return jnp.maximum(segment_ids - 1, 0) + first
