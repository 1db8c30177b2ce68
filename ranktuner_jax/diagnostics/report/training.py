"""report.html of a training run, from the files in its workdir."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import altair as alt
import numpy as np
from etils import epath

from ranktuner_jax.diagnostics.report.audited import label
from ranktuner_jax.diagnostics.report.charts import Spec, data, finish, log_axis
from ranktuner_jax.diagnostics.report.page import Figure, Page, Sample, Section, Table, write_page
from ranktuner_jax.diagnostics.report.phrasing import counted, number, percent
from ranktuner_jax.errors import UserError

__all__ = ["write_training_report"]

Series: TypeAlias = list[tuple[int, float]]

# Points of a curve; a longer one is drawn as the means of so many runs of steps.
_POINTS = 400
_SAMPLES = 4


@dataclasses.dataclass(frozen=True)
class _Run:
    """What a run left: its config, its metrics by name, its result and its samples."""

    config: Mapping[str, Any]
    metrics: Mapping[str, Series]
    result: Mapping[str, Any]
    samples: Sequence[Mapping[str, Any]]

    def series(self, name: str) -> Series:
        return self.metrics.get(name, [])


def write_training_report(workdir: str | os.PathLike[str]) -> epath.Path:
    """Writes report.html into the folder of a run.

    It reads config.json and metrics.jsonl, and result.json and samples/ where they are.

    Args:
      workdir: The folder of the run, local or in an object store.

    Returns:
      The path of report.html.

    Raises:
      UserError: If the folder holds no metrics of a run.
    """
    folder = epath.Path(workdir)
    return epath.Path(write_page(folder / "report.html", _page(_read(folder))))


def _read(folder: epath.Path) -> _Run:
    for name in ("config.json", "metrics.jsonl"):
        if not (folder / name).exists():
            raise UserError(
                f"{folder}: expected the folder of a run, got one without {name}; "
                "train with this --workdir first"
            )
    metrics: dict[str, dict[int, float]] = {}
    for line in _lines(folder / "metrics.jsonl"):
        for name, value in line.items():
            if name != "step" and value is not None:
                metrics.setdefault(name, {})[int(line["step"])] = float(value)
    if not any(name.startswith("train/") for name in metrics):
        raise UserError(
            f"{folder}/metrics.jsonl: expected the metrics of at least one step, got none; "
            "train for a step first"
        )
    result = folder / "result.json"
    files = sorted((folder / "samples").glob("step_*.jsonl"))
    return _Run(
        config=json.loads((folder / "config.json").read_text()),
        metrics={name: sorted(values.items()) for name, values in metrics.items()},
        result=json.loads(result.read_text()) if result.exists() else {},
        samples=_lines(files[-1]) if files else [],
    )


def _lines(path: epath.Path) -> list[dict[str, Any]]:
    # Not splitlines(): text of a sample may hold U+2028, which is no end of a line here.
    return [json.loads(line) for line in path.read_text().split("\n") if line.strip()]


def _page(run: _Run) -> Page:
    nll = run.series("train/nll")
    steps = nll[-1][0] if nll else 0
    loss = run.config["loss"]
    held_out = run.series("eval/nll")
    facts = {"steps": f"{steps:,}", "method": label(str(loss["weighting"]))}
    if len(held_out) > 1:
        facts["held-out nll"] = f"{held_out[0][1]:.3f} → {held_out[-1][1]:.3f}"
    if len(answers := run.series("eval/accuracy")) > 1:
        facts["answers right"] = f"{percent(answers[0][1])} → {percent(answers[-1][1])}"
    sections = [
        Section(
            "Loss",
            _loss_words(run),
            [
                Figure(
                    "Loss, and plain nll, of each step",
                    _curves(run, {"train/nll": "plain nll", "train/loss": "loss"}, "nats"),
                )
            ],
        ),
        Section(
            "Weights",
            _weight_words(run),
            [Figure("Weights: mean, median, and the band of nine in ten", _weight_chart(run))],
        ),
        Section(
            "Shares of the tokens",
            _share_words(run),
            [Figure("Shares of the tokens of each step", _share_chart(run))],
        ),
        Section(
            "Gradient",
            _gradient_words(run),
            [Figure("Norm of the gradient before clipping", _gradient_chart(run))],
        ),
    ]
    if held_out:
        sections.append(_held_out_section(run))
    if samples := _samples(run):
        sections.append(Section("Samples", samples=samples, wide=True))
    source = run.config["data"]["source"] or "a mixture"
    return Page(
        title="What the run did",
        lead=f"{run.config['model']} on {source}, {counted(steps, 'step')}.",
        facts=facts,
        sections=sections,
        footer="From config.json, metrics.jsonl and, where they are, result.json and samples/."
        + (f" Stopped early: {run.result['stopped']}." if run.result.get("stopped") else ""),
    )


def _thinned(series: Series) -> Series:
    """At most _POINTS points: means over neighbouring steps."""
    if len(series) <= _POINTS:
        return series
    parts = np.array_split(np.array(series), _POINTS)
    return [(int(part[-1, 0]), float(part[:, 1].mean())) for part in parts]


def _points(run: _Run, names: Mapping[str, str]) -> list[dict[str, Any]]:
    return [
        {"step": step, "value": float(f"{value:.4g}"), "what": what}
        for name, what in names.items()
        for step, value in _thinned(run.series(name))
    ]


def _step_axis() -> alt.X:
    return alt.X("step:Q", axis=alt.Axis(title="step", tickMinStep=1, tickCount=8, format="~s"))


def _line(rows: Sequence[dict[str, Any]], y: alt.Y, names: Sequence[str]) -> alt.Chart:
    return (
        alt.Chart(data(rows))
        .mark_line(point=len(rows) <= 2 * len(names), clip=True)
        .encode(
            x=_step_axis(),
            y=y,
            color=alt.Color(
                "what:N",
                scale=alt.Scale(domain=list(names), range="category"),
                legend=alt.Legend(title=None),
            ),
            tooltip=[alt.Tooltip("what:N"), alt.Tooltip("step:Q"), alt.Tooltip("value:Q")],
        )
    )


def _curves(run: _Run, names: Mapping[str, str], unit: str, **axis: Any) -> Spec:
    present = {name: what for name, what in names.items() if run.series(name)}
    y = alt.Y("value:Q", axis=alt.Axis(title=unit, **axis), scale=alt.Scale(zero=False))
    listed = list(present.values())
    return finish(_line(_points(run, present), y, listed), 280, f"{' and '.join(listed)} by step.")


def _weight_chart(run: _Run) -> Spec:
    low, high = (_thinned(run.series(f"weight/{name}")) for name in ("p05", "p95"))
    # A weight of 0 has no place on a logarithmic axis; 1e-5 is the smallest bin of the metrics.
    band = [
        {"step": step, "low": max(a, 1e-5), "high": max(b, 1e-5)}
        for (step, a), (_, b) in zip(low, high, strict=True)
    ]
    rows = _points(run, {"weight/mean": "mean", "weight/p50": "median"})
    rows = [row | {"value": max(row["value"], 1e-5)} for row in rows]
    y = alt.Y(
        "value:Q",
        scale=alt.Scale(type="log"),
        axis=log_axis("weight of a token", *_extent(rows, band)),
    )
    area = (
        alt.Chart(data(band))
        .mark_area(style="band")
        .encode(x=_step_axis(), y=alt.Y("low:Q", scale=alt.Scale(type="log")), y2="high:Q")
    )
    return finish(
        alt.layer(_line(rows, y, ["mean", "median"]), area), 280, "Weights of the tokens by step."
    )


def _extent(*groups: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """The smallest and the largest of the values that are drawn."""
    names = ("value", "low", "high")
    drawn = [row[name] for rows in groups for row in rows for name in names if name in row]
    return min(drawn, default=1.0), max(drawn, default=1.0)


def _share_names(run: _Run) -> dict[str, str]:
    names = {
        "weight/effective_fraction": "effective share",
        "train/noise_region": "in the Noise Region",
        "train/noise_region_bound": "in the Noise Region, by s(H)",
        "weight/clipped": "at the clip of the weights",
    }
    return {name: what for name, what in names.items() if run.series(name)}


def _share_chart(run: _Run) -> Spec:
    return _curves(run, _share_names(run), "share of the tokens", format="~%")


def _gradient_chart(run: _Run) -> Spec:
    rows = _points(run, {"train/grad_norm": "gradient norm"})
    rows = [row for row in rows if row["value"] > 0]
    y = alt.Y(
        "value:Q",
        scale=alt.Scale(type="log"),
        axis=log_axis("global norm", *_extent(rows)),
    )
    layers: list[alt.Chart] = [_line(rows, y, ["gradient norm"])]
    if clip := _clip_norm(run):
        rule = alt.Chart(data([{"value": clip}])).mark_rule(style="second")
        layers.append(rule.encode(y="value:Q"))
    return finish(alt.layer(*layers), 240, "Norm of the gradient by step.")


def _clip_norm(run: _Run) -> float:
    return float(run.config["optimizer"]["clip_norm"])


def _ends(series: Series) -> tuple[float, float]:
    """The means of the first and of the last tenth of the recorded steps."""
    part = max(1, len(series) // 10)
    values = [value for _, value in series]
    return sum(values[:part]) / part, sum(values[-part:]) / part


def _change(series: Series) -> str:
    first, last = _ends(series)
    if number(first) == number(last):
        return f"stayed at {number(first)}"
    return f"{'fell' if last < first else 'rose'} from {number(first)} to {number(last)}"


def _loss_words(run: _Run) -> list[str]:
    nll, loss = run.series("train/nll"), run.series("train/loss")
    sentences = [
        f"In nats, the plain nll {_change(nll)} (means of the first and the last tenth of the "
        f"steps); the loss, which is weighted, {_change(loss)}.",
        "Losses of two methods are not comparable: their weights differ. The plain nll is.",
    ]
    if len(nll) > _POINTS:
        sentences.append(
            f"{counted(len(nll), 'step')} are recorded; each point is the mean of about "
            f"{math.ceil(len(nll) / _POINTS)}."
        )
    return sentences


def _weight_words(run: _Run) -> list[str]:
    mean = run.series("weight/mean")
    low, high = run.series("weight/p05"), run.series("weight/p95")
    return [
        f"The mean weight {_change(mean)}: the size of the gradient goes with it.",
        f"Nine weights in ten lie in the band, at the end from {number(_ends(low)[1])} to "
        f"{number(_ends(high)[1])}; at the start, from {number(_ends(low)[0])} to "
        f"{number(_ends(high)[0])}.",
    ]


def _share_words(run: _Run) -> list[str]:
    sentences = []
    for name, what in _share_names(run).items():
        first, last = _ends(run.series(name))
        if name == "weight/clipped" and first == last == 0:
            sentences.append("No weight was cut off by a clip at either end of the run.")
        else:
            sentences.append(
                f"{what[:1].upper()}{what[1:]}: {percent(first)} of the tokens in the first tenth "
                f"of the steps, {percent(last)} in the last."
            )
    return sentences


def _gradient_words(run: _Run) -> list[str]:
    norms = [value for _, value in run.series("train/grad_norm")]
    clip = _clip_norm(run)
    if not clip:
        return ["The gradient was not clipped (optimizer.clip_norm=0)."]
    over = sum(norm > clip for norm in norms)
    sentences = [
        f"The gradient was clipped to a norm of {number(clip)} (the orange line) in "
        f"{percent(over / max(len(norms), 1))} of the {counted(len(norms), 'recorded step')}.",
    ]
    if norms:
        sentences.append(
            f"The norm before that {_change(run.series('train/grad_norm'))}; its largest value is "
            f"{number(max(norms))}."
        )
    skipped = run.series("train/skipped_steps")
    if skipped and skipped[-1][1]:
        sentences.append(
            f"{counted(int(skipped[-1][1]), 'step')} without a finite loss or gradient: skipped."
        )
    return sentences


def _held_out_section(run: _Run) -> Section:
    nll = run.series("eval/nll")
    rows = []
    for name, title, show in (
        ("eval/nll", "plain nll, nats", number),
        ("eval/perplexity", "perplexity", number),
        ("eval/token_accuracy", "token accuracy", percent),
        ("eval/accuracy", "answers right", percent),
    ):
        if series := run.series(name):
            cells = [show(series[0][1]), show(series[-1][1])]
            low, high = run.series(f"{name}_low"), run.series(f"{name}_high")
            if low and high:
                cells = [
                    f"{cell} ({show(low[at][1])} to {show(high[at][1])})"
                    for cell, at in zip(cells, (0, -1), strict=True)
                ]
            rows.append([title, *cells])
    words = [
        f"In nats, the held-out nll {_change([nll[0], nll[-1]])}."
        if len(nll) > 1
        else f"The held-out nll is {number(nll[0][1])} nats; there is one evaluation so far."
    ]
    if accuracy := run.series("eval/accuracy"):
        low, high = run.series("eval/accuracy_low"), run.series("eval/accuracy_high")
        if len(accuracy) > 1 and low and high:
            apart = low[-1][1] > high[0][1] or high[-1][1] < low[0][1]
            words.append(
                f"Answers right: {percent(accuracy[0][1])} before, {percent(accuracy[-1][1])} "
                "after; the 95\u00a0% intervals "
                + ("do not overlap." if apart else "overlap: chance alone could explain it.")
            )
    if len(nll) > 2:
        best = min(nll, key=lambda point: point[1])
        words.append(f"The lowest of {len(nll)} evaluations came at step {best[0]:,}.")
    figures = [
        Figure(
            "Plain nll on the held-out rows",
            _curves(run, {"eval/nll": "held-out nll"}, "nats"),
        )
    ]
    if run.series("eval/accuracy_low"):
        figures.append(Figure("Answers right, with 95 % intervals", _interval_chart(run)))
    table = Table(
        "Held-out, before and after; 95 % intervals in brackets", ["", "before", "after"], rows
    )
    return Section("Held out", words, figures, [table] if rows else [], wide=len(figures) > 1)


def _interval_chart(run: _Run) -> Spec:
    rows = [
        {"step": step, "value": value, "low": low, "high": high}
        for (step, value), (_, low), (_, high) in zip(
            run.series("eval/accuracy"),
            run.series("eval/accuracy_low"),
            run.series("eval/accuracy_high"),
            strict=True,
        )
    ]
    y = alt.Y(
        "low:Q", axis=alt.Axis(title="answers right", format="~%"), scale=alt.Scale(domain=[0, 1])
    )
    tooltip = [
        alt.Tooltip("step:Q"),
        alt.Tooltip("value:Q", title="answers right", format=".1%"),
        alt.Tooltip("low:Q", title="from", format=".1%"),
        alt.Tooltip("high:Q", title="to", format=".1%"),
    ]
    base = alt.Chart(data(rows)).encode(x=_step_axis(), tooltip=tooltip)
    bars = base.mark_rule(style="first").encode(y=y, y2="high:Q")
    points = base.mark_point(style="mark", filled=True).encode(y="value:Q")
    return finish(alt.layer(bars, points), 280, "Answers right by step, with 95 % intervals.")


def _samples(run: _Run) -> list[Sample]:
    found = []
    before, after = (run.result.get(name, {}).get("previews", []) for name in ("before", "after"))
    for then, now in list(zip(before, after, strict=False))[:_SAMPLES]:
        texts = {
            "question": then["question"],
            "expected": then["expected"],
            "before": then["completion"],
            "after": now["completion"],
        }
        found.append(Sample("Before and after", texts))
    for one in run.samples[:_SAMPLES]:
        texts = {name: one[name] for name in ("prompt", "reference", "completion")}
        found.append(Sample(f"After step {one['step']:,}", texts))
    return found
