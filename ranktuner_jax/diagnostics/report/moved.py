"""The page of what moved between two audits of the same data."""

from __future__ import annotations

import os
import pathlib
from typing import Any

import altair as alt
import numpy as np

from ranktuner_jax.diagnostics.report.aggregates import PROB_EDGES, QUADRANTS
from ranktuner_jax.diagnostics.report.audited import Audit, open_audit
from ranktuner_jax.diagnostics.report.charts import Spec, cells, data, finish, heat, line
from ranktuner_jax.diagnostics.report.moves import (
    CHANGE_EDGES,
    MOVED,
    SHOWN,
    MovedToken,
    Moves,
    count_moves,
)
from ranktuner_jax.diagnostics.report.page import Figure, Marked, Page, Section, Table, write_page
from ranktuner_jax.diagnostics.report.phrasing import counted, number, percent
from ranktuner_jax.errors import UserError

__all__ = ["write_moved_report"]

_TYPE_TOKENS = 5  # A token type is ranked once it occurs this often.


def write_moved_report(
    before: str | os.PathLike[str],
    after: str | os.PathLike[str],
    output: str | os.PathLike[str],
) -> pathlib.Path:
    """Writes a page that says which tokens were learnt and which were lost between two audits.

    Args:
      before: The folder of the first audit.
      after: The folder of the second one, of the same data under another model.
      output: The HTML file to write.

    Returns:
      Its path.

    Raises:
      UserError: If a folder holds no finished audit, or the two are of different tokens.
    """
    pair = open_audit(before), open_audit(after)
    moves = count_moves(*pair)
    if not moves.tokens:
        raise UserError(
            f"{before}: expected supervised tokens with a finite nll in both audits, got none; "
            "check the data of the audits"
        )
    return pathlib.Path(write_page(pathlib.Path(output), _page(pair, moves)))


def _page(pair: tuple[Audit, Audit], moves: Moves) -> Page:
    n = moves.tokens
    nll, first, noise = moves.nll / n, moves.first / n, moves.noise / n
    names = [str(audit.about["model"]) for audit in pair]
    same = names[0] == names[1]
    lead = " and ".join(
        f"{when}: {audit.folder.name if same else name}"
        for when, name, audit in zip(("Before", "after"), names, pair, strict=True)
    )
    about = pair[0].about
    return Page(
        title="What moved",
        lead=f"{lead}, on {about['source']} ({about['split']}).",
        facts={
            "tokens": f"{n:,}",
            "mean nll, nats": f"{nll[0]:.3f} → {nll[1]:.3f}",
            "label is first choice": f"{percent(first[0])} → {percent(first[1])}",
            "in the Noise Region": f"{percent(noise[0])} → {percent(noise[1])}",
        },
        sections=[
            Section(
                "Probability before and after",
                _plane_words(moves),
                [Figure("Tokens by p before and p after", _plane_chart(moves))],
            ),
            Section(
                "How far each token moved",
                _change_words(moves),
                [Figure("Change of the nll, after minus before", _change_chart(moves))],
            ),
            Section(
                "From quadrant to quadrant", _quadrant_words(moves), tables=[_quadrant_table(moves)]
            ),
            Section(
                "Tokens that were learnt, and lost",
                [
                    "Learnt are the tokens whose nll fell most, lost those whose nll rose most. "
                    "The place is the conversation and the position in it, from 0.",
                ],
                tables=[
                    _token_table("Learnt most", moves.far(0)),
                    _token_table("Lost most", moves.far(1)),
                ],
                wide=True,
            ),
            Section("By token type", _type_words(moves), tables=_type_tables(moves), wide=True),
        ],
        footer=(
            f"{pair[0].folder.name} and {pair[1].folder.name}; nll in nats."
            + (
                f" {counted(moves.left_out, 'token')} whose nll is not finite "
                f"{'is' if moves.left_out == 1 else 'are'} left out."
                if moves.left_out
                else ""
            )
        ),
    )


