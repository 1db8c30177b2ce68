"""The target task's training rows, with the faults that the axes ask for."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ranktuner_jax.lab.phrasing import explain
from ranktuner_jax.lab.problems import LARGEST, Problem
from ranktuner_jax.lab.settings import LabSettings
from ranktuner_jax.lab.tokenizer import ordinary_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["SPAN", "choose", "mixed", "noisy_rows"]

SPAN = (2, 6)
"""The shortest and the longest span of random tokens."""


def choose(count: int, share: float, rng: random.Random) -> list[bool]:
    """Which of `count` things are among the share; a larger share has those and more.

    Example:
      >>> sum(choose(10, 0.25, random.Random(0)))
      2
    """
    chosen = set(rng.sample(range(count), count)[: round(share * count)])
    return [i in chosen for i in range(count)]


def mixed(
    vague: Sequence[Problem], changed: Sequence[Problem], share: float, rng: random.Random
) -> list[Problem]:
    """One problem a place: a share of contradictions, the others as they are without any.

    Args:
      vague: Problems about which the base model knows nothing.
      changed: As many that contradict it.
      share: The share of these.
      rng: Chooses the places.

    Example:
      >>> problems = [Problem("rule", name, 1, ()) for name in "abcd"]
      >>> [p.question for p in mixed(problems[:2], problems[2:], 0.5, random.Random(0))]
      ['a', 'd']
    """
    places = choose(len(vague), share, rng)
    return [b if is_changed else a for a, b, is_changed in zip(vague, changed, places, strict=True)]


def noisy_rows(
    problems: Sequence[Problem],
    settings: LabSettings,
    tokenizer: PreTrainedTokenizerBase,
    seed: str,
) -> list[dict[str, Any]]:
    """Conversations, each with its right `answer` and, in `clean`, its completion without noise.

    Each axis has draws of its own, so that changing one leaves the others' faults where they are.

    Args:
      problems: What is asked.
      settings: The shares of noise and paraphrases.
      tokenizer: Whose tokens the noise is.
      seed: Of the draws.
    """
    lengths = [len(problem.moves) for problem in problems]
    rare = iter(choose(sum(lengths), settings.paraphrase, random.Random(f"{seed} paraphrase")))
    wrong = choose(len(problems), settings.answer_noise, random.Random(f"{seed} answer"))
    noisy = choose(len(problems), settings.token_noise, random.Random(f"{seed} tokens"))
    vocabulary = ordinary_ids(tokenizer)
    rows = []
    for i, problem in enumerate(problems):
        said, right = [next(rare) for _ in problem.moves], problem.results[-1]
        answer = _other(right, random.Random(f"{seed} answer {i}")) if wrong[i] else right
        clean, completion = (
            explain(problem, random.Random(f"{seed} words {i}"), said, number)
            for number in (right, answer)
        )
        if noisy[i]:
            rng = random.Random(f"{seed} tokens {i}")
            completion = _with_random_span(completion, tokenizer, vocabulary, rng)
        rows.append(
            {
                "prompt": problem.question,
                "completion": completion,
                "answer": str(right),
                "kind": problem.kind,
                "clean": clean,
            }
        )
    return rows


def _other(number: int, rng: random.Random) -> int:
    """Another number from 0 to `LARGEST`."""
    return (number + rng.randint(1, LARGEST)) % (LARGEST + 1)


def _with_random_span(
    text: str, tokenizer: PreTrainedTokenizerBase, vocabulary: Sequence[int], rng: random.Random
) -> str:
    """The text with a span of tokens replaced, each by another that is uniform over the rest."""
    tokens = tokenizer.encode(text, add_special_tokens=False)
    length = min(rng.randint(*SPAN), len(tokens))
    start = rng.randint(0, len(tokens) - length)
    for place in range(start, start + length):
        tokens[place] = rng.choice([token for token in vocabulary if token != tokens[place]])
    return str(tokenizer.decode(tokens))
