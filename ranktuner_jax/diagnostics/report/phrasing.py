"""Numbers and lists as they stand in a sentence."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["counted", "listed", "number", "ordinal", "percent"]

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def percent(share: float) -> str:
    """A share for people; small and nearly whole ones are not rounded away.

    Example:
      >>> [percent(x).replace("\N{NO-BREAK SPACE}", " ") for x in (0, 0.0004, 0.0421, 0.9996)]
      ['0 %', 'under 0.1 %', '4.2 %', 'over 99.9 %']
    """
    if 0 < share < 0.001:
        return "under 0.1\u00a0%"
    if 0.999 < share < 1:
        return "over 99.9\u00a0%"
    hundred = 100 * share
    exact = f"{hundred:.1f}" if hundred < 9.95 or 99 < hundred < 100 else f"{hundred:.0f}"
    return exact.removesuffix(".0") + "\u00a0%"


def number(value: float) -> str:
    """A number to three digits, in powers of ten where it is small.

    Example:
      >>> [number(x) for x in (0.0, 0.00012345, 0.5, 12.345, 1234.5)]
      ['0', '1.23×10⁻⁴', '0.5', '12.3', '1,234']
    """
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) < 1e-3:
        digits, power = f"{value:.2e}".split("e")
        return f"{digits}×10{str(int(power)).translate(_SUPERSCRIPTS)}"
    return np.format_float_positional(value, 3, fractional=False, trim="-")


def counted(count: int, noun: str) -> str:
    """A number of things.

    Example:
      >>> counted(1, "token"), counted(1200, "token")
      ('1 token', '1,200 tokens')
    """
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def listed(parts: Sequence[str]) -> str:
    """Parts of a sentence, joined.

    Example:
      >>> listed(["a"]), listed(["a", "b"]), listed(["a", "b", "c"])
      ('a', 'a and b', 'a, b and c')
    """
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def ordinal(count: int) -> str:
    """A position in a row.

    Example:
      >>> ordinal(2), ordinal(11), ordinal(23)
      ('2nd', '11th', '23rd')
    """
    ends = {1: "st", 2: "nd", 3: "rd"}
    return f"{count:,}{'th' if 10 <= count % 100 <= 20 else ends.get(count % 10, 'th')}"
