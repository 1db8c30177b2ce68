"""Problems: chains of additions and subtractions, asked as sums, as stories or by named rules."""

from __future__ import annotations

import dataclasses
import itertools
import random
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence

from ranktuner_jax.data.generator import import_reasoning_gym
from ranktuner_jax.errors import UserError

__all__ = [
    "FILES",
    "LARGEST",
    "Move",
    "Problem",
    "Rules",
    "belonging",
    "different",
    "draw_rules",
    "rule_problems",
    "stories",
    "sums",
]

# Every chain belongs to one file, by its checksum; most belong to pretrain.jsonl.
FILES = {
    "pretrain": range(10),
    "train": range(10, 13),
    "target": range(13, 14),
    "ood": range(14, 15),
    "retention": range(15, 16),
}
LARGEST = 30
"""No number is below 0 or above this: few facts, which small models learn in minutes."""

# After so many repeated questions in a row there are hardly any others.
_PATIENCE = 1000

_NAMES = ("Mia", "Tom", "Ana", "Ben", "Eva", "Leo", "Zoe", "Max")
_ITEMS = ("apples", "books", "coins", "stamps", "pens", "shells", "cards", "eggs")
_GAINS = ("buys {n} more", "finds {n} more", "gets {n} from a friend", "makes {n} more")
_LOSSES = ("gives away {n}", "loses {n}", "sells {n}", "drops {n}")
_RULE_QUESTIONS = (
    "Start at {start}. Apply {rules}. What comes out?",
    "What does {start} become by {rules}?",
    "Take {start} and apply {rules}. Which number is it now?",
)
_ONSETS, _RHYMES = ("b", "dr", "fl", "gr", "k", "pl", "sn", "z"), ("ag", "esk", "ip", "orn")


@dataclasses.dataclass(frozen=True)
class Move:
    """One step of a chain.

    Attributes:
      sign: 1 to add, -1 to subtract.
      number: How much.
      rule: The name of the rule that says so; "" if the question itself does.
    """

    sign: int
    number: int
    rule: str = ""


@dataclasses.dataclass(frozen=True)
class Problem:
    """A question and the chain that answers it.

    Attributes:
      kind: "sum", "story", "rule" or "rule_story".
      question: The text that is asked.
      start: The first number.
      moves: What is added and subtracted, in order.

    Example:
      >>> problem = Problem("sum", "What is 8 + 5 - 1?", 8, (Move(1, 5), Move(-1, 1)))
      >>> problem.chain, problem.results
      ('8 + 5 - 1', (13, 12))
    """

    kind: str
    question: str
    start: int
    moves: tuple[Move, ...]

    @property
    def results(self) -> tuple[int, ...]:
        """The number after each move."""
        steps = [self.start, *(move.sign * move.number for move in self.moves)]
        return tuple(itertools.accumulate(steps))[1:]

    @property
    def chain(self) -> str:
        """What is asked, in whatever words: numbers with signs, or the names of rules."""
        steps = (move.rule or f"{'+-'[move.sign < 0]} {move.number}" for move in self.moves)
        return " ".join([str(self.start), *steps])


@dataclasses.dataclass(frozen=True)
class Rules:
    """What named rules do.

    Attributes:
      learnt: Rules that always mean the same in pretrain.jsonl.
      changed: The same names with the sign and the number changed: what contradicts the base.
      vague: Names that mean something else in every conversation of pretrain.jsonl, and what they
        mean in the target task.
    """

    learnt: Mapping[str, Move]
    changed: Mapping[str, Move]
    vague: Mapping[str, Move]


def draw_rules(rng: random.Random) -> Rules:
    """Names and meanings.

    Example:
      >>> rules = draw_rules(random.Random(0))
      >>> len(rules.learnt), len(rules.vague), set(rules.learnt) & set(rules.vague)
      (16, 16, set())
    """
    names = [onset + rhyme for onset in _ONSETS for rhyme in _RHYMES]
    rng.shuffle(names)
    known, vague = names[::2], names[1::2]
    learnt = {name: _move(rng, name) for name in known}
    # Steps around 1 to 9 that never end where they began.
    changed = {
        name: Move(-move.sign, (move.number - 1 + rng.randint(1, 8)) % 9 + 1, name)
        for name, move in learnt.items()
    }
    return Rules(learnt, changed, {name: _move(rng, name) for name in vague})


def _move(rng: random.Random, rule: str = "") -> Move:
    return Move(rng.choice((1, -1)), rng.randint(1, 9), rule)


