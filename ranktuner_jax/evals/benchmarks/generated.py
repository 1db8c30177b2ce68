"""Questions that reasoning-gym generates: the built-in data sets, with its own scorers."""

from __future__ import annotations

from ranktuner_jax.evals.benchmarks.benchmark import Benchmark

__all__ = ["BENCHMARKS"]

BENCHMARKS = tuple(
    Benchmark(
        name=name,
        file=f"{name}.jsonl",
        ask=lambda row: str(row["question"]),
        # The scorer takes the whole row.
        reference=lambda row: {key: row[key] for key in ("question", "answer", "metadata")},
        grader=name,
        source=name,
    )
    for name in ("chain_sum", "gsm_symbolic")
)
