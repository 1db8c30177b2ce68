"""Evaluation: sampling with a key-value cache, tasks with their scorers, held-out likelihood."""

from ranktuner_jax.evals.answers import final_number
from ranktuner_jax.evals.cache import cached_evaluation, fingerprint
from ranktuner_jax.evals.config import EvalConfig
from ranktuner_jax.evals.evaluation import evaluate
from ranktuner_jax.evals.result import EvalResult, Preview, wilson_interval
from ranktuner_jax.evals.sampler import Completion, generate
from ranktuner_jax.evals.stopping import stop_ids
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
