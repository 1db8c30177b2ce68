"""Finds the final answer in a completion."""

from __future__ import annotations

import re

__all__ = ["final_number", "final_texts"]

_NUMBER = re.compile(r"(?<![\w.])-?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?")
# In the order of trust: GSM8K's mark, a box, a sentence that announces the answer.
_MARKS = (
    re.compile(r"####\s*(.*)"),
    re.compile(r"\\boxed\{([^{}]*)\}"),
    re.compile(r"\banswer\b[^\d]*?\bis\b:?\s*(.*)", re.IGNORECASE),
)


def final_number(text: str) -> str | None:
    r"""The number that a completion ends on, without thousands separators, or None.

    The line after the last `####`, the last `\boxed{}` and the line after the last "answer is" are
    searched first, then the whole text. The last number found counts: `12 + 30 = 42` is 42.

    Example:
      >>> final_number("12 + 30 = 42.")
      '42'
      >>> final_number("She sold 3 * 400 = 1,200 eggs.\n#### 1,200")
      '1200'
      >>> final_number("I do not know.") is None
      True
    """
    for passage in [*_marked(text), text]:
        if numbers := _NUMBER.findall(passage):
            return numbers[-1].replace(",", "")
    return None


def final_texts(text: str) -> list[str]:
    r"""The candidates for a completion's answer: marked passages, the last line, the whole text.

    Example:
      >>> final_texts("France, I think.\nThe answer is: Paris.")
      ['Paris.', 'The answer is: Paris.', 'France, I think.\nThe answer is: Paris.']
    """
    text = text.strip()
    return [*_marked(text), *text.splitlines()[-1:], text]


def _marked(text: str) -> list[str]:
    """What follows the last of each kind of mark, the most trusted kind first."""
    return [found[-1] for mark in _MARKS if (found := mark.findall(text))]
