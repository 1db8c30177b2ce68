"""Whether a completion is right: one scorer a task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ranktuner_jax.errors import UserError
from ranktuner_jax.evals.answers import final_number

__all__ = ["TASKS", "Scorer", "make_scorer"]

Scorer = Callable[[str, Mapping[str, Any]], bool]
"""Tells whether a completion answers a record (which holds `answer`) rightly."""


def _reasoning_gym(name: str) -> Scorer:
    """The final number, judged by reasoning-gym's own scorer of that data set."""
    try:
        import reasoning_gym
    except ImportError as error:
        raise UserError(
            f"eval.task={name}: expected the package reasoning-gym, found none; "
            'pip install "ranktuner-jax[eval]"'
        ) from error
    score = reasoning_gym.get_score_answer_fn(name)

    def scorer(completion: str, record: Mapping[str, Any]) -> bool:
        # Wrong answers may score a little above 0: only a full score is right.
        return score(final_number(completion), dict(record)) >= 1

    return scorer


def _exact(completion: str, record: Mapping[str, Any]) -> bool:
    return completion.strip() == str(record["answer"]).strip()


TASKS: dict[str, Callable[[], Scorer]] = {
    "chain_sum": lambda: _reasoning_gym("chain_sum"),
    "gsm_symbolic": lambda: _reasoning_gym("gsm_symbolic"),
    "exact": lambda: _exact,
}
"""Makers of scorers by the name that `eval.task` takes."""


def make_scorer(task: str) -> Scorer:
    """The scorer of a task by its name in `TASKS`.

    Raises:
      KeyError: If no task has that name.
      UserError: If the package that scores it is not installed.

    Example:
      >>> make_scorer("chain_sum")("4 + 38 = 42.", {"answer": "42"})
      True
    """
    return TASKS[task]()
