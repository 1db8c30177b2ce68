"""The final answer in what a model wrote."""

from __future__ import annotations

import re

__all__ = ["final_number"]

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
    passages = [found[-1] for mark in _MARKS if (found := mark.findall(text))]
    for passage in [*passages, text]:
        if numbers := _NUMBER.findall(passage):
            return numbers[-1].replace(",", "")
    return None
