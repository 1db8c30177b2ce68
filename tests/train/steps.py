"""The step of a config, as a run makes it."""

from __future__ import annotations

import jax
from jax.sharding import Mesh

from ranktuner_jax.train import Run, TrainConfig, TrainState, make_train_step


def make_step(config: TrainConfig, steps: int, mesh: Mesh, state: TrainState) -> jax.stages.Wrapped:
    """The step of a run of so many steps."""
    run = Run.open(config)
    run.steps = steps
    return make_train_step(state, mesh, **run.step_options)
