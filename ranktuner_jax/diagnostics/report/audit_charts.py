"""The charts of an audit, from numbers that are binned already."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt
import numpy as np

from ranktuner_jax import losses
from ranktuner_jax.diagnostics.report import aggregates
from ranktuner_jax.diagnostics.report.aggregates import Aggregates
from ranktuner_jax.diagnostics.report.audited import label
from ranktuner_jax.diagnostics.report.charts import (
    Floats,
    Spec,
    bars,
    cells,
    data,
    finish,
    heat,
    line,
    log_axis,
    matrix,
    short,
    text,
)
from ranktuner_jax.diagnostics.report.phrasing import percent

__all__ = ["audit_charts", "mass_groups", "noise_limit"]

# Bins of weights: 10 a decade; the outermost count what lies beyond.
_WEIGHT_DECADES = (-4, 3)
_WEIGHT_EDGES: Floats = np.linspace(*_WEIGHT_DECADES, 10 * 7 + 1)

# A whole logarithm as the power of ten that it stands for.
_POWER = (
    "datum.value == 0 ? '1' : (datum.value < 0 ? '10⁻' : '10')"
    " + slice('⁰¹²³⁴⁵⁶⁷⁸⁹', abs(datum.value), abs(datum.value) + 1)"
)


def audit_charts(sums: Aggregates) -> dict[str, Spec]:
    """Vega-Lite specifications of an audit's figures, by name."""
    return {
        "plane": plane(sums),
        "rank": rank_under_envelope(sums),
        "expected_rank": expected_rank_over_bound(sums),
        "weights": weight_distributions(sums),
        "effective": bars(
            [label(method) for method in sums.methods],
            sums.effective_share(),
            "effective share of the tokens",
            "Effective share of the tokens by method.",
        ),
        **{f"mass_{by}": loss_mass(sums, by) for by in ("p", "entropy", "position", "source")},
        "agreement": agreement(sums),
    }


def _top(counts: Floats, edges: Floats, axis: int) -> float:
    """The upper edge of the last bin with tokens."""
    used = np.flatnonzero(counts.sum(1 - axis))
    return float(edges[used[-1] + 1]) if len(used) else float(edges[-1])


def noise_limit(entropy: Floats) -> Floats:
    """The largest p that a token of the Noise Region can have at an entropy in nats.

    I < 1.05 says f(R) < f(E[R]) + log2 1.05; with E[R] ≥ s(H) and R ≤ 1/p, p lies under this. Below
    two bits s(H) is at least 1, which leaves p ≤ ½: a rank above 1.
    """
    bound = np.where(entropy >= aggregates.QUADRANT_ENTROPY, 0.25 * np.exp(entropy) + 1, 1.0)
    relative = 1 / np.log2(bound + 1) + np.log2(1 + losses.NOISE_WIDTH)
    return np.minimum(1 / (2 ** (1 / relative) - 1), 0.5)


def plane(sums: Aggregates) -> Spec:
    """Tokens by p and H, in quadrants, with the Noise Region."""
    top = max(_top(sums.plane, sums.entropy_edges, 1), 2.0)
    noise = sums.plane_noise / np.maximum(sums.plane, 1)
    rows = cells(sums.plane, aggregates.PROB_EDGES, sums.entropy_edges, noise=noise)
    x = alt.X(
        "x:Q",
        scale=alt.Scale(domain=[0, 1], nice=False),
        axis=alt.Axis(title="probability of the label, p", tickCount=5),
    )
    y = alt.Y(
        "y:Q",
        scale=alt.Scale(domain=[0, top], nice=False),
        axis=alt.Axis(title="entropy H, nats", tickCount=6),
    )
    tooltip = [
        alt.Tooltip("x:Q", title="p from"),
        alt.Tooltip("y:Q", title="H from"),
        alt.Tooltip("tokens:Q", format=","),
        alt.Tooltip("noise:Q", title="of these in the Noise Region", format=".0%"),
    ]
    levels = np.linspace(0, top, 121)
    limit = [
        {"x": short(p), "y": short(h), "order": i}
        for i, (p, h) in enumerate(zip(noise_limit(levels), levels, strict=True))
    ]
    middle_p, middle_h = aggregates.QUADRANT_PROB, aggregates.QUADRANT_ENTROPY
    cross = alt.layer(
        alt.Chart(data([{"x": middle_p}])).mark_rule(style="quadrant").encode(x="x:Q"),
        alt.Chart(data([{"y": middle_h}])).mark_rule(style="quadrant").encode(y="y:Q"),
    )
    high = float(noise_limit(np.array(0.93 * top)))
    region = text(
        [{"x": high, "y": 0.93 * top, "text": "← Noise Region"}], "bound-name", align="left", dx=8
    )
    mostly = [
        {"x": (row["x"] + row["x2"]) / 2, "y": (row["y"] + row["y2"]) / 2}
        for row in rows
        if row["noise"] >= 0.5
    ]
    dots = alt.Chart(data(mostly)).mark_point(style="noise").encode(x="x:Q", y="y:Q")
    names = alt.layer(
        *(
            text(
                [{"x": x, "y": y, "text": name}],
                "quadrant-name",
                align=align,
                baseline=baseline,
                dx=6 if align == "left" else -6,
                dy=6 if baseline == "top" else -6,
            )
            for x, y, name, align, baseline in (
                (middle_p, middle_h, "known", "left", "top"),
                (middle_p, middle_h, "conflict", "right", "top"),
                (middle_p, middle_h, "open", "right", "bottom"),
                (middle_p, middle_h, "leading", "left", "bottom"),
            )
        )
    )
    chart = alt.layer(heat(rows, x, y, tooltip), cross, line(limit, "bound"), region, dots, names)
    return finish(
        chart,
        380,
        "Tokens by the label's probability and the entropy of the prediction, in four quadrants, "
        "with the Noise Region.",
    )


