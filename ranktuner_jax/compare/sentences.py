"""Sentences about a comparison, each with its numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ranktuner_jax.compare.analysis import Analysis, MethodResult
from ranktuner_jax.compare.charts import series_label
from ranktuner_jax.compare.tables import change, drawn, method_label, p_text, title, value
from ranktuner_jax.diagnostics.report.phrasing import counted, listed, number, percent

__all__ = ["adjustment", "curves", "measure", "primary", "search"]


def primary(analysis: Analysis, group: str, settings: Mapping[str, Any]) -> list[str]:
    """On the score that decides."""
    base, *others = analysis.groups[group]
    measured, name = base.measured[analysis.primary], method_label(base.method)
    before = settings.get("before", {}).get(analysis.primary)
    sentences = [
        f"Of {analysis.primary}, {name} has {value(analysis.primary, measured)}, the mean over "
        f"{counted(len(base.seeds), 'seed')}"
        + ("." if before is None else f"; before training the model has {percent(before)}."),
        drawn(measured),
    ]
    tests = sum(method.p is not None for method in others)
    for method in others:
        sentences.append(_primary_of(method, analysis, tests))
    sentences.append(
        "A faint dot is one seed, a diamond the mean, the line its 95\u00a0% interval."
    )
    return sentences


def adjustment(methods: Sequence[MethodResult]) -> list[str]:
    """On the p-values of the primary score."""
    tests = sum(method.p is not None for method in methods)
    if not tests:
        return [
            "There are no p-values: they need two seeds that a method shares with the baseline."
        ]
    if tests == 1:
        return ["The p-value of the only method needs no adjustment."]
    kept = sum(method.p_holm is not None and method.p_holm < 0.05 for method in methods)
    raw = sum(method.p is not None and method.p < 0.05 for method in methods)
    return [
        f"Each p-value is that of its interval: under 0.05 where 0 is outside, as for {raw} of "
        f"{tests} methods. Adjusted by Holm's procedure for {tests} tests, {kept} "
        f"{'stays' if kept == 1 else 'stay'} under 0.05. Verdicts go by the adjusted ones."
    ]


def _primary_of(method: MethodResult, analysis: Analysis, tests: int) -> str:
    name, base = method_label(method.method), method_label(analysis.baseline)
    primary = analysis.primary
    measured = method.measured[primary]
    difference = measured.difference
    if difference is None or difference.low is None or difference.high is None:
        return f"{name} shares no seed with {base}, and is not compared."
    numbers = change(primary, measured)
    if method.p is None:
        return f"{name} minus {base} is {numbers} with one seed, too few to tell them apart."
    adjusted = "" if tests == 1 else ", adjusted"
    p = f"p = {p_text(method.p_holm)}{adjusted}".replace("= <", "<")
    verdict = method.verdict(primary, primary)
    low, high = (f"{abs(100 * end):.1f}" for end in (difference.low, difference.high))
    if verdict != "no difference seen":
        sentence = f"{name} is {verdict} than {base}: {numbers}; {p}."
    elif difference.outside(0):
        sentence = (
            f"The interval of {name} leaves 0 out, {numbers}, but not after the adjustment for "
            f"{tests} methods: {p}."
        )
    else:
        sentence = (
            f"No difference from {base} is seen for {name}: {numbers}; {p}. A gain of up to {high} "
            f"points, or a loss of up to {low}, is within the interval."
        )
    if method.pairs < len(analysis.seeds):
        sentence += (
            f" It rests on the {method.pairs} of {len(analysis.seeds)} seeds that both have."
        )
    return sentence


def measure(name: str, analysis: Analysis, methods: Sequence[MethodResult]) -> str:
    """On one quantity beside the primary score."""
    base, *others = [method for method in methods if name in method.measured]
    called = title(name)
    # The name of a score is its own.
    sentence = (called if called == name else called[:1].upper() + called[1:]) + ": "
    if base.method == analysis.baseline:
        sentence += f"{method_label(base.method)} has {value(name, base.measured[name])}. "
    found: dict[str, list[str]] = {}
    for method in others:
        difference = method.measured[name].difference
        if difference is None:
            continue
        if len(difference.by_seed) < 2:
            what = "With one seed:"
        elif not difference.outside(0):
            what = "No difference seen:"
        else:
            verdict = method.verdict(name, analysis.primary)
            what = (verdict or ("higher" if difference.value > 0 else "lower")).capitalize() + ":"
        found.setdefault(what, []).append(
            f"{method_label(method.method)} {change(name, method.measured[name])}"
        )
    sentence += " ".join(f"{what} {listed(methods)}." for what, methods in found.items())
    for method in methods:
        seeds = len(method.measured[name].mean.by_seed) if name in method.measured else 0
        if seeds < len(method.seeds):
            sentence += (
                f" {method_label(method.method)} has a finite value for {seeds} of "
                f"{counted(len(method.seeds), 'seed')}."
            )
    if name == "nll":
        sentence += " It favours SFT, which minimises it."
    return sentence.strip()


def curves(methods: Sequence[MethodResult]) -> list[str]:
    """On the training curves."""
    drawn_ = [(series_label(method), method.curve) for method in methods if method.curve]
    ends = [f"{name} from {number(c.mean[0])} to {number(c.mean[-1])}" for name, c in drawn_]
    lowest, curve = min(drawn_, key=lambda pair: pair[1].mean[-1])
    sentences = [
        "The plain NLL of the training batches in nats, the mean over seeds, goes with "
        f"{listed(ends)}. It ends lowest with {lowest}, {number(curve.mean[-1])}; it is "
        "unweighted, whatever a method minimises."
    ]
    if any(len(method.seeds) > 1 for method in methods):
        widths = [f"{number(c.high[-1] - c.low[-1])} with {name}" for name, c in drawn_]
        sentences.append(
            "A band reaches from the lowest to the highest seed; its width at the end is "
            f"{listed(widths)}."
        )
    return sentences


def search(analysis: Analysis, methods: Sequence[MethodResult]) -> list[str]:
    """On the search for the learning rates."""
    searched = [method for method in methods if method.search]
    sentences = []
    for method in searched:
        best = next((one for one in method.search if one.rate == method.rate), None)
        others = [one.score for one in method.search if one.rate != method.rate]
        if best is None or not others:
            continue
        sentences.append(
            f"{series_label(method)} takes {method.rate:g}, with {percent(best.score)} over "
            f"{counted(best.runs, 'run')}; the next best of {len(method.search)} rates has "
            f"{percent(max(others))}."
        )
    edges = [f"{series_label(method)} ({method.rate:g})" for method in searched if method.at_edge]
    sentences.append(
        f"For {listed(edges)} the rate lies at an end of the grid: a better one may lie beyond."
        if edges
        else "No chosen rate lies at an end of the grid."
    )
    return [
        f"All methods were searched on one grid by their mean {analysis.primary}, with seeds that "
        "do not count in the result.",
        *sentences,
    ]
