"""Grades by the value of one number."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

from ranktuner_jax.evals.answers import marked_passages
from ranktuner_jax.evals.graders.reference import reference_text

__all__ = ["number"]

_DECIMAL = r"(?:(?:\d{1,3}(?:,\d{3}(?!\d))+|\d+)(?:\.\d+)?|\.\d+)"
_NUMBER = re.compile(rf"(?<![\w.])(-?{_DECIMAL})(?:/({_DECIMAL}))?")
_FRAC = re.compile(r"\\[dtc]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
_THOUSANDS = re.compile(r"\{,\}|,\\!")


def number(completion: str, reference: Any) -> bool:
    r"""Whether the completion ends on the number that the reference is.

    The line after the last `####` is searched first, then what the last `\boxed{}` holds, then
    the line after the last "answer is", then the whole completion; the last number of the first
    of these that has one counts. Values are compared exactly: `1,200.00` is `1200`, `0.75` is
    `3/4` and `\frac{3}{4}`. Currency, percent signs and units around a number are ignored, so
    `50%` is 50 and not 0.5. Exponents (`1e5`) are not read: use the grader `math`.

    Args:
      completion: The whole completion.
      reference: A number, or a text that is one or ends on one in the same way (`#### 42`).

    Raises:
      ValueError: If the reference holds no number.

    Example:
      >>> number("6 * 200 = 1,200, so she earns $1,200.00.", "1200")
      True
      >>> number("42 is not it; the answer is 43.", "... so 42\n#### 42")
      False
    """
    wanted = _value(reference_text(reference))
    if wanted is None:
        raise ValueError(
            f"reference: expected a number, got {reference!r:.80}; "
            "use the grader math, choice or exact for other answers"
        )
    return _value(completion) == wanted


def _value(text: str) -> Fraction | None:
    """The number that a text ends on, or None."""
    text = _THOUSANDS.sub(",", _FRAC.sub(r"\1/\2", text)).replace("−", "-")
    for passage in [*marked_passages(text), text]:
        if found := _NUMBER.findall(passage):
            try:
                numerator, denominator = (
                    Fraction(part.replace(",", "") or 1) for part in found[-1]
                )
                return numerator / denominator
            except (ValueError, ZeroDivisionError):  # thousands of digits; n / 0
                return None
    return None
