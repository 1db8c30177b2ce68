"""Questions whose wording occurs in training texts."""

from __future__ import annotations

import json
import pathlib
import tracemalloc

import pytest

from ranktuner_jax.evals.overlap import overlapping

SENTENCE = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"


def test_thirteen_words_in_a_row_overlap_and_twelve_do_not() -> None:
    words = SENTENCE.split()
    questions = ["x " + " ".join(words[:13]), "x " + " ".join(words[:12]) + " y"]
    assert overlapping(questions, [f"before {SENTENCE} after"]) == [0]


def test_words_that_are_interrupted_do_not_overlap() -> None:
    assert overlapping([SENTENCE], [SENTENCE.replace("seven", "seven and")]) == []


def test_words_are_not_joined_across_training_texts() -> None:
    words = SENTENCE.split()
    assert overlapping([SENTENCE], [" ".join(words[:7]), " ".join(words[7:])]) == []


@pytest.mark.parametrize(
    "written",
    [
        SENTENCE.upper(),
        SENTENCE.replace(" ", ", "),
        SENTENCE.replace(" ", "\n"),
        SENTENCE.replace("two", "$two$").replace("four five", r"four_{five}"),
    ],
)
def test_case_and_punctuation_and_white_space_do_not_count(written: str) -> None:
    assert overlapping([SENTENCE], [written]) == [0]


def test_every_question_with_the_wording_is_listed_once_and_in_order() -> None:
    questions = ["nothing", SENTENCE, SENTENCE + " " + SENTENCE]
    assert overlapping(questions, [SENTENCE, "other", SENTENCE]) == [1, 2]


def test_a_question_of_fewer_words_than_n_is_not_listed() -> None:
    assert overlapping(["two three"], [SENTENCE]) == []
    assert overlapping(["two three"], [SENTENCE], n=2) == [0]


def test_training_texts_are_read_one_at_a_time() -> None:
    # 10 MB of texts, of which one or two are there at a time.
    texts = (f"{i}{'a' * 1000} " * 100 for i in range(100))
    tracemalloc.start()
    assert overlapping([SENTENCE], texts) == []
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1e6


def test_one_string_in_place_of_several_texts_is_refused() -> None:
    with pytest.raises(TypeError, match="several training texts: got one string"):
        overlapping([SENTENCE], SENTENCE)
    with pytest.raises(TypeError, match="several questions"):
        overlapping(SENTENCE, [SENTENCE])


def test_an_n_of_no_words_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 word, got 0"):
        overlapping([SENTENCE], [SENTENCE], n=0)


def test_four_questions_of_math_500_are_worded_as_in_numinamath() -> None:
    folder = pathlib.Path(__file__).parents[3] / "shared/data"
    files = folder / "math_oai.jsonl", folder / "numinamath_cot_1k.jsonl"
    if not all(file.is_file() for file in files):
        pytest.skip("needs the benchmark files, which are not part of this project")
    questions, training = ([json.loads(line) for line in file.open()] for file in files)
    problems = [row["problem"] for row in questions]
    texts = [turn["value"] for row in training for turn in row["conversations"]]
    assert overlapping(problems, texts) == [17, 123, 134, 360]
