"""The benchmarks by name, and their rows."""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Mapping

from ranktuner_jax.data import read_source
from ranktuner_jax.errors import UserError
from ranktuner_jax.evals.benchmarks import choice, code, generated, mathematics
from ranktuner_jax.evals.benchmarks.benchmark import Benchmark, Question
from ranktuner_jax.evals.benchmarks.own import own_benchmark
from ranktuner_jax.evals.graders import GRADERS
from ranktuner_jax.evals.tasks import TASKS

__all__ = ["BENCHMARKS", "find_benchmark", "read_questions"]

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in itertools.chain(
        mathematics.BENCHMARKS, choice.BENCHMARKS, code.BENCHMARKS, generated.BENCHMARKS
    )
}
"""Benchmarks by name. A config file may add one: `evals.BENCHMARKS["mine"] = Benchmark(...)`."""


def find_benchmark(name: str, *, grader: str = "", system: str = "") -> Benchmark:
    """The benchmark that a user names.

    Args:
      name: A name in `BENCHMARKS`, or the path of a file with rows of one's own.
      grader: How the rows of that file are graded; for a benchmark it must be left out.
      system: The system prompt for them; likewise.

    Raises:
      UserError: If there is no such benchmark or grader.

    Example:
      >>> find_benchmark("math500").grader, find_benchmark("mine.jsonl", grader="exact").grader
      ('math', 'exact')
    """
    if name in BENCHMARKS:
        return BENCHMARKS[name]
    if not name.endswith((".jsonl", ".parquet")):
        raise UserError(
            f"--tasks: expected {', '.join(BENCHMARKS)}, or a .jsonl or .parquet file, got {name!r}"
        )
    known = [*GRADERS, *(task for task in TASKS if task not in GRADERS)]
    if grader not in known:
        raise UserError(
            f"--grader: expected one of {', '.join(known)} for {name}, got {grader!r}; choose how "
            "its answers are graded"
        )
    return own_benchmark(name, grader, system)


def read_questions(
    benchmark: Benchmark, data: Mapping[str, str] | None = None, limit: int | None = None
) -> list[Question]:
    """Reads the questions of a benchmark.

    Args:
      benchmark: The benchmark.
      data: Name of a benchmark -> where its rows are, as `data.read_source` takes it; "" -> a
        folder that has its `file`. By default they are where the benchmark says.
      limit: Only the first so many questions.

    Raises:
      UserError: If the rows are not there, or are not those of the benchmark.
    """
    data = data or {}
    source, split, subset = benchmark.source, benchmark.split, benchmark.subset
    file = pathlib.Path(data.get("", "."), benchmark.file)
    if benchmark.name in data:
        source, subset = data[benchmark.name], ""
        split = "train" if source.endswith((".jsonl", ".parquet")) else split
    elif "" in data and file.is_file():
        source, split = str(file), "train"
    elif "" in data and source.startswith("hub:"):
        raise UserError(
            f"{benchmark.name}: expected {benchmark.file} in the folder of --data, found no {file};"
            f" add it, or give --data {benchmark.name}=FILE"
        )
    try:
        records = list(read_source(source, split, subset=subset))
    except UserError as error:
        if not source.startswith("hub:"):
            raise
        raise UserError(
            f"{benchmark.name}: {error}; or give its rows: --data {benchmark.name}=FILE, or a "
            f"folder that holds {benchmark.file}"
        ) from error
    for record in records:
        if record.error:
            raise UserError(f"{benchmark.name}: {record.where}: {record.error}; correct the row")
    return benchmark.questions([record.fields for record in records], source, limit)
