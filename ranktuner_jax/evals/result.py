"""The result of an evaluation."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from ranktuner_jax.evals.statistics import mean_interval

__all__ = ["EvalResult", "Preview"]


@dataclasses.dataclass(frozen=True)
class Preview:
    """One question with the reference answer and the model's completion."""

    question: str
    expected: str
    completion: str
    correct: bool


@dataclasses.dataclass(frozen=True)
class EvalResult:
    """Likelihood of the held-out rows and, with a task, accuracy on the held-out questions.

    Attributes:
      nll: Mean negative log-likelihood of a supervised token in nats, unweighted.
      token_accuracy: Share of supervised tokens that are the model's first choice.
      tokens: Supervised tokens scored.
      questions: Questions answered; 0 without a task.
      correct: Answers that the task's scorer accepts.
      finished: Completions that reached a stop token.
      right: For each question whether its answer is correct.
      digest: Identifies the questions: the same in evaluations of the same ones; "" without any.
      previews: A few completions.
      seconds: Duration of the evaluation.
    """

    nll: float
    token_accuracy: float
    tokens: int
    questions: int = 0
    correct: int = 0
    finished: int = 0
    right: tuple[bool, ...] = ()
    digest: str = ""
    previews: tuple[Preview, ...] = ()
    seconds: float = 0.0

    @property
    def accuracy(self) -> float | None:
        """Share of questions answered correctly; None without questions."""
        return self.correct / self.questions if self.questions else None

    @property
    def accuracy_interval(self) -> tuple[float, float] | None:
        """The 95 % interval of `accuracy` on questions like these; None without questions."""
        if not self.questions:
            return None
        return mean_interval([1.0] * self.correct + [0.0] * (self.questions - self.correct))

    def metrics(self) -> dict[str, float]:
        """Numbers for a log.

        Example:
          >>> EvalResult(nll=0.0, token_accuracy=1.0, tokens=9).metrics()
          {'nll': 0.0, 'perplexity': 1.0, 'token_accuracy': 1.0}
        """
        numbers = {
            "nll": self.nll,
            # exp of a diverged model's nll does not fit into a float.
            "perplexity": math.exp(min(self.nll, 700.0)),
            "token_accuracy": self.token_accuracy,
        }
        if self.accuracy is not None and self.accuracy_interval is not None:
            low, high = self.accuracy_interval
            numbers |= {
                "accuracy": self.accuracy,
                "accuracy_low": low,
                "accuracy_high": high,
                "finished": self.finished / self.questions,
            }
        return numbers

    def to_json(self) -> dict[str, Any]:
        """A dict that `from_json` reads back; `right` is a string of 0 and 1.

        Example:
          >>> result = EvalResult(nll=1.5, token_accuracy=0.5, tokens=8, right=(True, False))
          >>> result.to_json()["right"]
          '10'
        """
        return dataclasses.asdict(self) | {"right": "".join("01"[right] for right in self.right)}

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> EvalResult:
        """The result that `to_json` wrote.

        Example:
          >>> import json
          >>> result = EvalResult(nll=1.5, token_accuracy=0.5, tokens=8, right=(True, False))
          >>> EvalResult.from_json(json.loads(json.dumps(result.to_json()))) == result
          True
        """
        previews = tuple(Preview(**preview) for preview in saved["previews"])
        right = tuple(digit == "1" for digit in saved.get("right", ""))
        return cls(**{**saved, "previews": previews, "right": right})
