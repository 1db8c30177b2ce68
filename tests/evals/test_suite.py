"""An evaluation in a folder: what it keeps, how it goes on, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

from ranktuner_jax.errors import UserError
from ranktuner_jax.evals import Benchmark, Question, Sampling, Suite, read_scores
from ranktuner_jax.evals.engines import Answer, Choice, Request
from ranktuner_jax.evals.scores import compare_scores, which_k
from ranktuner_jax.evals.statistics import mean_interval

SUMS = Benchmark(
    name="sums",
    file="sums.jsonl",
    ask=lambda row: f"{row['a']} + {row['b']}?",
    reference=lambda row: str(row["a"] + row["b"]),
    grader="exact",
)
LARGER = Benchmark(
    name="larger",
    file="larger.jsonl",
    ask=lambda row: "The larger one is",
    choices=lambda row: [f" {row['a']}", f" {row['b']}"],
    reference=lambda row: int(row["b"] > row["a"]),
)
ROWS = [{"a": a, "b": 7 - a} for a in range(6)]


class Pupil:
    """Adds, but adds one to the sum if the question and the sample are not both even."""

    def __init__(self, patience: int = 1000, name: str = "pupil") -> None:
        self.description: Mapping[str, Any] = {"engine": name}
        self.patience, self.asked = patience, 0

    def answer(
        self, requests: Sequence[Request], sampling: Sampling, done: Callable[[int, Answer], None]
    ) -> None:
        # As an engine that refills its batch: not in order.
        for index in sorted(range(len(requests)), key=lambda i: (i % 3, i)):
            self._tire()
            question, sample = requests[index]
            wrong = (question.index % 2, sample % 2) != (0, 0)
            text = str(int(question.reference) + wrong)
            done(index, Answer(text, tokens=len(text), finished=not wrong))

    def choose(self, questions: Sequence[Question], done: Callable[[int, Choice], None]) -> None:
        for index, question in enumerate(questions):
            self._tire()
            done(index, Choice(tuple(float(choice) for choice in question.choices)))

    def _tire(self) -> None:
        if self.asked == self.patience:
            raise KeyboardInterrupt
        self.asked += 1


def suite(folder: pathlib.Path, samples: int = 4, rows: Sequence[Any] = ROWS, **kw: Any) -> Suite:
    tasks = [(benchmark, benchmark.questions(rows, "rows")) for benchmark in (SUMS, LARGER)]
    temperature = kw.pop("temperature", 1.0)
    return Suite(tasks, Sampling(samples=samples, temperature=temperature), folder, **kw)


def lines(folder: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def same(samples: list[dict[str, Any]]) -> list[Any]:
    """Samples without their times, in one order."""
    kept = [{name: value for name, value in s.items() if name != "seconds"} for s in samples]
    return sorted(kept, key=lambda s: (s["task"], s["question"], s["sample"]))


def test_the_folder_has_every_answer_and_the_scores(tmp_path: pathlib.Path) -> None:
    scores = suite(tmp_path).run(Pupil())
    sums = scores["sums"]
    # Of 3 of 6 questions, 2 of 4 answers are right.
    by_question = {"pass@1": 0.5, "pass@2": 5 / 6, "pass@4": 1.0}
    for name, value in by_question.items():
        expected = [value, 0.0] * 3
        assert sums.by_question[name] == pytest.approx(expected)
        assert sums.shares[name] == pytest.approx((value / 2, *mean_interval(expected)))
    assert (sums.questions, sums.samples, sums.finished) == (6, 4, 0.25)
    assert scores["larger"].shares["accuracy"].value == 1.0
    kept = lines(tmp_path)
    assert len(kept) == 6 * 4 + 6
    assert sum(line["correct"] for line in kept if line["task"] == "sums") == 6
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["settings"]["sampling"]["samples"] == 4
    assert result["tasks"]["sums"]["shares"]["pass@1"]["value"] == 0.25
    assert {name: found for name, (_, found) in read_scores(tmp_path).items()} == scores


@pytest.mark.parametrize("patience", [0, 1, 10, 24, 27])
def test_an_interrupted_evaluation_goes_on_where_it_was(
    patience: int, tmp_path: pathlib.Path
) -> None:
    suite(tmp_path / "whole").run(Pupil())
    with pytest.raises(KeyboardInterrupt):
        suite(tmp_path / "part").run(Pupil(patience))
    path = tmp_path / "part" / "samples.jsonl"
    if patience:  # Killed in the middle of a line.
        path.write_bytes(path.read_bytes()[:-5])
    again = Pupil()
    suite(tmp_path / "part").run(again)
    assert again.asked == 30 - max(0, patience - 1)
    assert same(lines(tmp_path / "part")) == same(lines(tmp_path / "whole"))


def test_a_finished_evaluation_asks_nothing_again(tmp_path: pathlib.Path) -> None:
    scores = suite(tmp_path).run(Pupil())
    idle = Pupil(patience=0)
    assert suite(tmp_path).run(idle) == scores


def test_answers_are_graded_again_without_an_engine(tmp_path: pathlib.Path) -> None:
    scores = suite(tmp_path).run(Pupil())
    path = tmp_path / "samples.jsonl"
    edited = [{**line, "correct": None, "correct_per_character": None} for line in lines(tmp_path)]
    path.write_text("".join(json.dumps(line) + "\n" for line in edited))
    assert suite(tmp_path).grade() == scores
    path.write_text("".join(json.dumps(line) + "\n" for line in edited[1:]))
    with pytest.raises(UserError, match="expected 24 answers to sums, found 23; run"):
        suite(tmp_path).grade()


def test_a_benchmark_may_be_added(tmp_path: pathlib.Path) -> None:
    sums = (SUMS, SUMS.questions(ROWS, "rows"))
    first = Suite([sums], Sampling(), tmp_path).run(Pupil())
    more = Pupil()
    both = suite(tmp_path, samples=1, temperature=0.0).run(more)
    assert more.asked == 6
    assert both["sums"] == first["sums"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"samples": 8}, r"holds an evaluation with sampling\.samples 4, this one has 8"),
        ({"rows": ROWS[:5]}, r"holds answers to other questions of sums \(6, now 5\)"),
    ],
)
def test_another_evaluation_in_the_folder_is_refused(
    change: dict[str, Any], said: str, tmp_path: pathlib.Path
) -> None:
    suite(tmp_path).run(Pupil())
    before = (tmp_path / "samples.jsonl").read_bytes()
    with pytest.raises(UserError, match=said):
        suite(tmp_path, **change).run(Pupil())
    with pytest.raises(UserError, match=r"with engine\.engine 'pupil', this one has 'other'"):
        suite(tmp_path).run(Pupil(name="other"))
    assert (tmp_path / "samples.jsonl").read_bytes() == before


def test_a_folder_of_something_else_is_left_alone(tmp_path: pathlib.Path) -> None:
    (tmp_path / "thesis.txt").write_text("chapter 1")
    with pytest.raises(UserError, match="which holds something else"):
        suite(tmp_path).run(Pupil())
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_broken_line_in_the_middle_is_named(tmp_path: pathlib.Path) -> None:
    suite(tmp_path).run(Pupil())
    path = tmp_path / "samples.jsonl"
    text = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*text[:2], "{broken\n", *text[3:]]))
    with pytest.raises(UserError, match=r"samples\.jsonl:3: expected a sample, got a broken line"):
        suite(tmp_path).run(Pupil())


def test_k_above_the_samples_is_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match="--k: expected numbers from 1 to the 4 samples"):
        suite(tmp_path, ks=[1, 8])
    assert which_k(5) == (1, 2, 4)
    assert which_k(5, [5, 3]) == (5, 3)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"samples": 0}, "--samples: expected at least 1, got 0"),
        ({"samples": 4}, "--samples=4: expected --temperature above 0"),
        ({"temperature": -1.0}, "--temperature: expected at least 0"),
        ({"top_p": 0.0}, "--top_p: expected more than 0"),
        ({"top_k": -1}, "--top_k: expected at least 0"),
        ({"max_new_tokens": 0}, "--max_new_tokens: expected at least 1"),
    ],
)
def test_sampling_that_cannot_be_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Sampling(**options)


def test_a_difference_is_paired_by_question(tmp_path: pathlib.Path) -> None:
    scores = suite(tmp_path).run(Pupil())["sums"]
    shifted = {name: [1.0 - x for x in values] for name, values in scores.by_question.items()}
    other = dataclasses.replace(scores, by_question=shifted)
    change = compare_scores(scores, other)["pass@1"]
    assert change.value == pytest.approx(-0.5)
    assert change.low < change.value < change.high
