"""The settings of an evaluation."""

from __future__ import annotations

import dataclasses

from ranktuner_jax.errors import UserError
from ranktuner_jax.evals.tasks import TASKS

__all__ = ["EvalConfig"]


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """What is evaluated, and when.

    Attributes:
      every_steps: Training steps between evaluations; 0 for before and after training only.
      split: The held-out split of the data.
      rows: Maximum number of rows of the split to score for the negative log-likelihood.
      batch_size: Rows scored together; raised to at least one per device.
      task: A name in `TASKS`, whose scorer grades greedy completions: chain_sum, gsm_symbolic,
        exact (equal to the row's `answer`), number, math, choice or python (the graders of
        `ranktuner eval --tasks`), auto (compared with `answer`, in rows that have one) or one that
        you registered; empty for none.
      examples: Maximum number of questions of the split to answer.
      prompts_per_batch: The most questions to answer together; raised to at least one per device.
      cache_gb: Memory for their keys and values on each device, in GB, which may hold fewer.
      max_new_tokens: Maximum length of a completion, in tokens.
      previews: Completions kept for people to read.
    """

    every_steps: int = 0
    split: str = "test"
    rows: int = 256
    batch_size: int = 16
    task: str = ""
    examples: int = 256
    prompts_per_batch: int = 64
    cache_gb: float = 1.0
    max_new_tokens: int = 32
    previews: int = 3

    def __post_init__(self) -> None:
        if self.task and self.task not in TASKS:
            raise UserError(
                f"eval.task: expected one of {', '.join(TASKS)}, or '' for none, got {self.task!r}"
            )
        for name in ("rows", "batch_size", "examples", "prompts_per_batch", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"eval.{name}: expected at least 1, got {getattr(self, name)}")
        if not self.cache_gb > 0:
            raise UserError(f"eval.cache_gb: expected more than 0, got {self.cache_gb}")
        for name in ("every_steps", "previews"):
            if getattr(self, name) < 0:
                raise UserError(f"eval.{name}: expected at least 0, got {getattr(self, name)}")
