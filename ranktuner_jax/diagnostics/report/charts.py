"""What charts are made of: cells, lines, bars; colours come from the page's theme."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import altair as alt
import numpy as np
import numpy.typing as npt

from ranktuner_jax.diagnostics.report.phrasing import percent

__all__ = [
    "Floats",
    "Spec",
    "bars",
    "cells",
    "data",
    "finish",
    "heat",
    "line",
    "log_axis",
    "matrix",
    "short",
    "text",
]

Spec: TypeAlias = dict[str, Any]
Floats: TypeAlias = npt.NDArray[np.floating[Any]]


def finish(
    chart: alt.LayerChart | alt.FacetChart | alt.Chart, height: int, description: str
) -> Spec:
    """The specification of a chart as wide as its place, without a theme."""
    spec: Spec = chart.properties(
        width="container", height=height, description=description
    ).to_dict()
    del spec["config"]  # Altair's own sizes; the theme is the page's.
    return spec | {"autosize": {"type": "fit-x", "contains": "padding"}}


def data(rows: Sequence[dict[str, Any]]) -> alt.InlineData:
    """Rows as they are: no data frames, no limit on their number."""
    return alt.InlineData(values=list(rows))


def log_axis(title: str, low: float, high: float) -> alt.Axis:
    """An axis of a logarithmic scale with a line at each power of ten; 2 and 5 on short ones."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    within = (1, 2, 5) if last - first <= 2 else (1,)
    values = [digit * 10.0**power for power in range(first, last + 1) for digit in within]
    return alt.Axis(title=title, format="~g", values=values, tickCount=len(values))


def cells(
    counts: Floats, x_edges: Floats, y_edges: Floats, **more: Floats
) -> list[dict[str, float]]:
    """The occupied cells of a histogram in two dimensions, with the values of `more`."""
    rows = []
    for i, j in np.argwhere(counts > 0):
        row = {
            "x": short(x_edges[i]),
            "x2": short(x_edges[i + 1]),
            "y": short(y_edges[j]),
            "y2": short(y_edges[j + 1]),
            "tokens": int(counts[i, j]),
        }
        rows.append(row | {name: short(values[i, j]) for name, values in more.items()})
    return rows


def short(value: float) -> float:
    """The number to four digits, which keeps the page small."""
    return float(f"{value:.4g}")


def heat(rows: Sequence[dict[str, Any]], x: alt.X, y: alt.Y, tooltip: list[Any]) -> alt.Chart:
    """The cells of a histogram, coloured by the logarithm of their tokens."""
    color = alt.Color(
        "tokens:Q",
        scale=alt.Scale(type="log", range="heatmap", interpolate="rgb"),
        legend=alt.Legend(title="tokens in a cell", tickCount=3, format="~s"),
    )
    return (
        alt.Chart(data(rows))
        .mark_rect(stroke=None)
        .encode(x=x, x2="x2:Q", y=y, y2="y2:Q", color=color, tooltip=tooltip)
    )


def line(rows: Sequence[dict[str, Any]], style: str) -> alt.Chart:
    """A line through points x, y in their `order`, in a style of the theme."""
    return (
        alt.Chart(data(rows))
        .mark_line(style=style, clip=True, interpolate="linear")
        .encode(x="x:Q", y="y:Q", order="order:Q")
    )


def text(
    rows: Sequence[dict[str, Any]], style: str, **mark: Any
) -> alt.LayerChart | alt.FacetChart:
    """Words in a figure, in a style of the theme, with a rim that lifts them off the cells."""
    base = alt.Chart(data(rows)).encode(x="x:Q", y="y:Q", text="text:N")
    return alt.layer(
        base.mark_text(style=[style, "rim"], **mark), base.mark_text(style=style, **mark)
    )


def bars(names: Sequence[str], values: Floats, title: str, description: str) -> Spec:
    """One bar a name, in the order given, with its percentage."""
    rows = [
        {"name": name, "value": short(value), "text": percent(value)}
        for name, value in zip(names, values, strict=True)
    ]
    base = alt.Chart(data(rows)).encode(
        y=alt.Y("name:N", sort=None, axis=alt.Axis(title=None)),
        x=alt.X(
            "value:Q",
            scale=alt.Scale(domain=[0, 1.25]),
            axis=alt.Axis(title=title, format="%", values=[0, 0.25, 0.5, 0.75, 1]),
        ),
    )
    chart = alt.layer(
        base.mark_bar(style="plain").encode(
            tooltip=[
                alt.Tooltip("name:N", title="method"),
                alt.Tooltip("value:Q", title="share", format=".1%"),
            ]
        ),
        base.mark_text(style="note", align="left", dx=4).encode(text="text:N"),
    )
    return finish(chart, 24 * len(rows) + 20, description)


def matrix(
    rows: Sequence[dict[str, Any]],
    *,
    x: alt.X,
    y: alt.Y,
    color: alt.Color,
    tooltip: list[Any],
    height: int,
    description: str,
) -> Spec:
    """Coloured cells with their numbers; the page leaves the numbers out where it is narrow."""
    base = alt.Chart(data(rows)).encode(x=x, y=y)
    numbers = base.mark_text(style="number").encode(text="text:N").properties(name="numbers")
    coloured = base.mark_rect(style="cell").encode(color=color, tooltip=tooltip)
    return finish(alt.layer(coloured, numbers), height, description)
