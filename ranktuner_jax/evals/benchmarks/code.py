"""Code: HumanEval and the sanitized MBPP, graded by running the tests in a sandbox."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ranktuner_jax.evals.benchmarks.benchmark import Benchmark

__all__ = ["BENCHMARKS"]


def _humaneval(row: Mapping[str, Any]) -> str:
    return (
        "Complete the following Python function. Reply with the whole function, imports "
        f"included, in one code block.\n\n```python\n{row['prompt']}```"
    )


def _mbpp(row: Mapping[str, Any]) -> str:
    # One test shows the name and the form of the arguments; answers are graded by all of them.
    return (
        f"{row['prompt']}\nReply with Python code in one code block. It should pass this "
        f"test:\n\n```python\n{row['test_list'][0]}\n```"
    )


def _fields(*names: str) -> Any:
    return lambda row: {name: row[name] for name in names}


BENCHMARKS = (
    Benchmark(
        name="humaneval",
        file="humaneval.jsonl",
        ask=_humaneval,
        reference=_fields("prompt", "test", "entry_point"),
        grader="python",
        source="hub:openai/openai_humaneval",
    ),
    Benchmark(
        name="mbpp",
        file="sanitized_mbpp.jsonl",
        ask=_mbpp,
        reference=_fields("code", "test_imports", "test_list"),
        grader="python",
        # The published test range; the other rows are for prompts, validation and training.
        keep=lambda row: 11 <= int(row["task_id"]) <= 510,
        source="hub:google-research-datasets/mbpp",
        subset="sanitized",
    ),
)
