"""What a comparison comes to: each method's means, and its paired differences from the baseline."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from ranktuner_jax.compare.outcome import Outcome
from ranktuner_jax.compare.search import Rate, searched
from ranktuner_jax.compare.statistics import (
    difference_interval,
    holm,
    p_value,
    share_interval,
    t_interval,
)
from ranktuner_jax.errors import UserError

__all__ = [
    "OVER_BOTH",
    "OVER_QUESTIONS",
    "OVER_SEEDS",
    "Analysis",
    "Curve",
    "Estimate",
    "Measured",
    "MethodResult",
    "analyse",
]

OVER_SEEDS = "seeds"
OVER_BOTH = "seeds and questions"
OVER_QUESTIONS = "questions"

_CURVE_POINTS = 50

# The direction that is better, of quantities that have one; of scores it is up.
_GOOD = {"nll": -1, "token_accuracy": 1, "retention_nll": -1}

Runs: TypeAlias = Mapping[int, Outcome]
"""The runs of a method that count, by seed."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Attributes:
      value: The mean.
      low: The lower end of its 95 % interval; None where one seed allows none.
      high: The upper end.
      by_seed: Each seed's value.
    """

    value: float
    low: float | None
    high: float | None
    by_seed: Mapping[int, float]

    def outside(self, point: float) -> bool:
        """Whether the interval leaves a point out."""
        return self.low is not None and self.high is not None and not self.low <= point <= self.high


@dataclasses.dataclass(frozen=True)
class Measured:
    """One quantity of one method.

    Attributes:
      mean: Over all of the method's seeds.
      difference: The method's minus the baseline's, over the seeds that both have; None for the
        baseline, and where no seed is shared.
      over: What the intervals count as drawn at random: `OVER_SEEDS` (of each, with its own
        questions if it is a score), `OVER_BOTH` (all seeds share their questions), or
        `OVER_QUESTIONS` (a score of one seed).
      questions: How many different questions a score is over; 0 for other quantities.
    """

    mean: Estimate
    difference: Estimate | None
    over: str
    questions: int


@dataclasses.dataclass(frozen=True)
class Curve:
    """The plain NLL of training: the mean over seeds, and the lowest and highest seed."""

    step: Sequence[float]
    mean: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


@dataclasses.dataclass(frozen=True)
class MethodResult:
    """The result of one method.

    Attributes:
      method: As on the command line.
      normalize: What its loss is divided by.
      rate: The learning rate of its runs.
      seeds: Its seeds.
      pairs: How many of them the baseline has, too.
      measured: By name, scores first.
      p: The p-value of the primary difference; None for the baseline, and with less than two pairs.
      p_holm: The same, adjusted for the number of methods.
      search: The learning rates that were searched, in increasing order.
      curve: Of training; None if the runs kept none.
    """

    method: str
    normalize: str
    rate: float
    seeds: Sequence[int]
    pairs: int
    measured: Mapping[str, Measured]
    p: float | None
    p_holm: float | None
    search: Sequence[Rate]
    curve: Curve | None

    @property
    def at_edge(self) -> bool:
        """Whether a better rate may lie beyond those that were searched."""
        searched = [one.rate for one in self.search]
        return len(searched) > 1 and self.rate in (searched[0], searched[-1])

    def verdict(self, name: str, primary: str) -> str:
        """What the interval of a difference carries: "better", "worse" or "no difference seen".

        For the primary score it is what is left after Holm's adjustment. "" where there is nothing
        to say: for the baseline, with one seed, and where neither direction is good in itself.
        """
        one = self.measured[name]
        if one.difference is None or len(one.difference.by_seed) < 2:
            return ""
        if not one.questions and name not in _GOOD:
            return ""
        if name == primary:
            seen = self.p_holm is not None and self.p_holm < 0.05
        else:
            seen = one.difference.outside(0)
        if not seen:
            return "no difference seen"
        return "better" if one.difference.value * _GOOD.get(name, 1) > 0 else "worse"


@dataclasses.dataclass(frozen=True)
class Analysis:
    """The result of a comparison.

    Attributes:
      primary: The score that decides.
      baseline: The method that the others are compared with.
      seeds: All seeds of the runs that count.
      groups: The methods in the order of their runs, by what their loss is divided by: "tokens",
        the main analysis, and "weights", a second one, where it was asked for. Each begins with the
        baseline, and has a Holm adjustment of its own.
    """

    primary: str
    baseline: str
    seeds: Sequence[int]
    groups: Mapping[str, Sequence[MethodResult]]

    @property
    def scores(self) -> list[str]:
        """The names of all scores, the primary one first."""
        found = {
            name: None
            for methods in self.groups.values()
            for method in methods
            for name, one in method.measured.items()
            if one.questions
        }
        return sorted(found, key=lambda name: name != self.primary)

    def to_json(self) -> dict[str, Any]:
        """A dict of JSON types; seeds, which are keys there, become strings."""
        fields = dataclasses.asdict(self)
        for methods in fields["groups"].values():
            for method in methods:
                for one in method["measured"].values():
                    for estimate in (one["mean"], one["difference"]):
                        if estimate:
                            by_seed = estimate["by_seed"].items()
                            estimate["by_seed"] = {str(seed): value for seed, value in by_seed}
        return fields


def analyse(outcomes: Sequence[Outcome], *, primary: str, baseline: str = "sft") -> Analysis:
    """Compares methods over seeds.

    Of a score, each seed gives the mean over its questions, and of a difference the mean of the
    questions' differences; see `statistics.share_interval` for the intervals. Other quantities have
    Student's t interval over the seeds, and none with one seed. Only runs in the role "main" count;
    those in the role "search" give the table of learning rates.

    Args:
      outcomes: The runs. A method may lack seeds of others: differences are over what both have.
      primary: The score that decides, such as "target/pass@1".
      baseline: The method that the others are compared with.

    Raises:
      UserError: If the baseline has no runs, a method lacks the primary score or has runs of one
        seed twice or of two learning rates, or two runs of a pair answer different questions.

    Example:
      >>> def run(method, seed, right):
      ...     return Outcome(method, "tokens", 1e-4, seed, "main", {"nll": 1.0 + seed},
      ...                    {"sums/pass@1": [1.0] * right + [0.0] * (100 - right)},
      ...                    {"sums": f"held out by {seed}"}, {})
      >>> runs = [run("sft", 0, 50), run("sft", 1, 52), run("sft", 2, 48),
      ...         run("dft", 0, 60), run("dft", 1, 61), run("dft", 2, 59)]
      >>> _, dft = analyse(runs, primary="sums/pass@1").groups["tokens"]
      >>> difference = dft.measured["sums/pass@1"].difference
      >>> round(difference.value, 3), round(difference.low, 3), round(difference.high, 3)
      (0.1, 0.064, 0.136)
      >>> dft.p_holm < 0.05
      True
    """
    main = [outcome for outcome in outcomes if outcome.role == "main"]
    found: dict[tuple[str, str], dict[int, Outcome]] = defaultdict(dict)
    for outcome in main:
        runs = found[outcome.normalize, outcome.method]
        if outcome.seed in runs:
            raise UserError(f"{outcome.method}: expected one run of seed {outcome.seed}, got two")
        runs[outcome.seed] = outcome
    base = found.get(("tokens", baseline))
    if not base:
        raise UserError(
            f"expected runs of {baseline}, which the methods are compared with, got none; finish "
            "the comparison first"
        )
    groups: dict[str, list[MethodResult]] = {}
    for (normalize, _), runs in found.items():
        if normalize not in groups:
            groups[normalize] = [_result(base, None, primary, outcomes)]
        if runs is not base:
            groups[normalize].append(_result(runs, base, primary, outcomes))
    return Analysis(
        primary=primary,
        baseline=baseline,
        seeds=sorted({outcome.seed for outcome in main}),
        # The main analysis first.
        groups={name: _adjusted(groups[name]) for name in sorted(groups)},
    )


def _result(
    runs: Runs, base: Runs | None, primary: str, outcomes: Iterable[Outcome]
) -> MethodResult:
    method, normalize = next((outcome.method, outcome.normalize) for outcome in runs.values())
    rates = sorted({outcome.rate for outcome in runs.values()})
    if len(rates) > 1:
        raise UserError(
            f"{method}: expected runs of one learning rate, got {', '.join(map(str, rates))}"
        )
    for seed, outcome in runs.items():
        if primary not in outcome.scores:
            raise UserError(
                f"{method}, seed {seed}: expected the primary score {primary}, got "
                f"{', '.join(outcome.scores) or 'no scores'}"
            )
    scores = dict.fromkeys(name for outcome in runs.values() for name in outcome.scores)
    metrics = dict.fromkeys(name for outcome in runs.values() for name in outcome.metrics)
    primary_pairs = _pairs(primary, runs, base)
    return MethodResult(
        method=method,
        normalize=normalize,
        rate=rates[0],
        seeds=sorted(runs),
        pairs=len(primary_pairs.seeds),
        measured={name: _score(name, runs, base) for name in scores}
        | {name: _metric(name, runs, base) for name in metrics if _finite(name, runs)},
        p=p_value(primary_pairs.interval) if len(primary_pairs.seeds) > 1 else None,
        p_holm=None,
        search=searched(outcomes, method, normalize, primary),
        curve=_curve(list(runs.values())),
    )


def _score(name: str, runs: Runs, base: Runs | None) -> Measured:
    having = {seed: runs[seed] for seed in sorted(runs) if name in runs[seed].scores}
    crossed = _crossed(name, having)
    values = {seed: outcome.scores[name] for seed, outcome in having.items()}
    mean = _estimate(
        {seed: _mean(of_seed) for seed, of_seed in values.items()},
        share_interval(list(values.values()), crossed=crossed),
    )
    pairs = _pairs(name, runs, base)
    difference = _estimate(pairs.by_seed(), pairs.interval()) if pairs.seeds else None
    over = OVER_QUESTIONS if len(having) == 1 else OVER_BOTH if crossed else OVER_SEEDS
    sizes = [len(of_seed) for of_seed in values.values()]
    return Measured(mean, difference, over, sizes[0] if crossed else sum(sizes))


class _Pairs(NamedTuple):
    """The values of a score that two methods have for the same seeds and questions."""

    seeds: Sequence[int]
    a: Sequence[Sequence[float]]
    b: Sequence[Sequence[float]]
    crossed: bool

    def by_seed(self) -> dict[int, float]:
        return {
            seed: _mean(a) - _mean(b) for seed, a, b in zip(self.seeds, self.a, self.b, strict=True)
        }

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        return difference_interval(self.a, self.b, crossed=self.crossed, confidence=confidence)


def _pairs(name: str, runs: Runs, base: Runs | None) -> _Pairs:
    seeds = sorted(
        seed
        for seed in runs.keys() & (base or {}).keys()
        if base and name in runs[seed].scores and name in base[seed].scores
    )
    if not base or not seeds:
        return _Pairs([], [], [], False)
    task = _task(name)
    for seed in seeds:
        if runs[seed].digests[task] != base[seed].digests[task]:
            raise UserError(
                f"{runs[seed].method}, seed {seed}: expected the questions of {task} that the "
                "baseline answers with this seed, got others; compare runs on the same questions"
            )
    return _Pairs(
        seeds,
        [runs[seed].scores[name] for seed in seeds],
        [base[seed].scores[name] for seed in seeds],
        _crossed(name, {seed: runs[seed] for seed in seeds}),
    )


def _metric(name: str, runs: Runs, base: Runs | None) -> Measured:
    values, others = _finite(name, runs), _finite(name, base or {})
    differences = {seed: values[seed] - others[seed] for seed in values if seed in others}
    return Measured(
        _over_seeds(values), _over_seeds(differences) if differences else None, OVER_SEEDS, 0
    )


def _finite(name: str, runs: Runs) -> dict[int, float]:
    """A quantity by seed, without those of runs that do not have it or that diverged."""
    return {
        seed: runs[seed].metrics[name]
        for seed in sorted(runs)
        if math.isfinite(runs[seed].metrics.get(name, math.nan))
    }


def _over_seeds(values: Mapping[int, float]) -> Estimate:
    interval = t_interval(list(values.values())) if len(values) > 1 else (None, None)
    return _estimate(values, interval)


def _estimate(
    by_seed: Mapping[int, float], interval: tuple[float, float] | tuple[None, None]
) -> Estimate:
    low, high = interval
    return Estimate(_mean(list(by_seed.values())), low, high, by_seed)


def _task(score: str) -> str:
    return score.rpartition("/")[0]


def _crossed(score: str, runs: Runs) -> bool:
    """Whether all runs answer the same questions, and not each its own.

    Raises:
      UserError: If only some share theirs.
    """
    digests = [outcome.digests[_task(score)] for outcome in runs.values()]
    if 1 < len(set(digests)) < len(digests):
        raise UserError(
            f"{_task(score)}: expected the same questions for all seeds, or others for each, got "
            f"{len(set(digests))} sets for {len(digests)} seeds"
        )
    return len(set(digests)) == 1


def _curve(runs: Sequence[Outcome]) -> Curve | None:
    """At the steps that all runs recorded, thinned to means over neighbouring ones."""
    recorded = [run.curves for run in runs]
    series = [dict(zip(c.get("step", ()), c.get("nll", ()), strict=True)) for c in recorded]
    steps = sorted(set.intersection(*(set(one) for one in series)))
    if not steps:
        return None
    values = np.array([[one[step] for step in steps] for one in series])
    parts = np.array_split(np.arange(len(steps)), min(_CURVE_POINTS, len(steps)))
    thinned = np.stack([values[:, part].mean(1) for part in parts], axis=1)
    return Curve(
        [float(np.mean([steps[i] for i in part])) for part in parts],
        *(
            [float(value) for value in row]
            for row in (thinned.mean(0), thinned.min(0), thinned.max(0))
        ),
    )


def _adjusted(methods: Sequence[MethodResult]) -> list[MethodResult]:
    """With Holm's adjustment over the methods that have a p-value."""
    tested = [method for method in methods if method.p is not None]
    adjusted = iter(holm([method.p for method in tested if method.p is not None]))
    return [
        method if method.p is None else dataclasses.replace(method, p_holm=next(adjusted))
        for method in methods
    ]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
