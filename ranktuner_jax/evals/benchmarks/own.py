"""Questions of a user's own file, whose rows have an `answer`."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from ranktuner_jax.evals.benchmarks.benchmark import Benchmark

__all__ = ["own_benchmark"]

_TEXTS = ("prompt", "question", "problem", "instruction")


def own_benchmark(path: str, grader: str, system: str = "") -> Benchmark:
    """A benchmark of rows with `messages`, or a `prompt`, `question`, `problem` or `instruction`.

    What answers are compared with is the row's `answer`; for the grader `python` it is the whole
    row if that has `test` or `test_list`, as HumanEval and MBPP do.

    Args:
      path: A JSONL or Parquet file; its name without the ending is that of the benchmark.
      grader: A name in `GRADERS` or `TASKS`.
      system: The system prompt.

    Example:
      >>> own_benchmark("runs/held_out.jsonl", "number").name
      'held_out'
    """
    return Benchmark(
        name=pathlib.PurePath(path).stem,
        file=path,
        ask=_ask,
        reference=functools.partial(_reference, grader),
        grader=grader,
        system=system,
        source=path,
        split="train",  # A file has no other.
    )


def _ask(row: Mapping[str, Any]) -> str | Sequence[dict[str, str]]:
    if row.get("messages"):
        turns = [{"role": turn["role"], "content": turn["content"]} for turn in row["messages"]]
        while turns and turns[-1]["role"] == "assistant":
            turns.pop()  # The reference answer.
        if not turns:
            raise ValueError("expected a user's turn in messages, found none")
        return turns
    column = next((name for name in _TEXTS if row.get(name)), None)
    if column is None:
        raise ValueError(f"expected a column messages or one of {', '.join(_TEXTS)}")
    return str(row[column])


def _reference(grader: str, row: Mapping[str, Any]) -> Any:
    if grader == "python" and ("test" in row or "test_list" in row):
        return dict(row)
    return row["answer"]
