"""The intervals cover what they promise, and agree with oracles in plain Python."""

import dataclasses
import functools
import itertools
import json
import math
import statistics
from collections.abc import Sequence

import numpy as np
import pytest
import scipy.stats

from ranktuner_jax.compare.analysis import (
    OVER_BOTH,
    OVER_QUESTIONS,
    OVER_SEEDS,
    Analysis,
    MethodResult,
    analyse,
)
from ranktuner_jax.compare.outcome import Outcome
from ranktuner_jax.compare.statistics import (
    LEAST_P,
    difference_interval,
    holm,
    p_value,
    share_interval,
    t_interval,
)
from ranktuner_jax.errors import UserError
from ranktuner_jax.evals import mean_interval, paired_difference
from tests.compare.results import PRIMARY, comparison, outcome

# Quantiles of Student's t at 97.5 %, from a printed table.
T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 7: 2.365}


def crossed_oracle(x: Sequence[Sequence[float]]) -> tuple[float, float]:
    """The two-way interval by loops, and that of t over the means, whichever is wider."""
    seeds, questions = len(x), len(x[0])
    mean = sum(sum(row) for row in x) / (seeds * questions)
    rows = [sum(row) / questions for row in x]
    columns = [sum(row[q] for row in x) / seeds for q in range(questions)]
    ms_seeds = questions * sum((row - mean) ** 2 for row in rows) / (seeds - 1)
    ms_questions = seeds * sum((column - mean) ** 2 for column in columns) / (questions - 1)
    rest = sum(
        (x[s][q] - rows[s] - columns[q] + mean) ** 2
        for s, q in itertools.product(range(seeds), range(questions))
    )
    total = ms_seeds + max(ms_questions - rest / ((seeds - 1) * (questions - 1)), 0)
    df = total**2 / (ms_seeds**2 / (seeds - 1))
    two_way = float(scipy.stats.t.ppf(0.975, df)) * math.sqrt(total / (seeds * questions))
    over_seeds = T[seeds - 1] * statistics.stdev(rows) / math.sqrt(seeds)
    half = max(two_way, over_seeds)
    return mean - half, mean + half


def test_the_interval_over_seeds_is_students() -> None:
    # By hand: mean 2, standard deviation 1, half width 4.303 / √3.
    assert t_interval([1.0, 2.0, 3.0]) == pytest.approx((2 - 2.4843, 2 + 2.4843), abs=1e-3)


def test_with_questions_of_their_own_seeds_that_differ_more_than_questions_decide(
    rng: np.random.Generator,
) -> None:
    seeds = [(rng.random(400) < share).astype(float) for share in (0.2, 0.5, 0.8, 0.4)]
    means = [float(seed.mean()) for seed in seeds]
    half = T[3] * statistics.stdev(means) / 2
    expected = max(0.0, statistics.mean(means) - half), statistics.mean(means) + half
    assert share_interval(seeds, crossed=False) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("spread", [0.0, 0.15])
@pytest.mark.parametrize("seeds", [2, 3, 8])
def test_on_shared_questions_the_interval_has_the_mean_squares_of_both(
    rng: np.random.Generator, seeds: int, spread: float
) -> None:
    shares = np.clip(
        0.5 + spread * rng.standard_normal((seeds, 1)) + 0.15 * rng.standard_normal((1, 60)), 0, 1
    )
    x = np.clip(shares + 0.1 * rng.standard_normal((seeds, 60)), 0, 1)
    low, high = crossed_oracle(x.tolist())
    question_low, question_high = mean_interval(x.mean(0))
    expected = max(0.0, min(low, question_low)), min(1.0, max(high, question_high))
    assert share_interval(list(x), crossed=True) == pytest.approx(expected, abs=2e-4)


