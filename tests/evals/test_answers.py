"""Final answers, and which of them are right."""

import sys

import pytest

from ranktuner_jax.errors import UserError
from ranktuner_jax.evals import TASKS, final_number, make_scorer


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("42", "42"),
        (" -103.", "-103"),
        ("15 - 43 - 75 = -103", "-103"),
        ("5-3=2", "2"),
        ("3 - 5", "5"),
        ("The answer is -7, not 8.5.", "8.5"),
        ("The final answer to the problem is: 12.\nCheck: 7 + 5.", "12"),
        ("So 6 * 200 = 1,200.\n#### 1,200\n(6 weeks)", "1200"),
        (r"thus \boxed{-3.5}, as 7 / 2", "-3.5"),
        ("1, 2, 3", "3"),
        ("12,34", "34"),
        ("£28,080 a year", "28080"),
        ("#### none, but 5", "5"),
        ("x2 and v1.5", None),
        ("I do not know.", None),
        ("", None),
    ],
)
def test_the_final_number_of(text: str, number: str | None) -> None:
    assert final_number(text) == number


@pytest.mark.parametrize("task", ["chain_sum", "gsm_symbolic"])
def test_reasoning_gym_judges_the_final_number(task: str) -> None:
    score = make_scorer(task)
    record = {"answer": "1200"}
    assert score("6 * 200 = 1,200", record)
    assert score("#### 1200.0", record)
    # Worth 0.01 to one of the scorers: wrong all the same.
    assert not score("6 * 200 = 1,300", record)
    assert not score("no idea", record)


def test_exact_compares_whole_texts() -> None:
    score = make_scorer("exact")
    assert score(" yes\n", {"answer": "yes"})
    assert not score("yes, 4", {"answer": "yes"})


def test_a_missing_scorer_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(
        UserError, match=r"eval\.task=chain_sum: expected the package reasoning-gym"
    ):
        make_scorer("chain_sum")


def test_an_unknown_task_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        make_scorer("mind_reading")
    graders = {"number", "math", "choice", "python"}
    assert set(TASKS) == {"chain_sum", "gsm_symbolic", "exact", "auto"} | graders
