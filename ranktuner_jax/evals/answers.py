"""Finds the final answer in a completion."""

from __future__ import annotations

import re

__all__ = ["announced", "final_number", "final_texts", "last_box", "marked_passages"]

_NUMBER = re.compile(r"(?<![\w.])-?(?:\d{1,3}(?:,\d{3}(?!\d))+|\d+)(?:\.\d+)?")
_HASHES = re.compile(r"####\s*(.*)")
# Bounded: a text of nothing but "answer" is still searched in linear time.
_SENTENCE = re.compile(r"\banswer\b[^\d]{0,200}?\bis\b:?\s*(.*)", re.IGNORECASE)
_ANNOUNCED = re.compile(r"\banswer\b(?:\s+is\b|[^\S\n]*:)[\s:*]*", re.IGNORECASE)
_BOX = re.compile(r"\\(?:boxed|fbox)\s*(\{|)")
_BRACE = re.compile(r"\\[{}]|[{}]")  # an escaped brace is text


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
    for passage in [*marked_passages(text), text]:
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
    return [*marked_passages(text), *text.splitlines()[-1:], text]


def marked_passages(text: str) -> list[str]:
    r"""What follows the last of each kind of mark, the most trusted kind first.

    GSM8K's `####`, then a box, then a sentence that announces the answer.

    Example:
      >>> marked_passages(r"The answer is \boxed{4} eggs." + "\n#### 4")
      ['4', '4', '\\boxed{4} eggs.']
    """
    box = last_box(text)
    return [
        *_HASHES.findall(text)[-1:],
        *([] if box is None else [box]),
        *_SENTENCE.findall(text)[-1:],
    ]


def last_box(text: str) -> str | None:
    r"""What the last `\boxed` (or `\fbox`) holds, or None if there is none.

    Braces nest; a box that is never closed holds the rest of the text, and a box without braces
    holds what stands up to the next space or `$`.

    Example:
      >>> last_box(r"not \boxed{2} but \boxed{\frac{1}{2}}.")
      '\\frac{1}{2}'
      >>> last_box("2") is None
      True
    """
    boxes = list(_BOX.finditer(text))
    if not boxes:
        return None
    start = boxes[-1].end()
    if boxes[-1][1] != "{":
        return re.split(r"[\s$]", text[start:], maxsplit=1)[0]
    depth = 1
    for brace in _BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[start : brace.start()].strip()
    return text[start:].strip()


def announced(text: str) -> str | None:
    r"""What follows the last "answer is" or "answer:", or None if neither is there.

    Example:
      >>> announced("The answer is not 3.\nFinal answer: **4**")
      '4**'
    """
    found = list(_ANNOUNCED.finditer(text))
    return text[found[-1].end() :] if found else None
