"""Benchmarks: each declares its rows, its prompt and its grader."""

from ranktuner_jax.evals.benchmarks.benchmark import Benchmark, Question, digest
from ranktuner_jax.evals.benchmarks.registry import BENCHMARKS, find_benchmark, read_questions

__all__ = ["BENCHMARKS", "Benchmark", "Question", "digest", "find_benchmark", "read_questions"]