def _rank_axis(title: str, top: float) -> alt.Y:
    return alt.Y(
        "y:Q",
        scale=alt.Scale(domain=[0, top], nice=False),
        axis=alt.Axis(
            title=title,
            values=list(range(int(top) + 1)),
            labelExpr=_POWER,
        ),
    )


def rank_under_envelope(sums: Aggregates) -> Spec:
    """R against p, both in decades, under 1/p."""
    used = np.flatnonzero(sums.rank_plane.sum(1))
    low = float(aggregates.LOG_PROB_EDGES[used[0]]) if len(used) else -8.0
    low = min(np.floor(low), -1.0)
    top = max(np.ceil(_top(sums.rank_plane, sums.rank_edges, 1)), 1.0)
    rows = cells(sums.rank_plane, aggregates.LOG_PROB_EDGES, sums.rank_edges)
    x = alt.X(
        "x:Q",
        scale=alt.Scale(domain=[low, 0], nice=False),
        axis=alt.Axis(
            title="probability of the label, p",
            values=list(range(int(low), 1)),
            labelExpr=_POWER,
        ),
    )
    tooltip = [
        alt.Tooltip("x:Q", title="log₁₀ p from"),
        alt.Tooltip("y:Q", title="log₁₀ R from"),
        alt.Tooltip("tokens:Q", format=","),
    ]
    edge = [{"x": -y, "y": y, "order": y} for y in (0.0, min(top, -low))]
    name = text(
        [{"x": -0.62 * min(top, -low), "y": 0.62 * min(top, -low), "text": "1/p"}],
        "bound-name",
        align="left",
        dx=8,
        dy=-4,
    )
    chart = alt.layer(
        heat(rows, x, _rank_axis("rank of the label, R", top), tooltip), line(edge, "bound"), name
    )
    return finish(chart, 320, "Rank of the label against its probability, under the envelope 1/p.")


def expected_rank_over_bound(sums: Aggregates) -> Spec:
    """E[R] in decades against H, over the mean of s(H) in each bin of H."""
    right = max(_top(sums.expected_plane, sums.entropy_edges, 0), 2.0)
    top = max(np.ceil(_top(sums.expected_plane, sums.rank_edges, 1)), 1.0)
    rows = cells(sums.expected_plane, sums.entropy_edges, sums.rank_edges)
    x = alt.X(
        "x:Q",
        scale=alt.Scale(domain=[0, right], nice=False),
        axis=alt.Axis(title="entropy H, nats", tickCount=6),
    )
    tooltip = [
        alt.Tooltip("x:Q", title="H from"),
        alt.Tooltip("y:Q", title="log₁₀ E[R] from"),
        alt.Tooltip("tokens:Q", format=","),
    ]
    middle = (sums.entropy_edges[1:] + sums.entropy_edges[:-1]) / 2
    count, total = sums.bound
    edge: list[dict[str, Any]] = [
        {"x": short(h), "y": short(np.log10(s / n)), "order": short(h)}
        for h, n, s in zip(middle, count, total, strict=True)
        if n
    ]
    name = text([edge[-1] | {"text": "s(H)"}], "bound-name", align="right", dy=14)
    chart = alt.layer(
        heat(rows, x, _rank_axis("expected rank, E[R]", top), tooltip), line(edge, "bound"), name
    )
    return finish(chart, 320, "Expected rank against entropy, over the bound s(H).")


