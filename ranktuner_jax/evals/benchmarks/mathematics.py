"""Mathematics: the five benchmarks of the RankTuner paper, and GSM8K."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ranktuner_jax.evals.answers import last_box
from ranktuner_jax.evals.benchmarks.benchmark import Benchmark

__all__ = ["BENCHMARKS", "BOXED"]

BOXED = r"Please reason step by step, and put your final answer within \boxed{}."
"""The system prompt of the paper's evaluation."""


def _problem(row: Mapping[str, Any]) -> str:
    return str(row["problem"])


def _answer(row: Mapping[str, Any]) -> str:
    return str(row["answer"])


def _boxed_answer(row: Mapping[str, Any]) -> str:
    """The answer of a row that has a solution only: what its last box holds."""
    answer = last_box(str(row["solution"]))
    if answer is None:
        raise ValueError("expected a \\boxed{} in the solution, found none")
    return answer


def _only(values: Any) -> str:
    [value] = values
    return str(value)


BENCHMARKS = (
    Benchmark(
        name="math500",
        file="math_oai.jsonl",
        ask=_problem,
        reference=_answer,
        grader="math",
        system=BOXED,
        source="hub:HuggingFaceH4/MATH-500",
    ),
    Benchmark(
        name="minerva",
        file="minerva_math.jsonl",
        ask=_problem,
        reference=_boxed_answer,
        grader="math",
        system=BOXED,
        source="hub:math-ai/minervamath",
    ),
    Benchmark(
        name="olympiadbench",
        file="olympiadbench.jsonl",
        ask=lambda row: str(row["question"]),
        reference=lambda row: _only(row["final_answer"]),
        grader="math",
        system=BOXED,
        source="hub:Hothan/OlympiadBench",
        subset="OE_TO_maths_en_COMP",
        split="train",
    ),
    Benchmark(
        name="aime24",
        file="aime24.jsonl",
        ask=_problem,
        reference=_answer,
        grader="math",
        system=BOXED,
        source="hub:HuggingFaceH4/aime_2024",
        split="train",
    ),
    Benchmark(
        name="amc23",
        file="amc23.jsonl",
        ask=lambda row: str(row.get("problem") or row["question"]),
        reference=_answer,
        grader="math",
        system=BOXED,
        source="hub:math-ai/amc23",
    ),
    Benchmark(
        name="gsm8k",
        file="gsm8k_test.jsonl",
        ask=lambda row: str(row["question"]),
        reference=lambda row: str(row["answer"]).rpartition("####")[2].strip(),
        grader="math",
        system=BOXED,
        source="hub:openai/gsm8k",
        subset="main",
    ),
)
