"""What the answers to a benchmark come to: pass@k with intervals, lengths and time."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ranktuner_jax.errors import UserError
from ranktuner_jax.evals.samples import Sample
from ranktuner_jax.evals.statistics import mean_interval, paired_difference, pass_at_k

__all__ = [
    "CHOICE_SCORES",
    "Difference",
    "Scores",
    "Share",
    "compare_scores",
    "score_samples",
    "which_k",
]


CHOICE_SCORES = ("accuracy", "accuracy_per_character")
"""The scores of choices that are compared by likelihood."""


class Share(NamedTuple):
    """A mean over questions, with its 95 % interval over questions like these."""

    value: float
    low: float
    high: float


class Difference(NamedTuple):
    """How much higher a share is than another one of the same questions, with its interval."""

    value: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Scores:
    """The scores of one benchmark.

    Attributes:
      questions: Questions answered.
      samples: Answers to each.
      shares: "pass@1", which is the mean over the samples, "pass@2" and so on; of choices that are
        compared by likelihood "accuracy" and "accuracy_per_character".
      by_question: The same for each question.
      finished: Share of answers that ended by themselves.
      mean_tokens: Mean length of an answer.
      seconds: Time that the answers took.
    """

    questions: int
    samples: int
    shares: Mapping[str, Share]
    by_question: Mapping[str, Sequence[float]]
    finished: float
    mean_tokens: float
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """A dict of JSON types."""
        fields = dataclasses.asdict(self)
        fields["shares"] = {name: share._asdict() for name, share in self.shares.items()}
        return fields

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> Scores:
        """The scores that `to_json` wrote."""
        shares = {name: Share(**share) for name, share in saved["shares"].items()}
        return cls(**{**saved, "shares": shares})


def which_k(samples: int, wanted: Sequence[int] = ()) -> tuple[int, ...]:
    """The values of k for which pass@k is given.

    Args:
      samples: Answers to each question.
      wanted: What a user asked for; the powers of 2 up to `samples` if empty.

    Raises:
      UserError: If one is below 1 or above `samples`.

    Example:
      >>> which_k(16), which_k(3)
      ((1, 2, 4, 8, 16), (1, 2))
    """
    for k in wanted:
        if not 1 <= k <= samples:
            raise UserError(
                f"--k: expected numbers from 1 to the {samples} samples of a question, got {k}; "
                "raise --samples, or leave it out"
            )
    return tuple(wanted) or tuple(1 << n for n in range(samples.bit_length()))


def score_samples(samples: Sequence[Sample], ks: Sequence[int] = (1,)) -> Scores:
    """The scores of graded samples.

    Args:
      samples: All of one benchmark, graded, with equally many of each question.
      ks: The values of k.

    Example:
      >>> graded = [Sample("sums", q, s, "4", correct=q == s) for q in (0, 1) for s in (0, 1)]
      >>> score_samples(graded, [1, 2]).by_question
      {'pass@1': [0.5, 0.5], 'pass@2': [1.0, 1.0]}
    """
    by_question: dict[int, list[Sample]] = defaultdict(list)
    for sample in samples:
        by_question[sample.question].append(sample)
    questions = [by_question[index] for index in sorted(by_question)]
    if samples[0].log_likelihoods:
        plain, per_character = CHOICE_SCORES
        values = {
            plain: [float(bool(one.correct)) for [one] in questions],
            per_character: [float(bool(one.correct_per_character)) for [one] in questions],
        }
    else:
        values = {
            f"pass@{k}": [
                pass_at_k(len(group), sum(bool(one.correct) for one in group), k)
                for group in questions
            ]
            for k in ks
        }
    return Scores(
        questions=len(questions),
        samples=len(questions[0]),
        shares={
            name: Share(sum(each) / len(each), *mean_interval(each))
            for name, each in values.items()
        },
        by_question=values,
        finished=sum(sample.finished for sample in samples) / len(samples),
        mean_tokens=sum(sample.tokens for sample in samples) / len(samples),
        seconds=max(sample.seconds for sample in samples),
    )


def compare_scores(scores: Scores, other: Scores) -> dict[str, Difference]:
    """How much higher the shares are than those of another evaluation of the same questions.

    Example:
      >>> graded = [Sample("sums", q, 0, "4", correct=q > 0) for q in range(40)]
      >>> before = [dataclasses.replace(sample, correct=sample.question > 20) for sample in graded]
      >>> compare_scores(score_samples(graded), score_samples(before))["pass@1"].value
      0.5
    """
    return {
        name: Difference(*paired_difference(values, other.by_question[name]))
        for name, values in scores.by_question.items()
        if name in other.by_question
    }