def weight_distributions(sums: Aggregates) -> Spec:
    """One ridge a method, on one logarithmic axis of weights; each as high as its fullest bin."""
    values = aggregates.key_values()
    with np.errstate(divide="ignore"):
        index = np.searchsorted(_WEIGHT_EDGES, np.log10(values), side="right") - 1
    small = index < 0
    index = np.minimum(index, len(_WEIGHT_EDGES) - 2)
    names = [label(method) for method in sums.methods]
    ridges: list[dict[str, Any]] = []
    marks: list[dict[str, Any]] = []
    zeros: list[dict[str, Any]] = []
    occupied = np.zeros(len(_WEIGHT_EDGES) - 1, bool)
    for row, (method, keys) in enumerate(zip(sums.methods, sums.weight_keys, strict=True)):
        base = len(names) - 1 - row
        count = np.bincount(index[~small], weights=keys[~small], minlength=len(_WEIGHT_EDGES) - 1)
        occupied |= count > 0
        share, highest = count / max(sums.tokens, 1), max(count.max(), 1)
        ridges += [
            {
                "x": short(10**edge),
                "y": base,
                "y2": short(base + 0.85 * n / highest),
                "method": names[row],
                "share": short(s),
            }
            for edge, n, s in zip(_WEIGHT_EDGES, count, share, strict=False)
        ]
        mean = sums.weight[row] / max(sums.tokens, 1)
        marks.append({"x": short(mean), "y": base, "method": names[row], "what": "mean"})
        middle = sums.quantile(method, 0.5)
        if middle >= 10 ** _WEIGHT_DECADES[0]:
            marks.append({"x": short(middle), "y": base, "method": names[row], "what": "median"})
        if zero := keys[small].sum() / max(sums.tokens, 1):
            zeros.append({"y": base + 0.4, "text": f"{percent(zero)} below"})
    used = np.flatnonzero(occupied)
    first, last = (used[0], used[-1] + 1) if len(used) else (0, len(_WEIGHT_EDGES) - 1)
    # One bin of space on either side, and room at the left for the text on smaller weights.
    left = 10 ** float(_WEIGHT_EDGES[max(first - (8 if zeros else 1), 0)])
    right = 10 ** float(_WEIGHT_EDGES[min(last + 1, len(_WEIGHT_EDGES) - 1)])
    ridges = [row for row in ridges if left <= row["x"] <= right * 1.0001]
    quoted = ",".join(
        "'" + name.replace("\\", "\\\\").replace("'", "\\'") + "'" for name in names[::-1]
    )
    x = alt.X(
        "x:Q",
        scale=alt.Scale(type="log", domain=[left, right], nice=False),
        axis=log_axis("weight of a token", left, right),
    )
    y = alt.Y(
        "y:Q",
        scale=alt.Scale(domain=[-0.2, len(names)], nice=False),
        axis=alt.Axis(
            title=None,
            values=list(range(len(names))),
            labelExpr=f"[{quoted}][datum.value]",
            labelOverlap=False,
            tickCount=len(names),  # With fewer, Vega drops every second value.
            labelBaseline="bottom",
            grid=True,
        ),
    )
    area = (
        alt.Chart(data(ridges))
        .mark_area(style="ridge", interpolate="step-after", clip=True)
        .encode(x=x, y=y, y2="y2:Q", detail="method:N")
    )
    points = (
        alt.Chart(data(marks))
        .mark_point(style="mark", filled=True)
        .encode(
            x="x:Q",
            y="y:Q",
            shape=alt.Shape(
                "what:N",
                scale=alt.Scale(domain=["mean", "median"], range=["diamond", "triangle-up"]),
                legend=alt.Legend(title=None),
            ),
            tooltip=[
                alt.Tooltip("method:N"),
                alt.Tooltip("what:N", title="which"),
                alt.Tooltip("x:Q", title="weight"),
            ],
        )
    )
    below = (
        alt.Chart(data(zeros))
        .mark_text(style="note", align="left", dx=4)
        .encode(x=alt.value(0), y="y:Q", text="text:N")
    )
    return finish(
        alt.layer(area, points, below), 34 * len(names) + 20, "Distribution of weights by method."
    )


