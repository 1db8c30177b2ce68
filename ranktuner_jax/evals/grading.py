"""Grades samples, many at once."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ranktuner_jax.errors import UserError
from ranktuner_jax.evals.benchmarks import Benchmark, Question
from ranktuner_jax.evals.graders import GRADERS, Grader
from ranktuner_jax.evals.samples import Sample
from ranktuner_jax.evals.tasks import make_scorer

__all__ = ["check_grader", "find_grader", "grade_samples"]


def find_grader(name: str) -> Grader:
    """The grader with a name in `GRADERS`, or the scorer of a task with a name in `TASKS`.

    Raises:
      KeyError: If there is none.
      UserError: If the package that it needs is not installed.

    Example:
      >>> find_grader("exact")("Lima", "Lima")
      True
    """
    return GRADERS[name] if name in GRADERS else make_scorer(name)


def check_grader(benchmark: Benchmark, questions: Sequence[Question]) -> None:
    """Grades an empty answer to the first question, so that nothing is sampled in vain.

    Raises:
      UserError: If a package or the sandbox of the grader is missing, or it cannot use the
        reference.
    """
    if benchmark.choices is None:
        _grade(find_grader(benchmark.grader), benchmark.name, 0, "", questions[0].reference)


def _grade(grader: Grader, name: str, question: int, completion: str, reference: Any) -> bool:
    try:
        return bool(grader(completion, reference))
    except ValueError as error:
        raise UserError(f"{name}: question {question}: {error}") from error


def grade_samples(
    benchmark: Benchmark,
    questions: Sequence[Question],
    samples: Sequence[Sample],
    progress: Callable[[int], None] | None = None,
) -> Iterator[Sample]:
    """Yields the samples of a benchmark with their grades, in order.

    The likeliest choice is the first of the likeliest ones, as in lm-eval.

    Args:
      benchmark: The benchmark.
      questions: Its questions.
      samples: Their samples; grades that they have are replaced.
      progress: Called with the number of samples done.

    Raises:
      UserError: If the grader cannot use a reference.
    """
    if benchmark.choices is not None:
        for sample in samples:
            yield _grade_choice(questions[sample.question], sample)
        return
    grader = find_grader(benchmark.grader)
    # Graders that take long wait for processes of their own.
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
        verdicts = threads.map(
            lambda s: _grade(grader, s.task, s.question, s.completion, s.reference), samples
        )
        for done, (sample, verdict) in enumerate(zip(samples, verdicts, strict=True), 1):
            yield dataclasses.replace(sample, correct=verdict)
            if progress is not None:
                progress(done)


def _grade_choice(question: Question, sample: Sample) -> Sample:
    plain = sample.log_likelihoods
    # Without the space that begins a continuation.
    lengths = [max(1, len(choice.lstrip())) for choice in question.choices]
    per_character = [value / length for value, length in zip(plain, lengths, strict=True)]
    return dataclasses.replace(
        sample,
        correct=plain.index(max(plain)) == sample.reference,
        correct_per_character=per_character.index(max(per_character)) == sample.reference,
    )
