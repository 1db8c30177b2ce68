"""The result of an evaluation."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

__all__ = ["EvalResult", "Preview", "wilson_interval"]


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
      previews: A few completions.
      seconds: Duration of the evaluation.
    """

    nll: float
    token_accuracy: float
    tokens: int
    questions: int = 0
    correct: int = 0
    finished: int = 0
    previews: tuple[Preview, ...] = ()
    seconds: float = 0.0

    @property
    def accuracy(self) -> float | None:
        """Share of questions answered correctly; None without questions."""
        return self.correct / self.questions if self.questions else None

    @property
    def accuracy_interval(self) -> tuple[float, float] | None:
        """The 95 % Wilson interval of `accuracy`; None without questions."""
        return wilson_interval(self.correct, self.questions) if self.questions else None

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
        """A dict that `from_json` reads back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> EvalResult:
        """The result that `to_json` wrote.

        Example:
          >>> import json
          >>> result = EvalResult(nll=1.5, token_accuracy=0.5, tokens=8)
          >>> EvalResult.from_json(json.loads(json.dumps(result.to_json()))) == result
          True
        """
        previews = tuple(Preview(**preview) for preview in saved["previews"])
        return cls(**{**saved, "previews": previews})


def wilson_interval(correct: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """The Wilson score interval of a share, at 95 % unless `z` says otherwise.

    Raises:
      ValueError: If not `0 <= correct <= total` with `total >= 1`.

    Example:
      >>> low, high = wilson_interval(64, 256)
      >>> round(low, 3), round(high, 3)
      (0.201, 0.306)

    References:
      Wilson, Probable Inference, the Law of Succession, and Statistical Inference, 1927.
    """
    if not 0 <= correct <= total or total < 1:
        raise ValueError(f"expected 0 <= correct <= total and total >= 1: got {correct}, {total}")
    share = correct / total
    scale = 1 + z**2 / total
    center = (share + z**2 / (2 * total)) / scale
    half = z * math.sqrt(share * (1 - share) / total + z**2 / (4 * total**2)) / scale
    return max(0.0, center - half), min(1.0, center + half)
