"""Which completions are right, and which rows can be asked."""

from typing import Any

import pytest

from ranktuner_jax.data import Example
from ranktuner_jax.errors import UserError
from ranktuner_jax.evals import make_scorer, scorable


def examples(*rows: dict[str, Any]) -> list[Example]:
    return [Example(i, (), (1,), (2,), row) for i, row in enumerate(rows)]


@pytest.mark.parametrize(
    ("answer", "completion", "right"),
    [
        ("42", "12 + 30 = 42.", True),
        (42, "It is 42.0", True),
        ("$1,200", "That makes 1200 dollars.", True),
        ("-7", "-7", True),
        ("42", "42 is not it, 43 is.", False),
        ("42", "I do not know.", False),
        ("It is 48/2 = 24.\n#### 24", "Half of 48 is\n#### 24", True),
        ("so \\boxed{7}", "\\boxed{8}", False),
        ("Paris", "The answer is Paris.", True),
        ("Paris", "France?\n**paris**", True),
        ("Paris", "Paris, or Lyon", False),
        ("B", "(B)", True),
        (",", "3", False),
    ],
)
def test_auto_compares_numbers_as_numbers_and_words_as_words(
    answer: Any, completion: str, right: bool
) -> None:
    [example] = scorable("auto", examples({"answer": answer}))[0]
    assert make_scorer("auto")(completion, example.row) == right


def test_auto_asks_where_there_is_a_short_answer() -> None:
    rows = examples(
        {"answer": "4"},
        {"answer": "A long text. " * 20},
        {"answer": "A long text. " * 20 + "#### 4"},
        {"answer": ""},
        {"answer": None},
        {"answer": ["4"]},
        {"completion": "4"},
    )
    chosen, note = scorable("auto", rows)
    assert [example.index for example in chosen] == [0, 2]
    assert note == "2 of 7 held-out rows have a short `answer`"
    assert scorable("auto", rows[:1]) == (rows[:1], "")
    assert scorable("auto", rows[3:])[0] == []
    assert "no questions are asked" in scorable("auto", rows[3:])[1]


def test_another_task_needs_an_answer_in_every_row() -> None:
    rows = examples({"answer": "4"}, {"completion": "4"})
    assert scorable("exact", rows[:1]) == (rows[:1], "")
    with pytest.raises(
        UserError, match=r"eval\.task=exact: expected a column 'answer' .* in row 2"
    ):
        scorable("exact", rows)