def _plane_chart(moves: Moves) -> Spec:
    def axis(title: str) -> dict[str, Any]:
        return {
            "scale": alt.Scale(domain=[0, 1], nice=False),
            "axis": alt.Axis(title=title, tickCount=5),
        }

    chart = alt.layer(
        heat(
            cells(moves.plane, PROB_EDGES, PROB_EDGES),
            alt.X("x:Q", **axis("p before")),
            alt.Y("y:Q", **axis("p after")),
            [
                alt.Tooltip("x:Q", title="p before from"),
                alt.Tooltip("y:Q", title="p after from"),
                alt.Tooltip("tokens:Q", format=","),
            ],
        ),
        line([{"x": x, "y": x, "order": x} for x in (0, 1)], "bound"),
    )
    return finish(chart, 380, "Probability of each token before and after.")


def _change_chart(moves: Moves) -> Spec:
    rows: list[dict[str, Any]] = [
        {
            "x": float(low),
            "x2": float(high),
            "share": float(count / moves.tokens),
            "what": "learnt" if high <= 0 else "lost",
        }
        for low, high, count in zip(CHANGE_EDGES, CHANGE_EDGES[1:], moves.change, strict=False)
    ]
    used = [row for row in rows if row["share"]]
    reach = max([1.0, *(abs(row["x"]) for row in used), *(abs(row["x2"]) for row in used)])
    chart = (
        alt.Chart(data(used))
        .mark_bar(binSpacing=1)
        .encode(
            x=alt.X(
                "x:Q",
                bin="binned",
                scale=alt.Scale(domain=[-reach, reach]),
                axis=alt.Axis(title="change of the nll, nats", tickCount=8, format="+~g"),
            ),
            x2="x2:Q",
            y=alt.Y(
                "share:Q",
                scale=alt.Scale(type="sqrt"),
                axis=alt.Axis(title="share of the tokens (square-root scale)", format="~%"),
            ),
            color=alt.Color(
                "what:N",
                scale=alt.Scale(domain=["learnt", "lost"], range="category"),
                legend=alt.Legend(title=None),
            ),
            tooltip=[
                alt.Tooltip("x:Q", title="from"),
                alt.Tooltip("x2:Q", title="to"),
                alt.Tooltip("share:Q", format=".2%"),
            ],
        )
    )
    return finish(chart, 260, "Change of the nll of the tokens.")


def _plane_words(moves: Moves) -> list[str]:
    n = moves.tokens
    fell, rose = moves.learnt / n, moves.lost / n
    stayed = (n - moves.learnt - moves.lost) / n
    return [
        "Tokens above the orange line are more probable than before, those below it less. "
        f"The nll of {percent(fell)} of the {counted(n, 'token')} fell by more than {MOVED} nats, "
        f"that of {percent(rose)} rose by more; {percent(stayed)} stayed where they were.",
        f"The label is the first choice for {percent(moves.first[1] / n)} of the tokens; before, "
        f"for {percent(moves.first[0] / n)}.",
    ]


def _change_words(moves: Moves) -> list[str]:
    n = moves.tokens
    change = (moves.nll[1] - moves.nll[0]) / n
    verb = "fell" if change < 0 else "rose"
    sentences = [
        f"The mean nll {verb} by {number(abs(change))} nats: tokens that were learnt account for "
        f"−{number(moves.gained / n)}, tokens that were lost for +{number(moves.given_back / n)}."
        if change
        else "The mean nll did not change."
    ]
    if moves.gained and moves.given_back:
        sentences.append(
            f"Of what was learnt, {percent(min(moves.given_back / moves.gained, 1.0))} was given "
            "back elsewhere."
            if moves.given_back <= moves.gained
            else "More was lost than was learnt."
        )
    if moves.change[0] or moves.change[-1]:
        sentences.append("The outermost bars hold the changes beyond 8 nats, too.")
    return sentences


def _quadrant_names() -> list[str]:
    return [name.split(":")[0] for name in QUADRANTS]


