"""Worked answers: each step is said in one of several ways, so that some tokens are uncertain."""

from __future__ import annotations

import random
from collections.abc import Sequence

from ranktuner_jax.lab.problems import Move, Problem

__all__ = ["RARE_SHARE", "explain"]

RARE_SHARE = 0.04
"""The share of steps in pretrain.jsonl that are said in a rare way."""

# What is said of a step that the question or a rule asks for: the usual ways with their shares, and
# the rare ones. Rules are named in lower case and after a space everywhere: one token each.
_Ways = tuple[dict[str, float], tuple[str, ...]]
_PLAIN: _Ways = (
    {
        "{a} {op} {n} = {c}.": 0.4,
        "{Lead} {a} {op} {n} = {c}.": 0.35,
        "{Adding} {n} {to} {a} gives {c}.": 0.25,
    },
    ("From {a}, {n} {up} is {c}.", "Once {a} {gains} {n}, we reach {c}."),
)
_RULE: _Ways = (
    {
        "By {rule} we {add} {n}: {a} {op} {n} = {c}.": 0.4,
        "{Lead} {rule} {adds} {n}, so {a} {op} {n} = {c}.": 0.35,
        "{a} {op} {n} = {c}, as {rule} {adds} {n}.": 0.25,
    },
    (
        "Rule {rule} means {n} {up}: {a} {op} {n} = {c}.",
        "Once {rule} is done, {a} {gains} {n} and is {c}.",
    ),
)
_LEADS = (("First", "Now", "Here"), ("Then", "Next", "Now"))  # The first step; others.
_ENDS = {"The answer is {c}.": 0.6, "So the answer is {c}.": 0.25, "Answer: {c}.": 0.15}
_WORDS = {
    1: {"op": "+", "Adding": "Adding", "to": "to", "add": "add", "adds": "adds", "up": "up",
        "gains": "gains"},
    -1: {"op": "-", "Adding": "Taking", "to": "from", "add": "take", "adds": "takes", "up": "down",
         "gains": "loses"},
}  # fmt: skip


def explain(
    problem: Problem,
    rng: random.Random,
    rare: Sequence[bool] = (),
    answer: int | None = None,
) -> str:
    """The steps and the answer.

    The same `rng` gives the same words whatever the answer is.

    Args:
      problem: The problem.
      rng: Chooses the words.
      rare: Whether each step is said in a rare way; by default none is.
      answer: What the last step and the answer say; the right one by default.

    Example:
      >>> problem = Problem("sum", "What is 8 + 5?", 8, (Move(1, 5),))
      >>> explain(problem, random.Random(0))
      'Adding 5 to 8 gives 13. The answer is 13.'
      >>> explain(problem, random.Random(0), rare=[True], answer=3)
      'Once 8 gains 5, we reach 3. The answer is 3.'
    """
    results = [*problem.results[:-1], problem.results[-1] if answer is None else answer]
    before = [problem.start, *results]
    said = [
        _step(before[i], move, results[i], rng, _LEADS[i > 0], bool(rare) and rare[i])
        for i, move in enumerate(problem.moves)
    ]
    return " ".join([*said, _choose(_ENDS, rng).format(c=results[-1])])


def _step(
    before: int, move: Move, after: int, rng: random.Random, leads: Sequence[str], rare: bool
) -> str:
    usual, unusual = _RULE if move.rule else _PLAIN
    # All are drawn, so that what follows does not depend on which is taken.
    common, other, lead = _choose(usual, rng), rng.choice(unusual), rng.choice(leads)
    return (other if rare else common).format(
        a=before, n=move.number, c=after, rule=move.rule, Lead=lead, **_WORDS[move.sign]
    )


def _choose(ways: dict[str, float], rng: random.Random) -> str:
    return rng.choices(list(ways), list(ways.values()))[0]
