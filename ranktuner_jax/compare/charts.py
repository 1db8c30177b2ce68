"""The charts of a comparison; colours come from the page's theme."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt

from ranktuner_jax.compare.analysis import Analysis, Estimate, MethodResult
from ranktuner_jax.compare.tables import is_share, method_label, title
from ranktuner_jax.diagnostics.report.charts import Spec, data, finish, log_axis, short

__all__ = ["curves", "forest", "search", "series_label"]


def series_label(method: MethodResult) -> str:
    """How a method is called where both analyses share a chart."""
    return method_label(method.method) + ", by weights" * (method.normalize == "weights")


def forest(name: str, analysis: Analysis, methods: Sequence[MethodResult]) -> Spec:
    """Each method's difference from the baseline with its interval, over the dots of its seeds.

    Args:
      name: The quantity.
      analysis: The comparison.
      methods: Those that have a difference of it.
    """
    measured = {method_label(method.method): method.measured[name] for method in methods}
    share = is_share(name, next(iter(measured.values())))
    unit = "percentage points" if share else title(name).rpartition(", ")[2]
    scale = 100 if share else 1
    rows: list[dict[str, Any]] = []
    dots: list[dict[str, Any]] = []
    for label, one in measured.items():
        assert one.difference is not None
        rows.append({"method": label, **_ends(one.difference, scale)})
        dots += [
            {"method": label, "seed": seed, "value": short(scale * value)}
            for seed, value in one.difference.by_seed.items()
        ]
    # Names stand over the intervals: on an axis they would take half of a narrow chart.
    y = alt.Y("method:N", sort=None, axis=alt.Axis(title=None, labels=False, ticks=False))
    base = method_label(analysis.baseline)
    x = alt.X(
        "value:Q",
        axis=alt.Axis(title=f"minus {base}, {unit}", format="+~f", tickCount=6, labelOverlap=True),
    )
    value = alt.Tooltip("value:Q", title=f"minus {base}")
    zero = alt.Chart(data([{"value": 0}])).mark_rule(style="quadrant").encode(x=x)
    seeds = (
        alt.Chart(data(dots))
        .mark_circle(style="plain", opacity=0.4, size=28, yOffset=9)
        .encode(y=y, x=x, tooltip=[alt.Tooltip("method:N"), alt.Tooltip("seed:Q"), value])
    )
    tooltip = [alt.Tooltip("method:N"), value]
    layers: list[alt.Chart] = [zero, seeds]
    # One seed allows no interval of what is not a score.
    if bounded := [row for row in rows if row["low"] is not None]:
        tooltip += [alt.Tooltip("low:Q", title="from"), alt.Tooltip("high:Q", title="to")]
        interval = alt.Chart(data(bounded)).mark_rule(style="first")
        layers.append(interval.encode(y=y, x="low:Q", x2="high:Q", tooltip=tooltip))
    mean = alt.Chart(data(rows)).mark_point(
        style="first", filled=True, shape="diamond", size=110, opacity=1
    )
    layers.append(mean.encode(y=y, x=x, tooltip=tooltip))
    names = alt.Chart(data(rows)).encode(y=y, x=alt.value(0), text="method:N")
    for style in (["note", "rim"], ["note"]):
        layers.append(names.mark_text(style=style, align="left", dx=6, dy=-15))
    return finish(
        alt.layer(*layers),
        52 * len(rows),
        f"Difference from {base} by method, {title(name)}: mean, interval, and each seed.",
    )


def curves(methods: Sequence[MethodResult]) -> Spec:
    """The plain NLL of training by step: the mean over seeds in the band of all seeds."""
    rows = [
        {
            "method": series_label(method),
            "step": short(step),
            "value": short(mean),
            "low": short(low),
            "high": short(high),
        }
        for method in methods
        if method.curve
        for step, mean, low, high in zip(
            method.curve.step, method.curve.mean, method.curve.low, method.curve.high, strict=True
        )
    ]
    base = alt.Chart(data(rows)).encode(
        x=alt.X("step:Q", axis=alt.Axis(title="step", tickMinStep=1, tickCount=8, format="~s")),
        color=_colour(methods),
    )
    y = alt.Axis(title="plain NLL of the batches, nats")
    scale = alt.Scale(zero=False)
    band = base.mark_area(opacity=0.15).encode(y=alt.Y("low:Q", axis=y, scale=scale), y2="high:Q")
    line = base.mark_line(strokeWidth=2).encode(
        y=alt.Y("value:Q", axis=y, scale=scale),
        tooltip=[alt.Tooltip("method:N"), alt.Tooltip("step:Q"), alt.Tooltip("value:Q")],
    )
    return finish(alt.layer(band, line), 320, "Plain NLL of training by step and method.")


def search(primary: str, methods: Sequence[MethodResult]) -> Spec:
    """The mean primary score by learning rate and method; the chosen rates are marked."""
    rows: list[dict[str, Any]] = [
        {
            "method": series_label(method),
            "rate": one.rate,
            "value": short(one.score),
            "runs": one.runs,
            "chosen": one.rate == method.rate,
            "which": "chosen, at an end of the grid" if method.at_edge else "chosen",
        }
        for method in methods
        for one in method.search
    ]
    rates = [row["rate"] for row in rows]
    chart = alt.Chart(data(rows)).encode(
        x=alt.X(
            "rate:Q",
            scale=alt.Scale(type="log", nice=False, padding=12),
            axis=log_axis("learning rate", min(rates), max(rates)),
        ),
        y=alt.Y(
            "value:Q",
            axis=alt.Axis(title=f"{primary} of the search", format="~%"),
            scale=alt.Scale(zero=False),
        ),
        color=_colour([method for method in methods if method.search]),
        tooltip=[
            alt.Tooltip("method:N"),
            alt.Tooltip("rate:Q", title="learning rate"),
            alt.Tooltip("value:Q", title=primary, format=".1%"),
            alt.Tooltip("runs:Q"),
        ],
    )
    marks = (
        chart.transform_filter("datum.chosen")
        .mark_point(filled=True, size=150, opacity=1)
        .encode(
            shape=alt.Shape(
                "which:N",
                scale=alt.Scale(
                    domain=["chosen", "chosen, at an end of the grid"],
                    range=["diamond", "triangle-up"],
                ),
                legend=alt.Legend(title=None),
            )
        )
    )
    lines = chart.mark_line(point={"size": 30}, strokeWidth=1.5)
    return finish(alt.layer(lines, marks), 320, f"{primary} by learning rate and method.")


def _colour(methods: Sequence[MethodResult]) -> alt.Color:
    return alt.Color(
        "method:N",
        scale=alt.Scale(domain=[series_label(method) for method in methods], range="category"),
        legend=alt.Legend(title=None, symbolOpacity=1),
    )


def _ends(one: Estimate, scale: float) -> dict[str, float | None]:
    return {
        name: None if value is None else short(scale * value)
        for name, value in (("value", one.value), ("low", one.low), ("high", one.high))
    }
