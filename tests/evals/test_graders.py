"""Which completions the graders of numbers, choices and texts call right."""

from typing import Any

import hypothesis
import pytest
from hypothesis import strategies

from ranktuner_jax.evals import GRADERS

NUMBERS: list[tuple[str, Any, bool]] = [
    ("12 + 30 = 42.", "42", True),
    ("12 + 30 = 42.", 42, True),
    ("12 + 30 = 42.", 42.0, True),
    ("12 + 30 = 42.", "43", False),
    ("42 is what I thought, but it is 43.", "42", False),
    ("She sold 1,200 eggs", "1200", True),
    ("She earned $1,200.00.", "1,200", True),
    ("She earned $1200", "$1,200", True),
    (r"It is 1{,}200", "1200", True),
    ("that is 50%", "50%", True),
    ("that is 50%", "50", True),
    ("that is 50%", "0.5", False),
    ("It is 3/4", "0.75", True),
    ("It is 3/4", "4", False),
    (r"It is \frac{3}{4}", "3/4", True),
    (r"It is $-\dfrac{3}{4}$", "-0.75", True),
    ("It is .50", "1/2", True),
    ("12/3 = 4", "4", True),
    ("It is −7", "-7", True),
    ("It is -7", "7", False),
    ("5-3=2", "2", True),
    ("0.1 + 0.2 = 0.3", "0.3", True),
    ("It is 0.3000000000000001", "0.3", False),
    (r"\boxed{5}, after 7 steps", "5", True),
    (r"\boxed{\text{5 eggs}}, after 7 steps", "5", True),
    (r"\boxed{4}, no, \boxed{5}, after 7 steps", "4", False),
    ("The answer is 5.\nCheck: 7 - 2 = 5, 7 steps", "5", True),
    (r"\boxed{4}" + "\n#### 5", "5", True),
    ("#### 5", "She has 2 + 3 = <<2+3=5>>5.\n#### 5", True),
    ("#### 3", "She has 2 + 3 = <<2+3=5>>5.\n#### 5", False),
    ("It is 1/0", "1", False),
    ("9" * 10_000, "9", False),
    ("none", "0", False),
    ("", "0", False),
]

CHOICES: list[tuple[str, Any, bool]] = [
    ("B", "B", True),
    ("b", "B", True),
    ("(B)", "(B)", True),
    ("**B**", "B", True),
    ("B.", "B", True),
    ("C", "B", False),
    ("The answer is (B).", "B", True),
    ("The answer is B because A is too light.", "B", True),
    ("The answer is B because A is too light.", "A", False),
    ("The answer is (B), since it is lighter.", "B", True),
    ("The answer is B, and a good one.", "B", True),
    ("The correct answer is: option B", "B", True),
    ("Answer: B", "B", True),
    ("**Answer:** B", "B", True),
    ("Answer:\n\nB", "B", True),
    ("Answer: iron (B)", "B", True),
    ("Final answer: $\\textbf{B}$", "B", True),
    ("The answer is A. No: the answer is B.", "A", False),
    ("The answer is A. No: the answer is B.", "B", True),
    (r"\boxed{B}", "B", True),
    (r"\boxed{\text{(B)}}", "B", True),
    (r"\boxed{b}", "B", True),
    (r"\boxed{B) iron}", "B", True),
    (r"\boxed{A}, or rather \boxed{B}", "B", True),
    (r"\boxed{A}, or rather \boxed{B}", "A", False),
    (r"The answer is (A), so \boxed{B}.", "A", False),
    (r"\boxed{42} which is B", "B", False),
    ("Iron is the heaviest.\nB", "B", True),
    ("B) iron", "B", True),
    ("A is too light and C too dear.\nSo I choose B.", "B", True),
    ("A is too light and C too dear.\nSo I choose B.", "A", False),
    ("I think a dog is right: (D)", "D", True),
    ("A dog is an animal. I know.", "A", False),
    ("A dog is an animal. I know.", "I", False),
    ("The answer is (I)", "I", True),
    ("The answer is not B", "B", False),
    ("The answer is A, B, C, or D", "A", False),
    ("The answer is A or B", "A", False),
    ("The answer is A or B", "B", False),
    ("Answer: A) iron B) wood C) lead D) gold", "A", False),
    (r"\boxed{A, B, C, D}", "A", False),
    (r"\boxed{ABCD}", "A", False),
    ("", "A", False),
    ("no idea", "A", False),
    ("The answer is (2).", "2", True),
    ("The answer is (B).", "2", True),
    ("The answer is B.", 2, True),
    ("The answer is (3).", "2", False),
    ("The answer is (2).", "B", False),
    ("The answer is 2.5", "2", False),
]
LISTS = [
    "A) iron\nB) wood\nC) lead\nD) gold",
    "A) iron B) wood C) lead D) gold",
    "A, B, C, D",
    "The options are (A) iron, (B) wood, (C) lead and (D) gold.",
    "B is good, but here are the options:\nA. iron\nB. wood\nC. lead\nD. gold",
    "A B C D",
    "D) gold, C) lead, B) wood, A) iron",
]

