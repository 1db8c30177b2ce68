"""Tasks: each names a scorer, which decides whether a completion is right."""

from __future__ import annotations

import decimal
import functools
import re
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ranktuner_jax.data import Example
from ranktuner_jax.data.generator import import_reasoning_gym
from ranktuner_jax.errors import UserError
from ranktuner_jax.evals.answers import final_number, final_texts
from ranktuner_jax.evals.graders import GRADERS, Grader

__all__ = ["AUTO", "TASKS", "Scorer", "make_scorer", "scorable"]

Scorer = Callable[[str, Mapping[str, Any]], bool]
"""Whether a completion is a correct answer to a record, which holds `answer`."""

AUTO = "auto"
"""The task for data of any kind: asks the rows that have an `answer` to compare with."""

# A longer `answer` is prose: a correct completion in other words would be scored as wrong.
_LONGEST_ANSWER = 100
_A_NUMBER = re.compile(r"[$€£]?\s*(-?\d[\d,]*(?:\.\d+)?)\s*%?\.?")


def _reasoning_gym(name: str) -> Scorer:
    """Scores the final number with reasoning-gym's own scorer of that data set."""
    score = import_reasoning_gym(f"eval.task={name}").get_score_answer_fn(name)

    def scorer(completion: str, record: Mapping[str, Any]) -> bool:
        # Wrong answers may score a little above 0: only a full score is right.
        return score(final_number(completion), dict(record)) >= 1

    return scorer


def _exact(completion: str, record: Mapping[str, Any]) -> bool:
    return completion.strip() == str(record["answer"]).strip()


def _auto(completion: str, record: Mapping[str, Any]) -> bool:
    """Compares numbers if the answer is one, otherwise words."""
    wanted = _number(record)
    if wanted is not None:
        found = final_number(completion)
        return found is not None and decimal.Decimal(found) == decimal.Decimal(wanted)
    return _words(str(record["answer"])) in map(_words, final_texts(completion))


def _graded(grader: Grader) -> Scorer:
    """Compares with the row's `answer` as a grader does."""
    return lambda completion, record: grader(completion, record["answer"])


def _words(text: str) -> str:
    """The text without case, repeated white space and surrounding punctuation."""
    return " ".join(text.casefold().split()).strip(string.punctuation + " ")


def _number(record: Mapping[str, Any]) -> str | None:
    r"""The number that `answer` is, or that it marks as final (`####`, `\boxed{}`)."""
    text = str(record["answer"]).strip()
    if match := _A_NUMBER.fullmatch(text):
        return match[1].replace(",", "")
    return final_number(text) if "####" in text or "\\boxed{" in text else None


def _is_comparable(record: Mapping[str, Any]) -> bool:
    answer = record.get("answer")
    if isinstance(answer, bool) or not isinstance(answer, str | int | float) or answer == "":
        return False
    return len(str(answer)) <= _LONGEST_ANSWER or _number(record) is not None


TASKS: dict[str, Callable[[], Scorer]] = {
    "chain_sum": lambda: _reasoning_gym("chain_sum"),
    "gsm_symbolic": lambda: _reasoning_gym("gsm_symbolic"),
    "exact": lambda: _exact,
    AUTO: lambda: _auto,
    **{
        name: functools.partial(_graded, grader)
        for name, grader in GRADERS.items()
        if name != "exact"
    },
}
"""Functions that make a scorer, by the name that `eval.task` takes.

One line registers your own, in a config file for example:

  evals.TASKS["mine"] = lambda: my_scorer

Here `my_scorer(completion, record)` is a `Scorer`; then `eval.task=mine` chooses it.
"""


def make_scorer(task: str) -> Scorer:
    """The scorer of a task by its name in `TASKS`.

    Raises:
      KeyError: If no task has that name.
      UserError: If the package that scores it is not installed.

    Example:
      >>> make_scorer("chain_sum")("4 + 38 = 42.", {"answer": "42"})
      True
      >>> make_scorer("auto")("It has 1,200 rooms. The answer is 1200.", {"answer": 1200})
      True
    """
    return TASKS[task]()


def scorable(task: str, examples: Sequence[Example]) -> tuple[list[Example], str]:
    """The questions that a task can score, with a note on those that are left out.

    A row is scored by its `answer`. The task `auto` leaves out rows that have none, or one that
    is too long to be compared (unless it marks a final number, as GSM8K's do).

    Returns:
      The questions, and the note; "" if none is left out.

    Raises:
      UserError: If the task is not `auto` and a row has no `answer`.

    Example:
      >>> rows = [{"prompt": "2 + 2?", "answer": "4"}, {"prompt": "Say something nice."}]
      >>> examples = [Example(i, (), (1,), (2,), row) for i, row in enumerate(rows)]
      >>> [example.index for example in scorable("auto", examples)[0]]
      [0]
    """
    if task != AUTO:
        for example in examples:
            if "answer" not in example.row:
                raise UserError(
                    f"eval.task={task}: expected a column 'answer' in every held-out row, got "
                    f"{sorted(example.row)} in row {example.index + 1}; add it, or set eval.task="
                )
        return list(examples), ""
    chosen = [example for example in examples if _is_comparable(example.row)]
    if not chosen:
        return [], "no questions are asked: no held-out row has a short `answer` to compare with"
    if len(chosen) < len(examples):
        return chosen, f"{len(chosen)} of {len(examples)} held-out rows have a short `answer`"
    return chosen, ""
