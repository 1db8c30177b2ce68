"""The graders, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ranktuner_jax.evals.graders.choice import choice
from ranktuner_jax.evals.graders.exact import exact
from ranktuner_jax.evals.graders.mathematics import math
from ranktuner_jax.evals.graders.number import number
from ranktuner_jax.evals.sandbox import grade_python

__all__ = ["GRADERS", "Grader"]

Grader = Callable[[str, Any], bool]
"""Whether a whole completion is right, given the reference answer as the data has it.

It raises ValueError for a reference that it cannot use, and returns for every completion.
"""

GRADERS: dict[str, Grader] = {
    "choice": choice,
    "exact": exact,
    "math": math,
    "number": number,
    "python": grade_python,
}
"""Graders by name; one line registers your own: `evals.GRADERS["mine"] = my_grader`."""