def test_shared_questions_are_drawn_at_random_too(rng: np.random.Generator) -> None:
    # Seeds agree, and the questions are hard or easy: t over the seeds would see no doubt at all.
    hard = rng.random(50) < 0.5
    x = [np.where(rng.random(50) < 0.02, 1.0 - hard, hard) for _ in range(5)]
    low, high = share_interval(x, crossed=True)
    t_low, t_high = t_interval([float(seed.mean()) for seed in x])
    assert high - low > 4 * (t_high - t_low)
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(0.25 / 50), rel=0.2)


@pytest.mark.parametrize("crossed", [True, False])
def test_the_interval_is_never_narrower_than_over_seeds_or_over_questions(
    rng: np.random.Generator, crossed: bool
) -> None:
    for spread in (0.0, 0.01, 0.1, 0.3):
        for _ in range(20):
            shares = np.clip(0.5 + spread * rng.standard_normal((4, 1)), 0, 1)
            x = (rng.random((4, 30)) < shares).astype(float)
            low, high = share_interval(list(x), crossed=crossed)
            t_low, t_high = t_interval(x.mean(1))
            q_low, q_high = mean_interval(x.mean(0) if crossed else x.ravel())
            assert low <= max(0.0, min(t_low, q_low)) + 1e-12
            assert high >= min(1.0, max(t_high, q_high)) - 1e-12


@pytest.mark.parametrize("crossed", [True, False])
def test_seeds_without_any_difference_do_not_give_an_empty_interval(crossed: bool) -> None:
    right = [[1.0, 0.0] * 25] * 3
    low, high = difference_interval(right, right, crossed=crossed)
    assert low < 0 < high
    assert p_value(lambda c: difference_interval(right, right, crossed=crossed, confidence=c)) == 1


def test_one_seed_has_the_interval_over_its_questions(rng: np.random.Generator) -> None:
    a, b = (rng.random(80) < 0.6).astype(float), (rng.random(80) < 0.5).astype(float)
    _, low, high = paired_difference(a, b)
    assert difference_interval([a], [b], crossed=True) == pytest.approx((low, high))


def test_seeds_that_share_questions_have_as_many() -> None:
    with pytest.raises(ValueError, match=r"as many values in every seed.*got \[2, 3\]"):
        share_interval([[0.0, 1.0], [0.0, 1.0, 1.0]], crossed=True)


def simulated(
    rng: np.random.Generator, crossed: bool, seeds: int, questions: int, spread: float, gained: bool
) -> tuple[np.ndarray, np.ndarray, float]:
    """Answers [S, Q] of two methods, and the true difference of their means.

    Questions are right with a chance from 0.1 to 0.9, each seed of each method moves all chances by
    a normal amount, and the second method gains one question in 25 for good, or nothing.
    """
    chance = rng.uniform(0.1 + spread, 0.9 - spread, (1 if crossed else seeds, questions))
    # Uniform with the given standard deviation, so that no chance leaves 0 to 1.
    moved = math.sqrt(3) * spread / 2 * rng.uniform(-1, 1, (2, seeds, 1))
    b, a = (rng.random((2, seeds, questions)) < chance + moved).astype(float)
    if gained:
        a = np.where(rng.random(chance.shape) < 0.04, 1.0, a)
    return a, b, 0.04 * 0.5 * gained


@pytest.mark.parametrize("crossed", [True, False])
def test_differences_are_covered_for_few_seeds_and_questions(crossed: bool) -> None:
    rng = np.random.default_rng(0)
    missed = []
    for seeds, questions, spread, gained in itertools.product(
        (3, 5, 8), (50, 200), (0.0, 0.08), (False, True)
    ):
        covered = 0
        for _ in range(100):
            a, b, truth = simulated(rng, crossed, seeds, questions, spread, gained)
            low, high = difference_interval(list(a), list(b), crossed=crossed)
            covered += low <= truth <= high
        # An interval of 93 % coverage gets there once in 10,000 simulations.
        if covered < scipy.stats.binom.ppf(1e-4, 100, 0.93):
            missed.append((seeds, questions, spread, gained, covered))
    assert missed == []


