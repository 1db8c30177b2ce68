"""Hooks: code that runs between training steps."""

from ranktuner_jax.train.hooks.best import KeepBest, StopEarly
from ranktuner_jax.train.hooks.completions import SampleCompletions
from ranktuner_jax.train.hooks.evaluate import Evaluate
from ranktuner_jax.train.hooks.hook import Hook
from ranktuner_jax.train.hooks.profile import Profile

__all__ = ["Evaluate", "Hook", "KeepBest", "Profile", "SampleCompletions", "StopEarly"]
