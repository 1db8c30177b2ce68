"""Evaluates benchmarks into a folder, and resumes after an interruption."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ranktuner_jax import files
from ranktuner_jax.errors import UserError
from ranktuner_jax.evals.benchmarks import Benchmark, Question, digest
from ranktuner_jax.evals.engines import Answer, Choice, Engine, Request, Sampling
from ranktuner_jax.evals.grading import check_grader, grade_samples
from ranktuner_jax.evals.processes import on_first_process
from ranktuner_jax.evals.samples import Sample, SampleFile
from ranktuner_jax.evals.scores import Scores, score_samples, which_k

__all__ = ["Suite", "read_scores"]

RESULT, SAMPLES = "result.json", "samples.jsonl"

Report = Callable[[str, str, int, int, int], None]
"""Called with the benchmark, "answers" or "grades", how many are done, of how many, and tokens."""


class Suite:
    """An evaluation of several benchmarks, kept in a folder.

    The folder holds `samples.jsonl`, every answer with its grade, and `result.json`, the settings
    and the scores. An interrupted evaluation goes on where it was: call it again with the same
    settings and folder; benchmarks may be added.

    Args:
      benchmarks: The benchmarks with their questions.
      sampling: How answers are drawn.
      folder: The folder; it may hold an earlier part of the same evaluation.
      ks: The values of k of pass@k; the powers of 2 up to the samples if empty.
      report: Shows the progress.

    Raises:
      UserError: If a k is above the samples, or a grader lacks its package or its sandbox.
    """

    def __init__(
        self,
        benchmarks: Sequence[tuple[Benchmark, Sequence[Question]]],
        sampling: Sampling,
        folder: str | os.PathLike[str],
        *,
        ks: Sequence[int] = (),
        report: Report = lambda *_: None,
    ) -> None:
        self._benchmarks, self._sampling, self._report = benchmarks, sampling, report
        self._folder = pathlib.Path(folder)
        self._ks = which_k(sampling.samples, ks)
        names = [benchmark.name for benchmark, _ in benchmarks]
        if twice := {name for name in names if names.count(name) > 1}:
            raise UserError(f"--tasks: expected each benchmark once, got {sorted(twice)[0]} twice")
        for benchmark, questions in benchmarks:
            check_grader(benchmark, questions)

    def run(self, engine: Engine) -> dict[str, Scores]:
        """Answers what is not answered yet, grades it and returns the scores by benchmark.

        With several processes, all must call; process 0 reads and writes the folder.

        Raises:
          UserError: If the folder holds another evaluation, or the engine refuses a benchmark.
        """
        settings = {"sampling": dataclasses.asdict(self._sampling), "engine": engine.description}
        samples: list[SampleFile] = []

        def opened() -> None:
            self._claim(settings)
            samples.append(SampleFile(self._folder / SAMPLES))

        on_first_process(opened)
        with samples[0] if samples else contextlib.nullcontext() as file:
            for benchmark, questions in self._benchmarks:
                self._answer(engine, benchmark, questions, file)
        return self.grade() if samples else {}

    def grade(self) -> dict[str, Scores]:
        """Grades all answers of the folder, again if they were graded, and returns the scores.

        Raises:
          UserError: If answers are missing.
        """
        result = self._result()
        self._check_questions(result)
        file = SampleFile(self._folder / SAMPLES)
        others = [s for s in file.samples if s.task not in {b.name for b, _ in self._benchmarks}]
        graded: dict[str, list[Sample]] = {}
        for benchmark, questions in self._benchmarks:
            samples = [sample for sample in file.samples if sample.task == benchmark.name]
            wanted = len(questions) * (1 if benchmark.choices else self._sampling.samples)
            if len(samples) != wanted:
                raise UserError(
                    f"{self._folder}: expected {wanted} answers to {benchmark.name}, found "
                    f"{len(samples)}; run the evaluation to its end first"
                )
            report = self._reporter(benchmark.name, "grades", len(samples))
            graded[benchmark.name] = list(grade_samples(benchmark, questions, samples, report))
        file.rewrite([*others, *(sample for group in graded.values() for sample in group)])
        scores = {name: score_samples(samples, self._ks) for name, samples in graded.items()}
        for (benchmark, questions), of_task in zip(self._benchmarks, scores.values(), strict=True):
            result["tasks"][benchmark.name] = _identity(questions) | of_task.to_json()
        files.write_whole(self._folder / RESULT, json.dumps(result, indent=1))
        return scores

    def _reporter(self, name: str, what: str, total: int) -> Callable[[int], None]:
        return lambda done: self._report(name, what, done, total, 0)

    def _result(self) -> dict[str, Any]:
        """What result.json holds; empty for a new folder."""
        path = self._folder / RESULT
        if not path.exists():
            return {"tasks": {}}
        try:
            result: dict[str, Any] = json.loads(path.read_text())
            _ = result["tasks"].items()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path}: expected the result of an evaluation, got a broken file ({error}); "
                "choose another --output"
            ) from error
        return result

    def _claim(self, settings: Mapping[str, Any]) -> None:
        """Marks the folder as that of this evaluation."""
        foreign = self._folder.exists() and not (self._folder / RESULT).exists()
        if foreign and (not self._folder.is_dir() or any(self._folder.iterdir())):
            raise UserError(
                f"--output: expected a new folder or one of an evaluation, got {self._folder}, "
                "which holds something else"
            )
        result = self._result()
        settings = json.loads(json.dumps(settings))
        if "settings" in result and result["settings"] != settings:
            [(name, old, new), *_] = _differences(result["settings"], settings)
            raise UserError(
                f"--output: {self._folder} holds an evaluation with {name} {old!r}, this one has "
                f"{new!r}; choose another folder, or the same settings to go on"
            )
        for benchmark, questions in self._benchmarks:
            result["tasks"].setdefault(benchmark.name, _identity(questions))
        self._check_questions(result)
        result["settings"] = settings
        files.write_whole(self._folder / RESULT, json.dumps(result, indent=1))

    def _check_questions(self, result: Mapping[str, Any]) -> None:
        """Refuses questions other than those that the folder holds answers to."""
        for benchmark, questions in self._benchmarks:
            known = result["tasks"].get(benchmark.name)
            if known is None:
                raise UserError(f"--output: {self._folder} holds no answers to {benchmark.name}")
            if known["digest"] != digest(questions):
                raise UserError(
                    f"--output: {self._folder} holds answers to other questions of "
                    f"{benchmark.name} ({known['questions']}, now {len(questions)}); choose "
                    "another folder"
                )

    def _answer(
        self,
        engine: Engine,
        benchmark: Benchmark,
        questions: Sequence[Question],
        file: SampleFile | None,
    ) -> None:
        """Answers the questions that have no answer yet."""
        mine = [s for s in file.samples if s.task == benchmark.name] if file else []
        # One process decides for all, for they compute together.
        answered, seconds = on_first_process(
            lambda: (
                [[sample.question, sample.sample] for sample in mine],
                max((sample.seconds for sample in mine), default=0.0),
            )
        )
        have = {tuple(key) for key in answered}
        count = 1 if benchmark.choices else self._sampling.samples
        requests = [
            Request(question, sample)
            for question in questions
            for sample in range(count)
            if (question.index, sample) not in have
        ]
        start = time.monotonic() - seconds
        total, tokens = len(have) + len(requests), 0
        done = len(have)

        def keep(index: int, **fields: Any) -> None:
            nonlocal done, tokens
            request = requests[index]
            sample = Sample(
                benchmark.name,
                request.question.index,
                request.sample,
                request.question.reference,
                seconds=round(time.monotonic() - start, 3),
                **fields,
            )
            if file is not None:
                file.append(sample)
            done, tokens = done + 1, tokens + sample.tokens
            self._report(benchmark.name, "answers", done, total, tokens)

        def keep_answer(index: int, answer: Answer) -> None:
            text, length, finished = answer
            keep(index, completion=text, tokens=length, finished=finished)

        def keep_choice(index: int, choice: Choice) -> None:
            keep(index, log_likelihoods=choice.log_likelihoods)

        if not requests:
            return
        self._report(benchmark.name, "answers", done, total, 0)
        if benchmark.choices is not None:
            engine.choose([request.question for request in requests], keep_choice)
        else:
            engine.answer(requests, self._sampling, keep_answer)


def read_scores(folder: str | os.PathLike[str]) -> dict[str, tuple[str, Scores]]:
    """The digest of the questions and the scores of each benchmark in a folder.

    Raises:
      UserError: If it does not hold a finished evaluation.
    """
    path = pathlib.Path(folder, RESULT)
    try:
        tasks = json.loads(path.read_text())["tasks"]
        found = {}
        for name, fields in tasks.items():
            of_task = dict(fields)
            found[name] = (of_task.pop("digest"), Scores.from_json(of_task))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--against: expected the folder of a finished evaluation, got {folder} "
            f"({type(error).__name__}: {error})"
        ) from error
    return found


def _identity(questions: Sequence[Question]) -> dict[str, Any]:
    return {"digest": digest(questions), "questions": len(questions)}


def _differences(
    old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = ""
) -> list[tuple[str, Any, Any]]:
    """The settings that differ, by name."""
    found = []
    for name in sorted({*old, *new}):
        a, b = old.get(name), new.get(name)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += _differences(a, b, f"{prefix}{name}.")
        elif a != b:
            found.append((f"{prefix}{name}", a, b))
    return found
