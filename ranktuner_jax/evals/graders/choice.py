"""Grades the letter of a multiple-choice answer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ranktuner_jax.evals.answers import announced, last_box
from ranktuner_jax.evals.graders.reference import reference_text

__all__ = ["choice"]

_LETTERS = "ABCDEFGHIJ"
_DIGITS = "1234"
_WRAPPER = re.compile(r"\\(?:text|textbf|mathrm|mathbf|boxed)\b|[{}$*]")
# "A dog" is an article and "I think" a pronoun; "A is right" and "(I)" are choices.
_LETTER = re.compile(
    r"(?<![\w'’.^\\-])(?:([B-HJ])|(A)(?!\s+(?!(?:and|or|is|was)\b)\w)|(I)(?=[).:]|\s*$))(?![\w'’+^_-])",
    re.MULTILINE,
)
_DIGIT = re.compile(r"(?<![\w.,-])([1-4])(?![\w,-]|\.\d)")
_LEAD = re.compile(r"\s*(?:(?:the|option|choice|letter)\s+)*[(\[]?\s*", re.IGNORECASE)
# Joined to the one before: "(A), (B)", "A or B"; not "(B), since".
_MORE = re.compile(r"[)\].]?\s*(?:(?:,|/|&|and\b|or\b)\s*)+[(\[]?[A-J1-4]\b")


def choice(completion: str, reference: Any) -> bool:
    r"""Whether the completion chooses the option that the reference labels.

    The choice is looked for in the first of these that the completion has:

    1. What its last `\boxed{}` holds.
    2. The line after its last "answer is" or "answer:".
    3. The last line that has a letter of an option.

    It must name one letter only; in 1 and 2 it may go on to others if it opens with the chosen
    one (`B, since C is too heavy`). A text that goes through the options in order (`A) iron B)
    wood`, or A and B line by line) lists them and chooses none. Options are the capitals A to J
    that stand alone; the article "A" and the pronoun "I" are not options. A passage that is
    nothing but a letter may have it small.

    Args:
      completion: The whole completion.
      reference: A letter from A to J, bare or as in `(B)`, or a label from 1 to 4. For a label,
        a completion may give the label or the letter of the same position.

    Raises:
      ValueError: If the reference is neither.

    Example:
      >>> choice("It is not (A). The answer is (B), since it is lighter.", "B")
      True
      >>> choice("A) iron B) wood C) lead D) gold", "D")
      False
    """
    label = reference_text(reference).strip("()[]. ").upper()
    if len(label) != 1 or label not in _LETTERS + _DIGITS:
        raise ValueError(
            f"reference: expected a letter from A to J or a label from 1 to 4, got "
            f"{reference!r:.80}; use another grader for answers that are no choice"
        )
    if label in _LETTERS:
        return _chosen(completion, _LETTER) == label
    # As the labels of the question are digits, so may the completion's be.
    return _chosen(completion, _DIGIT) == label or (
        _chosen(completion, _LETTER) == _LETTERS[_DIGITS.index(label)]
    )


def _chosen(completion: str, option: re.Pattern[str]) -> str | None:
    """The option that a completion chooses, or None."""
    marked = last_box(completion)
    if marked is None and (sentence := announced(completion)) is not None:
        marked = sentence.strip().partition("\n")[0]
    if marked is not None:
        return _named(marked, option)
    text = _WRAPPER.sub("", completion)
    lines = [line for line in text.splitlines() if option.search(line)]
    if not lines or _is_list([match[0] for match in option.finditer(text)]):
        return _letter(text)
    return _only(lines[-1], option)


def _named(passage: str, option: re.Pattern[str]) -> str | None:
    """The one option that a passage opens with, or that is the only one in it."""
    passage = _WRAPPER.sub("", passage).strip()
    found = list(option.finditer(passage))
    opening = _LEAD.match(passage)
    if not found or not opening or found[0].start() != opening.end():
        return _letter(passage) or _only(passage, option)
    items = [match[0] for match in found if passage[match.end() : match.end() + 1] in tuple(").:")]
    return None if _MORE.match(passage, found[0].end()) or _is_list(items) else found[0][0]


def _letter(text: str) -> str | None:
    """The letter that is all of a text, as a capital."""
    text = text.strip("()[]. \n")
    return text.upper() if len(text) == 1 else None


def _only(passage: str, option: re.Pattern[str]) -> str | None:
    """The only option that a passage names."""
    names = {match[0] for match in option.finditer(passage)}
    return names.pop() if len(names) == 1 and not re.search(r"\bnot\b", passage) else None


def _is_list(options: Sequence[str]) -> bool:
    """Whether the options end on a run from the first one on: A, B, C."""
    if not options:
        return False
    first = "1" if options[-1].isdigit() else "A"
    length = ord(options[-1]) - ord(first) + 1
    run = [chr(ord(first) + i) for i in range(length)]
    return length > 1 and list(options[-length:]) == run