def mass_groups(sums: Aggregates, by: str) -> tuple[list[str], Floats, Floats]:
    """Groups of tokens: their names, [G] shares of the tokens, [M, G] of the weighted nll."""
    if by in ("p", "entropy"):
        return [str(i + 1) for i in range(10)], np.full(10, 0.1), sums.deciles(by)
    if by == "position":
        used = np.flatnonzero(sums.by_position)
        starts = [int(start) for start in aggregates.POSITION_EDGES]
        names = [
            f"{starts[i]}–{starts[i + 1] - 1}" if i + 1 < len(starts) else f"{starts[i]}–"
            for i in used
        ]
        count, mass = sums.by_position[used], sums.by_position_mass[:, used]
    else:
        order = sorted(sums.by_source, key=lambda name: -sums.by_source[name])
        names, rest = order[:11], order[11:]
        count = np.array([sums.by_source[name] for name in names])
        mass = np.stack([sums.by_source_mass[name] for name in names], axis=1)
        if rest:
            names = [*names, f"{len(rest)} others"]
            count = np.append(count, sum(sums.by_source[name] for name in rest))
            others = np.sum([sums.by_source_mass[name] for name in rest], axis=0)
            mass = np.concatenate([mass, others[:, None]], axis=1)
    total = mass.sum(1, keepdims=True)
    return names, count / max(count.sum(), 1), mass / np.where(total == 0, 1.0, total)


_MASS_TITLES = {
    "p": "tenths by p, lowest first",
    "entropy": "tenths by H, lowest first",
    "position": "position, tokens",
    "source": "source",
}


def loss_mass(sums: Aggregates, by: str) -> Spec:
    """Heat map of the share of each method's weighted nll by group of tokens."""
    names, count, mass = mass_groups(sums, by)
    rows = [
        {
            "method": label(method),
            "group": name,
            "share": short(share),
            "tokens": short(tokens),
            "ratio": short(np.log2(max(share, 1e-9) / tokens)),
            "text": f"{100 * share:.0f}",
        }
        for method, shares in zip(sums.methods, mass, strict=True)
        if shares.any()  # A method that drops all tokens has no loss to divide.
        for name, share, tokens in zip(names, shares, count, strict=True)
    ]
    return matrix(
        rows,
        x=alt.X(
            "group:N", sort=None, axis=alt.Axis(title=_MASS_TITLES[by], labelAngle=_angle(names))
        ),
        y=alt.Y("method:N", sort=None, axis=alt.Axis(title=None)),
        color=alt.Color(
            "ratio:Q",
            # Orange is more, as in the text.
            scale=alt.Scale(
                range="diverging", domain=[-3, 3], reverse=True, clamp=True, interpolate="rgb"
            ),
            legend=alt.Legend(
                title="loss relative to tokens",
                values=[-3, -2, -1, 0, 1, 2, 3],
                labelExpr="['⅛','¼','½','1','2','4','8'][datum.value + 3]",
            ),
        ),
        tooltip=[
            alt.Tooltip("method:N"),
            alt.Tooltip("group:N"),
            alt.Tooltip("share:Q", title="share of the weighted nll", format=".1%"),
            alt.Tooltip("tokens:Q", title="share of the tokens", format=".1%"),
        ],
        height=22 * len(sums.methods),
        description=f"Share of the weighted nll by {_MASS_TITLES[by]}, per method.",
    )


def _angle(names: Sequence[str]) -> int:
    return 0 if max(map(len, names), default=0) <= 2 else -40


def agreement(sums: Aggregates) -> Spec:
    """Heat map of Spearman's rank correlation between methods."""
    names, values, _ = sums.correlation()
    labels = [label(name) for name in names]
    rows = [
        {
            "a": a,
            "b": b,
            "value": short(values[i, j]),
            "text": f"{values[i, j]:.2f}".replace("0.", ".").replace("1.00", "1"),
        }
        for i, a in enumerate(labels)
        for j, b in enumerate(labels)
    ]
    return matrix(
        rows,
        x=alt.X("a:N", sort=None, axis=alt.Axis(title=None, labelAngle=-50)),
        y=alt.Y("b:N", sort=None, axis=alt.Axis(title=None)),
        color=alt.Color(
            "value:Q",
            scale=alt.Scale(range="diverging", domain=[-1, 1], interpolate="rgb"),
            legend=alt.Legend(title="rank correlation", tickCount=5),
        ),
        tooltip=[
            alt.Tooltip("a:N", title="method"),
            alt.Tooltip("b:N", title="and"),
            alt.Tooltip("value:Q", title="rank correlation"),
        ],
        height=24 * max(len(labels), 1),
        description="Spearman's rank correlation between the weights of the methods.",
    )
