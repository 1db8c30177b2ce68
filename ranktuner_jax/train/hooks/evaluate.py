"""Evaluation during training and after the last step."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ranktuner_jax import evals, models
from ranktuner_jax.train.hooks.hook import Hook
from ranktuner_jax.train.telemetry.step_log import prefixed

if TYPE_CHECKING:
    from ranktuner_jax.train.trainer import Trainer

__all__ = ["Evaluate"]


class Evaluate(Hook):
    """Evaluates the model and logs the result as eval/nll, eval/accuracy and so on.

    Args:
      evaluate: Takes the model and a progress callback, which it calls with the number of items
        done and their total, such as `HeldOut.evaluate`.
      size: A description of the evaluation data, printed before each evaluation; "" for none.
      every: Steps between evaluations; 0 evaluates at the end only.

    Attributes:
      result: The latest result; None before the first.
    """

    def __init__(
        self,
        evaluate: Callable[[models.Decoder, Callable[[int, int], None]], evals.EvalResult],
        *,
        size: str = "",
        every: int = 0,
    ) -> None:
        super().__init__(every=every)
        self._evaluate, self._size = evaluate, size
        self.result: evals.EvalResult | None = None

    def __call__(self, trainer: Trainer) -> None:
        """Evaluates; a stop signal aborts it."""
        if self._size:
            trainer.say(f"evaluating: {self._size}")
        self.result = self._evaluate(trainer.model, trainer.evaluating)
        trainer.log(prefixed("eval", self.result.metrics()))
