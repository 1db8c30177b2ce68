"""Checks of config values, with messages that name the key."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence

from ranktuner_jax.errors import UserError

__all__ = ["at_least", "one_of", "suggestion"]


def one_of(name: str, value: str, known: Collection[str]) -> None:
    """Raises UserError if a value is not one of the known ones; suggests the closest."""
    if value not in list(known):  # A list, since the value may be unhashable.
        raise UserError(
            f"{name}: expected one of {', '.join(known)}, got {value!r}"
            f"{suggestion(str(value), list(known))}"
        )


def at_least(name: str, value: float, least: float) -> None:
    """Raises UserError if a value is below the minimum."""
    if value < least:
        raise UserError(f"{name}: expected at least {least}, got {value}")


def suggestion(word: str, known: Sequence[str]) -> str:
    """A "did you mean" suffix for an error message; "" if no known name is close.

    Example:
      >>> suggestion("sed", ["seed", "model"])
      '; did you mean seed?'
    """
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""
