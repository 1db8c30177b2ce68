"""Graders: whether a completion is right, given the reference answer."""

from ranktuner_jax.evals.graders.mathematics import MathGrader
from ranktuner_jax.evals.graders.registry import GRADERS, Grader

__all__ = ["GRADERS", "Grader", "MathGrader"]
