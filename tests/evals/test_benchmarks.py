"""What benchmarks ask, and what they compare answers with."""

from __future__ import annotations

import collections
import dataclasses
import json
import pathlib
from typing import Any

import pytest

from ranktuner_jax.errors import UserError
from ranktuner_jax.evals import BENCHMARKS, Question, find_benchmark, read_questions
from ranktuner_jax.evals.benchmarks import digest
from ranktuner_jax.evals.grading import grade_samples
from ranktuner_jax.evals.samples import Sample

DATA = pathlib.Path(__file__).parents[3] / "shared" / "data"
published = pytest.mark.skipif(not DATA.is_dir(), reason="needs the files of the benchmarks")


def written(folder: pathlib.Path, name: str, rows: list[dict[str, Any]]) -> pathlib.Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@published
@pytest.mark.parametrize(
    ("name", "count", "first"),
    [
        ("math500", 500, r"\left( 3, \frac{\pi}{2} \right)"),
        ("minerva", 272, "1.6"),
        ("olympiadbench", 675, "2"),
        ("aime24", 30, "204"),
        ("amc23", 40, "27.0"),
        ("gsm8k", 1319, "18"),
        ("arc_challenge", 1172, "C"),
        ("arc_challenge_likelihood", 1172, 2),
        ("humaneval", 164, None),
        ("mbpp", 257, None),
    ],
)
def test_all_published_rows_are_read(name: str, count: int, first: Any) -> None:
    questions = read_questions(BENCHMARKS[name], {"": str(DATA)})
    assert len(questions) == count
    assert [question.index for question in questions] == list(range(count))
    assert first in (None, questions[0].reference)


@published
def test_choices_are_graded_by_position_whatever_their_labels() -> None:
    rows = [json.loads(line) for line in (DATA / "arc_challenge_test.jsonl").open()]
    digits = [index for index, row in enumerate(rows) if row["answerKey"] in "1234"]
    assert len(digits) == 22
    questions = read_questions(BENCHMARKS["arc_challenge"], {"": str(DATA)})
    for index in digits:
        assert questions[index].reference == "ABCD"[int(rows[index]["answerKey"]) - 1]


def test_the_prompt_is_that_of_the_paper(tmp_path: pathlib.Path) -> None:
    written(tmp_path, "math_oai.jsonl", [{"problem": "What is $1+1$?", "answer": "2"}])
    [question] = read_questions(BENCHMARKS["math500"], {"": str(tmp_path)})
    assert question.messages == (
        {
            "role": "system",
            "content": "Please reason step by step, and put your final answer within \\boxed{}.",
        },
        {"role": "user", "content": "What is $1+1$?"},
    )


def test_both_published_forms_of_arc_are_the_same_questions(tmp_path: pathlib.Path) -> None:
    choices = [{"text": "cold", "label": "1"}, {"text": "hot", "label": "2"}]
    ai2: dict[str, Any] = {"question": {"stem": "Fire is", "choices": choices}, "answerKey": "2"}
    hub: dict[str, Any] = {
        "question": "Fire is",
        "choices": {"text": ["cold", "hot"], "label": ["1", "2"]},
        "answerKey": "2",
    }
    for name in ("arc_challenge", "arc_easy_likelihood"):
        one, other = (
            read_questions(BENCHMARKS[name], {name: str(written(tmp_path, f"{i}.jsonl", [row]))})
            for i, row in enumerate([ai2, hub])
        )
        assert digest(one) == digest(other)
    assert other[0].text == "Question: Fire is\nAnswer:"
    assert (other[0].choices, other[0].reference) == ((" cold", " hot"), 1)


def test_the_right_choice_of_gpqa_is_anywhere_but_always_at_the_same_place(
    tmp_path: pathlib.Path,
) -> None:
    rows = [
        {
            "Question": f"Which is {i}?",
            "Correct Answer": str(i),
            **{f"Incorrect Answer {j}": str(100 * j + i) for j in (1, 2, 3)},
        }
        for i in range(200)
    ]
    path = str(written(tmp_path, "gpqa.jsonl", rows))
    by_letter = read_questions(BENCHMARKS["gpqa"], {"gpqa": path})
    by_index = read_questions(BENCHMARKS["gpqa_likelihood"], {"gpqa_likelihood": path})
    places = collections.Counter(question.reference for question in by_letter)
    assert min(places[letter] for letter in "ABCD") > 30
    for i, (letter, index) in enumerate(zip(by_letter, by_index, strict=True)):
        assert "ABCD"[index.reference] == letter.reference
        assert f"({letter.reference}) {i}" in letter.text.splitlines()
        assert index.choices[index.reference] == f" {i}"
    # The letters of the first ten: another order would change what was published before.
    assert "".join(question.reference for question in by_letter[:10]) == "ACCBDCBCCD"