def test_the_simulation_finds_an_interval_that_forgets_the_questions_or_the_seeds() -> None:
    rng = np.random.default_rng(0)
    over_seeds = over_questions = 0
    for _ in range(100):
        # Shared questions of which a few are gained by all seeds.
        a, b, truth = simulated(rng, True, 8, 50, 0.0, True)
        a = np.where(a.mean(0) == 1, a, b)
        low, high = t_interval((a - b).mean(1))
        over_seeds += low <= truth <= high
        a, b, truth = simulated(rng, False, 3, 200, 0.3, False)
        _, low, high = paired_difference(a.ravel(), b.ravel())
        over_questions += low <= truth <= high
    assert over_seeds < 80
    assert over_questions < 60


@pytest.mark.parametrize("values", [[0.5, 1.0, 1.5, 0.2], [1.0, -1.0, 0.3], [5.0, 5.1, 5.2, 5.3]])
def test_a_p_value_of_t_intervals_is_that_of_the_t_test(values: list[float]) -> None:
    expected = scipy.stats.ttest_1samp(values, 0).pvalue
    assert p_value(lambda c: t_interval(values, c)) == pytest.approx(expected, rel=1e-6)


def test_a_p_value_is_under_5_percent_where_the_interval_leaves_0_out(
    rng: np.random.Generator,
) -> None:
    def interval(x: tuple[list[np.ndarray], ...], confidence: float) -> tuple[float, float]:
        return difference_interval(*x, crossed=True, confidence=confidence)

    found = set()
    for shift in np.linspace(0, 0.3, 15):
        b = rng.random((3, 60)) < 0.5
        a = b | (rng.random((3, 60)) < shift)
        x = list(a.astype(float)), list(b.astype(float))
        low, high = difference_interval(*x, crossed=True)
        p = p_value(functools.partial(interval, x))
        assert (p < 0.05) == (not low <= 0 <= high)
        found.add(p < 0.05)
    assert found == {True, False}
    assert p_value(lambda c: (1.0, 2.0)) == LEAST_P


