"""Questions whose wording occurs in training texts."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

__all__ = ["overlapping"]

_WORD = re.compile(r"[^\W_]+")


def overlapping(questions: Sequence[str], training: Iterable[str], n: int = 13) -> list[int]:
    r"""Indices of the questions that share `n` consecutive words with a training text.

    Words are maximal runs of letters and digits, without case: punctuation, white space and the
    signs of LaTeX only separate them, so `$x_{1} = 2$` and `x_1=2` are the same words. Questions
    of fewer than `n` words are never listed. Training texts are read once, one at a time; memory
    grows with the questions only.

    Args:
      questions: Texts of the questions, without answers.
      training: Texts that a model was trained on.
      n: Words in a row; 13 is customary.

    Raises:
      TypeError: If one text is given where several are expected.
      ValueError: If `n` is less than 1.

    Example:
      >>> overlapping(["What is $a + b$?", "Is 7 prime?"], ["Say: what is a + b here"], n=4)
      [0]

    References:
      Brown et al., Language Models are Few-Shot Learners, arXiv:2005.14165, appendix C, 2020.
    """
    if isinstance(questions, str) or isinstance(training, str):
        raise TypeError("expected several questions and several training texts: got one string")
    if n < 1:
        raise ValueError(f"n: expected at least 1 word, got {n}")
    asked_in = defaultdict(set)
    for index, question in enumerate(questions):
        for words in _runs(question, n):
            asked_in[words].add(index)
    found: set[int] = set()
    for text in training:
        for words in _runs(text, n):
            found |= asked_in.get(words, set())
    return sorted(found)


def _runs(text: str, n: int) -> Iterator[tuple[str, ...]]:
    """Every `n` consecutive words of a text."""
    words = _WORD.findall(text.casefold())
    return (tuple(words[i : i + n]) for i in range(len(words) - n + 1))
