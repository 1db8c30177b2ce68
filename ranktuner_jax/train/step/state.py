"""The train state: Flax's TrainState over the parameters of an NNX model, born sharded."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from flax.training import train_state
from jax.sharding import Mesh

from ranktuner_jax import models
from ranktuner_jax.train.config import OptimizerConfig

__all__ = ["init_state", "make_optimizer", "make_schedule"]


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The learning rate as a function of the step: a warm-up, then the chosen fall.

    Example:
      >>> schedule = make_schedule(OptimizerConfig(learning_rate=1.0, warmup_ratio=0.1), 100)
      >>> float(schedule(10)), round(float(schedule(100)), 6)
      (1.0, 0.0)
    """
    warmup = round(steps * config.warmup_ratio)
    peak, left = config.learning_rate, max(1, steps - warmup)
    fall = {
        "cosine": lambda: optax.cosine_decay_schedule(peak, left),
        "linear": lambda: optax.linear_schedule(peak, 0.0, left),
        "constant": lambda: optax.constant_schedule(peak),
    }[config.schedule]()
    if not warmup:
        return fall
    # The first update has a rate above zero: a step that changes nothing is a step lost.
    rise = optax.linear_schedule(peak / warmup, peak, max(1, warmup - 1))
    return optax.join_schedules([rise, fall], [warmup])


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """AdamW after clipping, with weight decay on matrices only.

    Example:
      >>> tx = make_optimizer(OptimizerConfig(), steps=10)
      >>> params = {"kernel": jnp.ones(2)}
      >>> updates, _ = tx.update(params, tx.init(params), params)
      >>> updates["kernel"].shape
      (2,)
    """

    def decayed(params: Any) -> Any:
        # By name: layers are stacked, so that the scales of their norms are matrices too.
        return jax.tree_util.tree_map_with_path(
            lambda path, _: not re.search("norm|bias", jax.tree_util.keystr(path)), params
        )

    adamw = optax.adamw(
        make_schedule(config, steps),
        b1=config.b1,
        b2=config.b2,
        weight_decay=config.weight_decay,
        mask=decayed,
    )
    if not config.clip_norm:
        return adamw
    return optax.chain(_clip_by_global_norm(config.clip_norm), adamw)


def _clip_by_global_norm(largest: float) -> optax.GradientTransformation:
    """As optax's, by one factor: a division and a choice by element are a pass over memory each."""

    def update(
        updates: optax.Updates, state: optax.EmptyState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.EmptyState]:
        factor = jnp.minimum(1.0, largest / optax.tree.norm(updates))
        return jax.tree.map(lambda grad: grad * factor.astype(grad.dtype), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def init_state(
    model: nnx.Module, tx: optax.GradientTransformation, mesh: Mesh
) -> train_state.TrainState:
    """Places a model's parameters on the mesh and makes the optimizer state where it will live.

    `state.apply_fn(params)` is the model again, with those parameters.

    Args:
      model: The model; its arrays are taken over, not copied where they lie right already.
      tx: The optimizer.
      mesh: The mesh.

    Returns:
      The state at step 0.
    """
    graphdef, params, *rest = nnx.split(model, nnx.Param, ...)

    def apply_fn(params: nnx.State) -> nnx.Module:
        return nnx.merge(graphdef, params, *rest)

    def create(params: nnx.State) -> train_state.TrainState:
        state = train_state.TrainState.create(apply_fn=apply_fn, params=params, tx=tx)
        return state.replace(step=jnp.zeros((), jnp.int32))

    params = jax.device_put(params, models.param_shardings(params, mesh))
    shardings = models.param_shardings(jax.eval_shape(create, params), mesh)
    return jax.jit(create, out_shardings=shardings, donate_argnums=0)(params)
