"""Running programs that a model wrote: limits on what they touch, and verdicts on them."""

from ranktuner_jax.evals.sandbox.grader import grade_python
from ranktuner_jax.evals.sandbox.programs import (
    Program,
    Verdict,
    check_python,
    check_python_many,
    run_python,
)

__all__ = [
    "Program",
    "Verdict",
    "check_python",
    "check_python_many",
    "grade_python",
    "run_python",
]