TEXTS: list[tuple[str, Any, bool]] = [
    ("New York", "New York", True),
    ("  New\n York ", "New York", True),
    ("new york", "New York", False),
    ("The answer is New  York.", "New York", True),
    ("Answer: St. Paul", "St. Paul", True),
    ("The answer is 3.", "3.", True),
    (r"Thus \boxed{New York}, not Paris", "New York", True),
    (r"New York? \boxed{Paris}", "New York", False),
    ("Thinking.\n#### New York", "New York", True),
    ("Thinking.\nNew York", "New York", True),
    ("New York\nParis", "New York", False),
    ("New York, or Paris", "New York", False),
    ("42", 42, True),
    ("42.0", 42, False),
    ("", "x", False),
]


@pytest.mark.parametrize(("completion", "reference", "right"), NUMBERS)
def test_number_compares_the_value_that_a_completion_ends_on(
    completion: str, reference: Any, right: bool
) -> None:
    assert GRADERS["number"](completion, reference) == right


@pytest.mark.parametrize(("completion", "reference", "right"), CHOICES)
def test_choice_compares_the_letter_that_is_chosen(
    completion: str, reference: Any, right: bool
) -> None:
    assert GRADERS["choice"](completion, reference) == right


@pytest.mark.parametrize("completion", LISTS)
@pytest.mark.parametrize("reference", [*"ABCD", *"1234"])
def test_choice_gives_nothing_for_a_list_of_the_options(completion: str, reference: str) -> None:
    assert not GRADERS["choice"](completion, reference)


@pytest.mark.parametrize(("completion", "reference", "right"), TEXTS)
def test_exact_compares_the_final_answer_letter_by_letter(
    completion: str, reference: Any, right: bool
) -> None:
    assert GRADERS["exact"](completion, reference) == right


@pytest.mark.parametrize("name", ["number", "choice", "exact"])
@pytest.mark.parametrize("reference", [None, True, {"answer": 1}, ["1", "2"], [], "", " "])
def test_a_reference_that_is_no_answer_is_refused(name: str, reference: Any) -> None:
    with pytest.raises(ValueError, match="reference: expected"):
        GRADERS[name]("1", reference)


@pytest.mark.parametrize(
    ("name", "reference"), [("number", "many"), ("choice", "K"), ("choice", 5)]
)
def test_a_reference_of_another_kind_is_refused(name: str, reference: Any) -> None:
    with pytest.raises(ValueError, match=r"reference: expected a (number|letter from A to J)"):
        GRADERS[name]("1", reference)


MARKED = strategies.lists(
    strategies.sampled_from(
        [
            *"{}$()\n .,/-ABI125²𝟘",
            "the answer is ",
            "Answer: ",
            "####",
            "\\boxed{",
            "\\frac{",
            "not",
        ]
    )
).map("".join)


@pytest.mark.parametrize("name", ["number", "choice", "exact"])
@hypothesis.given(completion=strategies.text() | MARKED)
def test_no_completion_makes_a_grader_raise(name: str, completion: str) -> None:
    assert GRADERS[name](completion, "4") in (True, False)


@pytest.mark.parametrize("name", ["number", "choice", "exact", "math"])
@pytest.mark.parametrize(
    "piece", ["answer ", r"\boxed{", "{", r"\(", "$", "111,", "A ", "#### ", "-", "1/"]
)
def test_a_long_completion_is_searched_in_linear_time(name: str, piece: str) -> None:
    # A quadratic search would take an hour.
    GRADERS[name](piece * 100_000 + r"\boxed{}", "4")
