"""Learning-rate schedules: a warmup, then the chosen decay."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import optax

if TYPE_CHECKING:
    from ranktuner_jax.train.config import OptimizerConfig

__all__ = ["SCHEDULES", "make_schedule"]

# Name -> the schedule after the warmup, from the peak, the remaining steps and the decay steps.
SCHEDULES: dict[str, Callable[[float, int, int], optax.Schedule]] = {
    "cosine": lambda peak, steps, _: optax.cosine_decay_schedule(peak, steps),
    "linear": lambda peak, steps, _: optax.linear_schedule(peak, 0.0, steps),
    "constant": lambda peak, *_: optax.constant_schedule(peak),
    "wsd": lambda peak, steps, decay: optax.linear_schedule(peak, 0.0, decay, steps - decay),
}


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The learning rate as a function of the step: a warmup, then the chosen decay.

    Args:
      config: The schedule and its peak.
      steps: Optimizer steps of the whole run.

    Returns:
      The schedule. At each step of the run, 0 to `steps - 1`, the rate is above zero.

    Example:
      >>> from ranktuner_jax.train import OptimizerConfig
      >>> config = OptimizerConfig(learning_rate=1.0, schedule="wsd", warmup_ratio=0.2,
      ...                          decay_ratio=0.4)
      >>> schedule = make_schedule(config, 10)
      >>> [round(float(schedule(step)), 2) for step in range(10)]
      [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    warmup = round(steps * config.warmup_ratio)
    peak, left = config.learning_rate, max(1, steps - warmup)
    decay = min(left, max(1, round(steps * config.decay_ratio)))
    after = SCHEDULES[config.schedule](peak, left, decay)
    if not warmup:
        return after
    # The first update has a rate above zero: otherwise the step would be wasted.
    rise = optax.linear_schedule(peak / warmup, peak, max(1, warmup - 1))
    return optax.join_schedules([rise, after], [warmup])
