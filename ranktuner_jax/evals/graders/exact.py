"""Grades by equal text."""

from __future__ import annotations

import re
from typing import Any

from ranktuner_jax.evals.answers import announced, last_box
from ranktuner_jax.evals.graders.reference import reference_text

__all__ = ["exact"]

_HASHES = re.compile(r"####[^\S\n]*(.*)")


def exact(completion: str, reference: Any) -> bool:
    r"""Whether the final answer is the reference, letter for letter but for white space.

    The final answer is the first of these that the completion has: what its last `\boxed{}`
    holds; the line after its last `####`; the line after its last "answer is" or "answer:", with
    or without the full stop that ends it; its last line or the whole of it.

    Raises:
      ValueError: If the reference is not a text, a number or a list of one of them, or is empty.

    Example:
      >>> exact("The largest is France.\nThe answer is  New   York.", "New York")
      True
      >>> exact("The answer is new york.", "New York")
      False
    """
    return _squeezed(reference_text(reference)) in map(_squeezed, _final_answers(completion))


def _squeezed(text: str) -> str:
    return " ".join(text.split())


def _final_answers(completion: str) -> list[str]:
    """The readings of the final answer."""
    if (box := last_box(completion)) is not None:
        return [box]
    if lines := _HASHES.findall(completion):
        return [lines[-1]]
    if (sentence := announced(completion)) is not None:
        line = sentence.partition("\n")[0].strip()
        return [line, line.removesuffix(".")]
    return [completion, *completion.strip().splitlines()[-1:]]
