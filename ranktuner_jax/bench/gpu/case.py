"""One thing to be measured, whose failure is a result too."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from ranktuner_jax.bench.records import Record

__all__ = ["ALLOWED", "ERROR", "Case"]

# The ends of the names of an error and of the largest that is right; the beginnings are the same.
ERROR, ALLOWED = "error", "allowed"


@dataclasses.dataclass(frozen=True)
class Case:
    """One thing to be measured.

    Attributes:
      setting: What the cases of a table have in common.
      name: What is measured.
      dtype: The type of its matrix products.
      measure: Measures it, and returns figures as a `Record` has them. Each figure whose name ends
        in "error" must not be above the one whose name ends in "allowed" instead.

    Example:
      >>> Case("sums", "a", "float32", lambda: {"error": 0.1, "allowed": 0.01}).run().failed
      'error 0.1, expected at most 0.01'
      >>> Case("sums", "b", "float32", lambda: {"error": 1 / 0}).run().failed
      'ZeroDivisionError: division by zero'
    """

    setting: str
    name: str
    dtype: str
    measure: Callable[[], Mapping[str, float | None]]

    def run(self) -> Record:
        """The record; one that says why if it cannot be measured, or is wrong."""
        figures: Mapping[str, float | None] = {}
        try:
            figures = self.measure()
            failed = _wrong(figures)
        # Whatever it is, such as memory that ran out, the other cases go on.
        except Exception as error:
            lines = str(error).splitlines() or [""]
            failed = f"{type(error).__name__}: {lines[0]}"
        return Record("gpu", self.setting, self.name, figures, self.dtype, failed)


def _wrong(figures: Mapping[str, float | None]) -> str:
    """The errors that are too large, a NaN among them."""
    found = []
    for name, value in figures.items():
        if name.endswith(ERROR):
            limit = figures[name.removesuffix(ERROR) + ALLOWED]
            if value is None or limit is None or not value <= limit:
                found.append(f"{name} {value:.2g}, expected at most {limit:.2g}")
    return "; ".join(found)