def test_holm_adjusts_by_the_tests_that_are_left() -> None:
    # By hand: 4 · 0.01, 3 · 0.02, then 2 · 0.025 may not fall below it, 1 · 0.9.
    assert holm([0.9, 0.01, 0.025, 0.02]) == pytest.approx([0.9, 0.04, 0.06, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def method(analysis: Analysis, name: str, group: str = "tokens") -> MethodResult:
    return next(one for one in analysis.groups[group] if one.method == name)


def test_a_score_is_paired_by_seed_and_question() -> None:
    runs = comparison(range(3), weights=False)
    dft = method(analyse(runs, primary=PRIMARY), "dft").measured[PRIMARY]
    scores = {
        name: [run.scores[PRIMARY] for run in runs if run.method == name and run.role == "main"]
        for name in ("sft", "dft")
    }
    assert dft.difference is not None
    differences = {
        seed: statistics.mean(dft_) - statistics.mean(sft)
        for seed, (dft_, sft) in enumerate(zip(scores["dft"], scores["sft"], strict=True))
    }
    assert dft.difference.by_seed == pytest.approx(differences)
    assert dft.difference.value == pytest.approx(statistics.mean(differences.values()))
    assert (dft.difference.low, dft.difference.high) == difference_interval(
        scores["dft"], scores["sft"], crossed=True
    )
    assert dft.mean.value == pytest.approx(np.mean(scores["dft"]))
    assert (dft.mean.low, dft.mean.high) == share_interval(scores["dft"], crossed=True)
    assert (dft.over, dft.questions) == (OVER_BOTH, 120)


def test_seeds_with_questions_of_their_own_are_told_from_shared_ones_by_the_digests() -> None:
    runs = comparison(range(3), weights=False, crossed=False)
    dft = method(analyse(runs, primary=PRIMARY), "dft").measured[PRIMARY]
    assert (dft.over, dft.questions) == (OVER_SEEDS, 360)
    same = [dataclasses.replace(run, digests={"target": "a", "ood": "b"}) for run in runs]
    other = method(analyse(same, primary=PRIMARY), "dft").measured[PRIMARY]
    assert other.over == OVER_BOTH
    assert other.difference != dft.difference


def test_other_quantities_have_students_paired_interval() -> None:
    nll = {"sft": (1.0, 1.2, 1.4), "dft": (0.9, 1.2, 1.1)}
    runs = [
        dataclasses.replace(run, metrics={"nll": nll[run.method][run.seed]})
        for run in comparison(range(3), weights=False, searched=False)
        if run.method in nll
    ]
    dft = method(analyse(runs, primary=PRIMARY), "dft").measured["nll"]
    assert dft.difference is not None
    # By hand: differences −0.1, 0, −0.3 with mean −0.4 / 3 and standard deviation √(7 / 300).
    half = T[2] * math.sqrt(7 / 300 / 3)
    assert dft.difference.value == pytest.approx(-0.4 / 3)
    assert dft.difference.low == pytest.approx(-0.4 / 3 - half, abs=1e-4)
    assert dft.difference.high == pytest.approx(-0.4 / 3 + half, abs=1e-4)
    assert dft.over == OVER_SEEDS


def test_verdicts_go_by_the_adjusted_p_and_by_what_is_better() -> None:
    analysis = analyse(comparison(), primary=PRIMARY)
    dft, best = (method(analysis, name) for name in ("dft", "ranktuner:base=one:scale=exact"))
    assert dft.p is not None
    assert best.p is not None
    assert [dft.p_holm, best.p_holm] == holm([dft.p, best.p])
    assert dft.verdict(PRIMARY, PRIMARY) == "no difference seen"
    assert best.verdict(PRIMARY, PRIMARY) == "better"
    assert best.verdict("nll", PRIMARY) == "better"  # It is lower.
    assert best.verdict("grad_norm", PRIMARY) == ""  # Lower, which is neither.
    assert method(analysis, "dft", "weights").verdict(PRIMARY, PRIMARY) == "worse"
    assert method(analysis, "dft", "weights").verdict("nll", PRIMARY) == "worse"
    assert method(analysis, "sft").verdict(PRIMARY, PRIMARY) == ""
    clear = dataclasses.replace(best, p=0.02, p_holm=0.06)
    assert clear.verdict(PRIMARY, PRIMARY) == "no difference seen"


def test_one_seed_has_no_verdict_no_p_and_no_interval_of_other_quantities() -> None:
    best = analyse(comparison([0]), primary=PRIMARY).groups["tokens"][-1]
    score, nll = best.measured[PRIMARY], best.measured["nll"]
    assert score.over == OVER_QUESTIONS
    assert score.difference is not None
    assert score.difference.outside(0)
    assert nll.difference is not None
    assert (nll.difference.low, nll.mean.high) == (None, None)
    assert (best.p, best.p_holm) == (None, None)
    assert best.verdict(PRIMARY, PRIMARY) == best.verdict("nll", PRIMARY) == ""


def test_an_unfinished_comparison_is_paired_where_it_can_be() -> None:
    runs = [run for run in comparison(range(4)) if (run.method, run.seed) not in {("dft", 1)}]
    runs = [run for run in runs if (run.method, run.seed) not in {("sft", 3)}]
    analysis = analyse(runs, primary=PRIMARY)
    dft = method(analysis, "dft")
    assert list(dft.seeds) == [0, 2, 3]
    assert dft.pairs == 2
    for name in (PRIMARY, "nll"):
        difference = dft.measured[name].difference
        assert difference is not None
        assert difference.by_seed.keys() == {0, 2}
    assert dft.measured[PRIMARY].mean.by_seed.keys() == {0, 2, 3}


def test_only_the_runs_that_count_do_and_the_search_is_a_table() -> None:
    runs = comparison(range(3))
    with_search = method(analyse(runs, primary=PRIMARY), "dft")
    alone = method(analyse([r for r in runs if r.role == "main"], primary=PRIMARY), "dft")
    assert alone == dataclasses.replace(with_search, search=[])
    searched = [run for run in runs if run.role == "search" and run.method == "dft"]
    assert [one.rate for one in with_search.search] == [1e-4, 3e-4, 1e-3]
    for one in with_search.search:
        scores = [np.mean(run.scores[PRIMARY]) for run in searched if run.rate == one.rate]
        assert one.score == pytest.approx(np.mean(scores))
        assert one.runs == len(scores) == 2
    assert not with_search.at_edge
    assert dataclasses.replace(with_search, rate=1e-3).at_edge
    assert not alone.at_edge


def test_curves_are_means_over_seeds_and_reach_from_the_lowest_to_the_highest() -> None:
    curve = method(analyse(comparison(range(3)), primary=PRIMARY), "sft").curve
    assert curve is not None
    assert len(curve.step) == 50
    # The first part holds three of the 120 steps; see `outcome`.
    first = statistics.mean(3 - 0.4 * step / 120 for step in range(3))
    assert curve.step[0] == 2
    assert curve.low[0] == pytest.approx(first)
    assert curve.mean[0] == pytest.approx(first + 0.1)
    assert curve.high[0] == pytest.approx(first + 0.2)
    short = dataclasses.replace(outcome("sft", 1, 0.4), curves={"step": (1.0, 4.0), "nll": (1, 2)})
    cut = analyse([outcome("sft", 0, 0.4), short], primary=PRIMARY).groups["tokens"][0].curve
    assert cut is not None
    assert cut.step == [1.0, 4.0]


def test_the_weights_are_a_second_analysis_with_the_same_baseline() -> None:
    analysis = analyse(comparison()[::-1], primary=PRIMARY)
    assert list(analysis.groups) == ["tokens", "weights"]
    for methods in analysis.groups.values():
        assert (methods[0].method, methods[0].normalize) == ("sft", "tokens")
    _, dft = analysis.groups["weights"]
    assert dft.normalize == "weights"
    assert dft.p == dft.p_holm


def test_the_analysis_is_plain_json() -> None:
    analysis = analyse(comparison(range(2)), primary=PRIMARY)
    saved = json.loads(json.dumps(analysis.to_json(), allow_nan=False))
    assert saved == analysis.to_json()
    dft = saved["groups"]["tokens"][1]
    assert dft["measured"][PRIMARY]["difference"]["by_seed"].keys() == {"0", "1"}
    assert saved["primary"] == PRIMARY
    assert method(analysis, "dft").measured[PRIMARY].mean.by_seed.keys() == {0, 1}


def replaced(run: Outcome, **fields: object) -> Outcome:
    return dataclasses.replace(run, **fields)  # type: ignore[arg-type]


SFT, DFT = outcome("sft", 0, 0.4), outcome("dft", 0, 0.5)


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([], "expected runs of sft, which the methods are compared with, got none"),
        ([DFT], "expected runs of sft"),
        ([SFT, SFT], "sft: expected one run of seed 0, got two"),
        ([SFT, replaced(DFT, scores={})], "dft, seed 0: expected the primary score target/pass@1"),
        (
            [SFT, DFT, outcome("dft", 1, 0.5, rate=1e-3)],
            "dft: expected runs of one learning rate, got 0.0003, 0.001",
        ),
        (
            [SFT, replaced(DFT, digests={"target": "others", "ood": "ood "})],
            "dft, seed 0: expected the questions of target that the baseline answers",
        ),
        (
            [SFT, outcome("sft", 1, 0.4), outcome("sft", 2, 0.4, crossed=False)],
            "target: expected the same questions for all seeds, or others for each, got 2 sets for "
            "3 seeds",
        ),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(runs: list[Outcome], message: str) -> None:
    with pytest.raises(UserError, match=message):
        analyse(runs, primary=PRIMARY)