def sums(seed: int) -> Iterator[Problem]:
    """Sums and differences of 2 or 3 digits, endlessly: reasoning-gym's, as it asks them.

    Raises:
      UserError: If reasoning-gym is not installed.

    Example:
      >>> next(sums(0)).kind
      'sum'
    """
    reasoning_gym = import_reasoning_gym("ranktuner lab")
    size = {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1, "size": 2**31}
    sources = [
        reasoning_gym.create_dataset("chain_sum", seed=2 * seed, **size),
        reasoning_gym.create_dataset(
            "basic_arithmetic",
            seed=2 * seed + 1,
            operators=["+", "-"],
            allow_parentheses=False,
            allow_negation=False,
            format_style="natural",
            **size,
        ),
    ]
    for index in itertools.count():
        row = sources[index % 2][index // 2]
        first, *signed = re.findall(r"[+-]? ?\d+", row["metadata"]["expression"])
        moves = (Move(-1 if text[0] == "-" else 1, int(text.lstrip("+- "))) for text in signed)
        yield Problem("sum", row["question"], int(first), tuple(moves))


def stories(rng: random.Random) -> Iterator[Problem]:
    """Word problems about things that somebody gets and gives, endlessly.

    Example:
      >>> next(stories(random.Random(0))).question
      'Zoe has 28 cards. Zoe drops 9. How many cards does Zoe have now?'
    """
    while True:
        start, name, item = rng.randint(1, LARGEST), rng.choice(_NAMES), rng.choice(_ITEMS)
        moves = [_move(rng) for _ in range(rng.randint(1, 2))]
        told = [
            f"{name} {rng.choice(_GAINS if move.sign > 0 else _LOSSES).format(n=move.number)}."
            for move in moves
        ]
        text = " ".join([f"{name} has {start} {item}.", *told, _how_many(name, item)])
        yield Problem("story", text, start, tuple(moves))


def rule_problems(
    rng: random.Random, rules: Mapping[str, Move] | Sequence[str], kind: str = "rule"
) -> Iterator[Problem]:
    """Problems of one or two named rules, endlessly.

    Args:
      rng: Draws them.
      rules: The rules; of mere names the meaning is drawn anew each time.
      kind: "rule" asks for a number, "rule_story" for things that somebody has.

    Example:
      >>> next(rule_problems(random.Random(0), {"zip": Move(1, 3, "zip")})).question
      'Start at 28. Apply zip. What comes out?'
    """
    names = list(rules)
    while True:
        start = rng.randint(1, LARGEST)
        chosen = rng.sample(names, min(rng.randint(1, 2), len(names)))
        meanings = rules if isinstance(rules, Mapping) else {n: _move(rng, n) for n in chosen}
        if kind == "rule_story":
            name, item = rng.choice(_NAMES), rng.choice(_ITEMS)
            used = f"{name} uses the rule {', then the rule '.join(chosen)}."
            text = f"{name} has {start} {item}. {used} {_how_many(name, item)}"
        else:
            text = rng.choice(_RULE_QUESTIONS).format(start=start, rules=" and then ".join(chosen))
        yield Problem(kind, text, start, tuple(meanings[name] for name in chosen))


def _how_many(name: str, item: str) -> str:
    return f"How many {item} does {name} have now?"


def belonging(problems: Iterator[Problem], file: str, seed: int) -> Iterator[Problem]:
    """Those of an endless supply that belong to a file and never leave 0 to `LARGEST`.

    Args:
      problems: The supply.
      file: A key of `FILES`; no chain belongs to two.
      seed: That of the laboratory.

    Example:
      >>> next(belonging(sums(0), "target", seed=0)).question
      'Evaluate: 4 - 1.'
    """
    for problem in problems:
        place = zlib.crc32(f"{seed}: {problem.chain}".encode()) % 16
        if place in FILES[file] and all(0 <= result <= LARGEST for result in problem.results):
            yield problem


def different(problems: Iterator[Problem], count: int) -> list[Problem]:
    """The first problems of an endless supply, no question twice.

    Raises:
      UserError: If there are not so many.

    Example:
      >>> [problem.start for problem in different(iter([Problem("sum", "3?", 3, ())] * 2), 1)]
      [3]
    """
    taken: dict[str, Problem] = {}
    repeated = 0
    while len(taken) < count:
        problem = next(problems)
        repeated = repeated + 1 if problem.question in taken else 0
        if repeated == _PATIENCE:
            raise UserError(
                f"--rows, --questions: expected about {len(taken)} at most, since there are no "
                f"more different ones, got {count}"
            )
        taken.setdefault(problem.question, problem)
    return list(taken.values())