def test_one_test_of_a_program_is_shown_and_all_are_run(tmp_path: pathlib.Path) -> None:
    row = {
        "task_id": 12,
        "prompt": "Write a function that doubles.",
        "code": "def double(x): return 2 * x",
        "test_imports": [],
        "test_list": ["assert double(2) == 4", "assert double(3) == 6"],
    }
    path = written(tmp_path, "rows.jsonl", [row, {**row, "task_id": 2}])
    [question] = read_questions(BENCHMARKS["mbpp"], {"mbpp": str(path)})
    assert "double(2)" in question.text
    assert "double(3)" not in question.text
    assert question.reference["test_list"] == row["test_list"]


def test_rows_of_ones_own_have_an_answer_and_a_question_or_turns(tmp_path: pathlib.Path) -> None:
    rows: list[dict[str, Any]] = [
        {"question": "Capital of Peru?", "answer": "Lima"},
        {
            "messages": [
                {"role": "user", "content": "Hello."},
                {"role": "assistant", "content": "Hello!"},
                {"role": "user", "content": "Capital of Chile?"},
                {"role": "assistant", "content": "It is Santiago."},
            ],
            "answer": "Santiago",
        },
    ]
    path = str(written(tmp_path, "mine.jsonl", rows))
    benchmark = find_benchmark(path, grader="exact", system="Be brief.")
    one, other = read_questions(benchmark)
    assert (one.text, one.reference) == ("Capital of Peru?", "Lima")
    assert one.messages[0] == {"role": "system", "content": "Be brief."}
    assert [turn["role"] for turn in other.messages] == ["system", "user", "assistant", "user"]
    assert (other.text, other.reference) == ("Capital of Chile?", "Santiago")


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"problem": "?"}], r"math500: row 1 of .* is not one of this benchmark \(KeyError: 'ans"),
        ([], "math500: expected questions in .*, found none"),
    ],
)
def test_rows_of_something_else_are_refused(
    rows: list[dict[str, Any]], said: str, tmp_path: pathlib.Path
) -> None:
    path = written(tmp_path, "rows.jsonl", rows)
    with pytest.raises(UserError, match=said):
        read_questions(BENCHMARKS["math500"], {"math500": str(path)})


def test_what_is_missing_is_named(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match=r"expected math_oai\.jsonl in the folder of --data"):
        read_questions(BENCHMARKS["math500"], {"": str(tmp_path)})
    with pytest.raises(UserError, match=r"--tasks: expected math500, .*, got 'math501'"):
        find_benchmark("math501")
    with pytest.raises(UserError, match=r"--grader: expected one of choice, .*, got ''"):
        find_benchmark("mine.jsonl")
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"problem": \n')
    with pytest.raises(UserError, match=r"broken\.jsonl:1: broken JSON"):
        read_questions(BENCHMARKS["math500"], {"math500": str(broken)})


def test_the_digest_changes_with_any_part_of_a_question() -> None:
    question = Question(0, "2 + 2?", ({"role": "user", "content": "2 + 2?"},), "4", ("3", "4"))
    changed: list[dict[str, Any]] = [
        {"index": 1},
        {"messages": ({"role": "user", "content": "2+2?"},)},
        {"reference": "5"},
        {"choices": ("4", "3")},
    ]
    others = [dataclasses.replace(question, **change) for change in changed]
    assert len({digest([one]) for one in [question, *others]}) == 5


def test_choices_are_graded_plain_and_per_character() -> None:
    benchmark = BENCHMARKS["arc_challenge_likelihood"]
    question = Question(0, "Fire is", (), 1, (" hot", " very hot", " the opposite of cold"))
    # Per character: -1, -1.125, -0.45; likeliest at all: the first.
    sample = Sample("arc_challenge_likelihood", 0, 0, 1, log_likelihoods=(-3.0, -9.0, -9.0))
    for reference, plain, per_character in [(0, True, False), (1, False, False), (2, False, True)]:
        asked = dataclasses.replace(sample, reference=reference)
        [graded] = grade_samples(benchmark, [question], [asked])
        assert (graded.correct, graded.correct_per_character) == (plain, per_character)
