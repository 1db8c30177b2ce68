"""Evaluation: held-out likelihood, benchmarks with graders and intervals, and sampling."""

from ranktuner_jax.evals.answers import final_number
from ranktuner_jax.evals.benchmarks import (
    BENCHMARKS,
    Benchmark,
    Question,
    find_benchmark,
    read_questions,
)
from ranktuner_jax.evals.cache import cached_evaluation, fingerprint
from ranktuner_jax.evals.config import EvalConfig
from ranktuner_jax.evals.engines import Engine, LocalEngine, OpenAIEngine, Sampling
from ranktuner_jax.evals.evaluation import evaluate
from ranktuner_jax.evals.graders import GRADERS, Grader, MathGrader
from ranktuner_jax.evals.likelihood import LogLikelihood, log_likelihoods
from ranktuner_jax.evals.overlap import overlapping
from ranktuner_jax.evals.result import EvalResult, Preview
from ranktuner_jax.evals.sampler import Completion, generate
from ranktuner_jax.evals.sandbox import Verdict, check_python, run_python
from ranktuner_jax.evals.scores import Difference, Scores, Share, compare_scores
from ranktuner_jax.evals.statistics import mean_interval, paired_difference, pass_at_k
from ranktuner_jax.evals.stopping import stop_ids
from ranktuner_jax.evals.suite import Suite, read_scores
from ranktuner_jax.evals.tasks import TASKS, make_scorer, scorable

__all__ = [
    "BENCHMARKS",
    "GRADERS",
    "TASKS",
    "Benchmark",
    "Completion",
    "Difference",
    "Engine",
    "EvalConfig",
    "EvalResult",
    "Grader",
    "LocalEngine",
    "LogLikelihood",
    "MathGrader",
    "OpenAIEngine",
    "Preview",
    "Question",
    "Sampling",
    "Scores",
    "Share",
    "Suite",
    "Verdict",
    "cached_evaluation",
    "check_python",
    "compare_scores",
    "evaluate",
    "final_number",
    "find_benchmark",
    "fingerprint",
    "generate",
    "log_likelihoods",
    "make_scorer",
    "mean_interval",
    "overlapping",
    "paired_difference",
    "pass_at_k",
    "read_questions",
    "read_scores",
    "run_python",
    "scorable",
    "stop_ids",
]
