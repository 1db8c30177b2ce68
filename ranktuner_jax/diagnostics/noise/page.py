"""report.html of a noise run: our tables beside the paper's, and how recall moves with the rate."""

from __future__ import annotations

import itertools
import os
import pathlib
from typing import Any

import altair as alt

from ranktuner_jax.diagnostics.noise.result import (
    PAPER,
    RESULTS,
    Result,
    Table,
    compare,
    meaning,
    title,
)
from ranktuner_jax.diagnostics.noise.table import MEASURES, Measure
from ranktuner_jax.diagnostics.report.charts import data, finish
from ranktuner_jax.diagnostics.report.page import Figure, Page, Section, write_page
from ranktuner_jax.diagnostics.report.page import Table as PageTable
from ranktuner_jax.errors import UserError

__all__ = ["write_noise_report"]

# The scores of the paper's rows.
_CURVES = ("H", "1 − p", "S bound")


def write_noise_report(folder: str | os.PathLike[str]) -> pathlib.Path:
    """Writes report.html into the folder of a finished noise run, from results.json alone.

    Args:
      folder: The folder, as `ranktuner noise --output` leaves it.

    Returns:
      The path of report.html, one file that needs no network.

    Raises:
      UserError: If the folder does not hold a finished run.
    """
    path = pathlib.Path(folder, RESULTS)
    try:
        result = Result.from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder}: expected the folder of a finished ranktuner noise, got none "
            f"({type(error).__name__}: {error})"
        ) from error
    if not result.tables:
        raise UserError(f"{folder}: expected a finished ranktuner noise, got an unfinished one")
    page = pathlib.Path(folder, "report.html")
    write_page(page, _page(result))
    return page


def _page(result: Result) -> Page:
    settings = result.settings
    rates = [
        Section(
            title=f"By rate: {meaning(tables[0])}",
            words=["The share of the noise in the top 10 % of all tokens, with its interval."],
            figures=[Figure("TOK REC@10% by the rate of noise", _by_rate(tables))],
        )
        for tables in _groups(result).values()
        if len(tables) > 1
    ]
    return Page(
        title="Noise in the top 10 %",
        lead=f"Table 1 of the RankTuner paper, with {settings['model']} on "
        f"{settings['data']['source']}.",
        facts={
            "sequences": f"{result.sequences:,}",
            "supervised tokens": f"{result.tokens:,}",
            "draws": str(settings["seeds"]),
        },
        sections=[*rates, *itertools.chain(*map(_sections, result.tables)), _meanings()],
        footer="Intervals are of 95 %, over sequences like these. The paper: arXiv:2602.01745.",
    )


def _groups(result: Result) -> dict[tuple[str, int], list[Table]]:
    groups: dict[tuple[str, int], list[Table]] = {}
    for table in result.tables:
        groups.setdefault((table.kind, table.length), []).append(table)
    return groups


def _sections(table: Table) -> list[Section]:
    theirs = {"tok_prec": "paper", "tok_rec": "paper", "hit_span": "paper, HIT"}
    columns = ["tokens by"]
    for name, (heading, _) in MEASURES.items():
        columns += [heading, *([theirs[name]] if name in theirs else [])]
    rows = []
    for score, row in table.rows.items():
        cells = [score]
        for name, measure in row.items():
            cells.append(_words(measure))
            if name in theirs:
                number = PAPER.get(score, {}).get("hit" if name == "hit_span" else name)
                cells.append("" if number is None else f"{100 * number:g}")
        rows.append(cells)
    figure = Figure("TOK REC@10%: ours with its interval, the paper's, chance", _recall(table))
    numbers = PageTable("In %, with 95 % intervals", columns, rows, text=())
    return [
        Section(title(table), words=compare(table), figures=[figure]),
        Section(f"In numbers: {meaning(table)}", tables=[numbers], wide=True),
    ]


def _words(measure: Measure) -> str:
    value, low, high = (100 * share for share in (measure.value, measure.low, measure.high))
    # Without a place where a line may end.
    return f"{value:.2f}\u00a0({low:.1f}\u2060–\u2060{high:.1f})"


def _meanings() -> Section:
    rows = [list(words) for words in MEASURES.values()]
    return Section(
        title="What is measured",
        words=[
            "The paper does not define SEQ HIT: HIT mean, HIT any and HIT span are three readings "
            "of it. Ties are broken by expectation.",
            "A share of all tokens that is 0 or 100 % in every draw has an interval without width; "
            "with n polluted sequences, the share in sequences like these may be 3/n away.",
        ],
        tables=[PageTable("Measures", ["measure", "meaning"], rows, text=(0, 1))],
    )


def _recall(table: Table) -> dict[str, Any]:
    rows = [
        {"score": score, **_ends(row["tok_rec"]), "paper": PAPER.get(score, {}).get("tok_rec")}
        for score, row in table.rows.items()
    ]
    score = alt.Y("score:N", sort=None, axis=alt.Axis(title=None))
    share = alt.X(
        "value:Q",
        axis=alt.Axis(title="share of the noise in the top 10 %", format="%"),
        scale=alt.Scale(domain=[0, 1]),
    )
    tooltip = [
        alt.Tooltip("score:N"),
        *(alt.Tooltip(f"{name}:Q", format=".1%") for name in ("value", "low", "high", "paper")),
    ]
    base = alt.Chart(data(rows)).encode(y=score, tooltip=tooltip)
    ours = base.mark_point(style="first", filled=True, size=60).encode(x=share)
    interval = base.mark_rule(style="first").encode(x="low:Q", x2="high:Q")
    paper = (
        base.transform_filter("datum.paper != null")
        .mark_point(style="second", shape="diamond", size=90)
        .encode(x="paper:Q")
    )
    chance = alt.Chart(data([{"value": 0.1}])).mark_rule(style="quadrant").encode(x="value:Q")
    return finish(
        alt.layer(chance, interval, ours, paper),
        24 * len(rows),
        "Recall of the noise by score, with intervals, the paper's values and chance.",
    )


def _by_rate(tables: list[Table]) -> dict[str, Any]:
    rows = [
        {
            "rate": sum(table.realised) / len(table.realised),
            "score": score,
            **_ends(table.rows[score]["tok_rec"]),
        }
        for table in tables
        for score in _CURVES
    ]
    base = alt.Chart(data(rows)).encode(
        x=alt.X(
            "rate:Q",
            axis=alt.Axis(title="rate of noise", format="%"),
            scale={"type": "log", "nice": False},
        ),
        color=alt.Color("score:N", sort=None, legend=alt.Legend(title="tokens by")),
    )
    share = alt.Axis(title="share of the noise in the top 10 %", format="%")
    lines = base.mark_line(point=True).encode(y=alt.Y("value:Q", axis=share))
    intervals = base.mark_rule().encode(y="low:Q", y2="high:Q")
    return finish(alt.layer(intervals, lines), 300, "Recall of the noise by its rate.")


def _ends(measure: Measure) -> dict[str, float]:
    return {name: round(getattr(measure, name), 5) for name in ("value", "low", "high")}
