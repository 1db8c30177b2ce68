"""What is measured of one run of a comparison."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

__all__ = ["Outcome"]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What was measured of one run.

    Attributes:
      method: The method as on the command line, such as "ranktuner:base=one".
      normalize: What its loss is divided by, the number of tokens or the sum of their weights.
      rate: The peak learning rate.
      seed: The seed of the order of the data.
      role: "search" for the runs that choose the learning rate, "main" for those that count.
      metrics: Plain held-out "nll" in nats and "token_accuracy"; "retention_nll" if text of before
        is scored; of training, "grad_norm" (the mean over the steps, before clipping), "clip_share"
        (of the steps), "seconds" of all steps, and "memory_gb", what the compiled step needs on a
        device. Those that are not known are left out.
      scores: By task and statistic, such as "target/pass@1", one value in [0, 1] for each question.
      digests: By task, what identifies its questions: the same in two runs that answer the same.
      curves: Values of training, by name, at the steps under "step".

    Example:
      >>> outcome = Outcome("sft", "tokens", 1e-4, 0, "main", {"nll": 1.5},
      ...                   {"target/pass@1": (1.0, 0.0)}, {"target": "5f1a"}, {"step": (1.0, 2.0)})
      >>> Outcome.from_json(outcome.to_json()) == outcome
      True
    """

    method: str
    normalize: Literal["tokens", "weights"]
    rate: float
    seed: int
    role: Literal["search", "main"]
    metrics: Mapping[str, float]
    scores: Mapping[str, Sequence[float]]
    digests: Mapping[str, str]
    curves: Mapping[str, Sequence[float]]

    def to_json(self) -> dict[str, Any]:
        """A dict of JSON types."""
        fields = dict(vars(self))
        for name in ("scores", "curves"):
            fields[name] = {key: list(values) for key, values in fields[name].items()}
        # JSON has no NaN and no infinity, which a run that diverged may have.
        metrics = {k: v if math.isfinite(v) else None for k, v in self.metrics.items()}
        return fields | {"metrics": metrics, "digests": dict(self.digests)}

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> Outcome:
        """The outcome that `to_json` wrote."""
        fields = dict(saved)
        for name in ("scores", "curves"):
            fields[name] = {key: tuple(values) for key, values in fields[name].items()}
        metrics = {k: math.nan if v is None else v for k, v in fields["metrics"].items()}
        fields["metrics"] = metrics
        return cls(**fields)
