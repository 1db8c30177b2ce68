"""Evaluation: sampling with a cache, tasks and their scorers, held-out likelihood."""

from ranktuner_jax.evals.answers import final_number
from ranktuner_jax.evals.cache import cached_evaluation, fingerprint
from ranktuner_jax.evals.run import (
    EvalConfig,
    EvalResult,
    Preview,
    evaluate,
    stop_ids,
    wilson_interval,
)
from ranktuner_jax.evals.sampler import Completion, generate
from ranktuner_jax.evals.tasks import TASKS, make_scorer, scorable

__all__ = [
    "TASKS",
    "Completion",
    "EvalConfig",
    "EvalResult",
    "Preview",
    "cached_evaluation",
    "evaluate",
    "final_number",
    "fingerprint",
    "generate",
    "make_scorer",
    "scorable",
    "stop_ids",
    "wilson_interval",
]