def _quadrant_table(moves: Moves) -> Table:
    names = _quadrant_names()
    total = moves.quadrants.sum(1)
    rows = []
    for i, name in enumerate(names):
        if not total[i]:
            continue
        rows.append(
            [
                name,
                f"{int(total[i]):,}",
                *(percent(share) for share in moves.quadrants[i] / total[i]),
                f"{moves.quadrant_change[i] / total[i]:+.3f}".replace("-", "−"),
            ]
        )
    return Table(
        "Where the tokens of each quadrant are afterwards, and the mean change of their nll",
        ["before", "tokens", *(f"→ {name}" for name in names), "Δ nll"],
        rows,
    )


def _quadrant_words(moves: Moves) -> list[str]:
    names = _quadrant_names()
    stayed = float(np.trace(moves.quadrants)) / moves.tokens
    where = [q.split(": ")[1] for q in QUADRANTS]
    sentences = [
        "The quadrants of the (p, H) plane: "
        + "; ".join(f"{name}, {place}" for name, place in zip(names, where, strict=True))
        + f". {percent(stayed)} of the tokens are in the quadrant that they were in."
    ]
    flows = moves.quadrants.copy()
    np.fill_diagonal(flows, 0)
    if flows.any():
        i, j = np.unravel_index(int(np.argmax(flows)), flows.shape)
        sentences.append(
            f"The largest move is from “{names[i]}” to “{names[j]}”: "
            f"{counted(int(flows[i, j]), 'token')}; {int(flows[j, i]):,} went the other way."
        )
    conflicts = moves.quadrants[1].sum()
    if conflicts:
        solved = moves.quadrants[1, [0, 3]].sum() / conflicts
        sentences.append(
            f"Of the {counted(int(conflicts), 'conflict')}, where the prediction was narrow and "
            f"most of it not the label, {percent(solved)} now "
            f"{'has' if conflicts == 1 else 'have'} p ≥ ½."
        )
    return sentences


def _token_table(caption: str, tokens: list[MovedToken]) -> Table:
    return Table(
        caption,
        ["in context", "p before", "p after", "Δ nll", "where"],
        [
            [
                Marked(*(_visible(text) for text in (one.before, one.token, one.after))),
                number(one.probs[0]),
                number(one.probs[1]),
                f"{one.nlls[1] - one.nlls[0]:+.2f}".replace("-", "−"),
                f"{one.conversation}:{one.position}",
            ]
            for one in tokens
        ],
    )


def _type_words(moves: Moves) -> list[str]:
    ranked = np.flatnonzero(moves.type_count >= _TYPE_TOKENS)
    better = int(np.sum(moves.type_change[ranked] < 0))
    sentences = [
        f"{counted(len(ranked), 'token type')} occur{'s' if len(ranked) == 1 else ''} at least "
        f"{_TYPE_TOKENS} times; the mean nll of {better:,} of them fell."
    ]
    total = -moves.type_change.sum()
    best = np.sort(-moves.type_change)[::-1][:10].sum()
    if total > 0:
        sentences.append(
            f"The ten types that were learnt most account for {percent(best / total)} of the whole "
            "fall of the nll" + (": others rose." if best > total else ".")
        )
    return sentences


def _type_tables(moves: Moves) -> list[Table]:
    ranked = np.flatnonzero(moves.type_count >= _TYPE_TOKENS)
    total = moves.type_change[ranked]
    order = np.argsort(total)
    tables = []
    for caption, chosen in (
        ("Learnt most, by the sum over all occurrences", [i for i in order if total[i] < 0]),
        ("Lost most, by the sum over all occurrences", [i for i in order[::-1] if total[i] > 0]),
    ):
        rows: list[list[str | Marked]] = []
        for i in chosen[:SHOWN]:
            count = moves.type_count[ranked[i]]
            rows.append(
                [
                    Marked("", _visible(moves.type_text[int(ranked[i])]), ""),
                    f"{int(count):,}",
                    f"{total[i]:+.2f}".replace("-", "−"),
                    f"{total[i] / count:+.3f}".replace("-", "−"),
                ]
            )
        tables.append(Table(caption, ["token", "count", "Σ Δ nll", "mean Δ nll"], rows))
    return tables


def _visible(text: str) -> str:
    return text.replace("\n", "⏎").replace("\t", "⇥")
