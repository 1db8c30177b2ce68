"""Reads the reference answer of a row."""

from __future__ import annotations

from typing import Any

__all__ = ["reference_text"]


def reference_text(reference: Any) -> str:
    """The text of a reference answer: a string, a number, or a list that holds one of them.

    Raises:
      ValueError: If it is anything else, or an empty text.

    Example:
      >>> reference_text([" 42 "]), reference_text(27.0)
      ('42', '27.0')
    """
    if isinstance(reference, list | tuple) and len(reference) == 1:
        [reference] = reference
    if isinstance(reference, bool) or not isinstance(reference, str | int | float):
        raise ValueError(
            "reference: expected a text, a number or a list of one of them, got "
            f"{type(reference).__name__} {reference!r:.80}; name the column that holds the answer"
        )
    if not (text := str(reference).strip()):
        raise ValueError("reference: expected an answer, got an empty text; leave this row out")
    return text
