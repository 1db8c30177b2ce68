"""The numbers of a comparison as tables, on the terminal and on the page."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import rich.console
import rich.markup
import rich.table

from ranktuner_jax.compare.analysis import (
    OVER_BOTH,
    OVER_QUESTIONS,
    Analysis,
    Estimate,
    Measured,
    MethodResult,
)
from ranktuner_jax.diagnostics.report.audited import label
from ranktuner_jax.diagnostics.report.page import Table
from ranktuner_jax.diagnostics.report.phrasing import counted, number

__all__ = [
    "UNADJUSTED",
    "change",
    "drawn",
    "is_share",
    "method_label",
    "p_text",
    "secondary",
    "show",
    "tables",
    "title",
    "value",
]

_TITLES = {
    "nll": "plain NLL, nats",
    "token_accuracy": "token accuracy",
    "retention_nll": "NLL of earlier text, nats",
    "grad_norm": "gradient norm",
    "clip_share": "steps clipped",
    "seconds": "seconds of training",
    "memory_gb": "memory of a step, GB",
}
_SHARES = ("token_accuracy", "clip_share")

UNADJUSTED = (
    "These intervals are not adjusted for their number. The plain NLL favours SFT, which minimises "
    "it."
)

# Of a terminal that does not say how wide it is, such as a file.
_WIDTH = 128


def method_label(method: str) -> str:
    """How a method with its options is written for people.

    Example:
      >>> method_label("sft"), method_label("ranktuner:base=one:clip=3")
      ('SFT', 'RankTuner base=one clip=3')
    """
    name, *options = method.split(":")
    return " ".join([label(name), *options])


def title(name: str) -> str:
    """What a quantity is called; scores have their own names.

    Example:
      >>> title("grad_norm"), title("target/pass@4")
      ('gradient norm', 'target/pass@4')
    """
    return _TITLES.get(name, name)


def is_share(name: str, measured: Measured) -> bool:
    """Whether a quantity is shown in percent and its differences in percentage points."""
    return measured.questions > 0 or name in _SHARES


def value(name: str, measured: Measured) -> str:
    """A mean with its interval."""
    one = measured.mean
    if is_share(name, measured):
        return f"{100 * one.value:.1f}\u00a0%" + _interval(one, lambda x: f"{100 * x:.1f}")
    return _plain(one.value) + _interval(one, _plain)


def change(name: str, measured: Measured) -> str:
    """A difference from the baseline with its interval; "" where there is none."""
    one = measured.difference
    if one is None:
        return ""
    if is_share(name, measured):
        return f"{_points(one.value)}\u00a0points{_interval(one, _points)}"
    return signed(one.value) + _interval(one, signed)


def signed(x: float) -> str:
    """A number with its sign, to three digits.

    Example:
      >>> signed(-0.01234), signed(1234.5), signed(0.0)
      ('−0.0123', '+1,234', '0')
    """
    sign = "+" if x > 0 else "−" if x < 0 else ""
    return sign + number(abs(x))


def p_text(p: float | None) -> str:
    """A p-value; "" where there is none.

    Example:
      >>> p_text(0.0421), p_text(1e-5), p_text(None)
      ('0.042', '< 0.001', '')
    """
    if p is None:
        return ""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def drawn(measured: Measured) -> str:
    """What the intervals of a score count as drawn at random."""
    questions = counted(measured.questions, "question")
    seeds = counted(len(measured.mean.by_seed), "seed")
    if measured.over == OVER_QUESTIONS:
        return f"There is one seed: intervals are over its {questions} only, not over runs."
    if measured.over == OVER_BOTH:
        return (
            f"All {seeds} answer the same {questions}: intervals are over both, as drawn at random."
        )
    return f"Each of {seeds} has questions of its own, {questions} in all: intervals are over both."


def tables(analysis: Analysis, group: str) -> list[Table]:
    """The primary score by method, and every other quantity by method."""
    methods = analysis.groups[group]
    base = method_label(analysis.baseline)
    return [
        Table(
            f"{analysis.primary}, the primary score, with 95\u00a0% intervals",
            [
                "method",
                "learning rate",
                "runs",
                "score",
                f"minus {base}",
                "p",
                "p, Holm",
                "verdict",
            ],
            [
                [
                    method_label(method.method),
                    f"{method.rate:g}",
                    _runs(method),
                    value(analysis.primary, method.measured[analysis.primary]),
                    change(analysis.primary, method.measured[analysis.primary]),
                    p_text(method.p),
                    p_text(method.p_holm),
                    method.verdict(analysis.primary, analysis.primary),
                ]
                for method in methods
            ],
            text=(0, 7),
        ),
        Table(
            "Other measures, with 95\u00a0% intervals",
            ["measure", "method", "mean", f"minus {base}", "verdict"],
            [
                [
                    title(name) if method is methods[0] else "",
                    method_label(method.method),
                    value(name, method.measured[name]),
                    change(name, method.measured[name]),
                    method.verdict(name, analysis.primary),
                ]
                for name in secondary(analysis, methods)
                for method in methods
                if name in method.measured
            ],
            text=(0, 1, 4),
        ),
    ]


def secondary(analysis: Analysis, methods: Sequence[MethodResult]) -> list[str]:
    """The quantities beside the primary score, scores first."""
    found = dict.fromkeys(name for method in methods for name in method.measured)
    known = [*analysis.scores, *_TITLES, *found]
    return [name for name in sorted(found, key=known.index) if name != analysis.primary]


def show(analysis: Analysis, console: rich.console.Console) -> None:
    """Prints the tables of each analysis, the main one first."""
    if not console.is_terminal:
        console.width = _WIDTH
    for group, methods in analysis.groups.items():
        notes = drawn(methods[0].measured[analysis.primary]), UNADJUSTED
        for table, note in zip(tables(analysis, group), notes, strict=True):
            shown = rich.table.Table(
                title="Loss divided by the sum of the weights" if group == "weights" else None,
                caption=f"{table.caption}. {note}",
                caption_justify="left",
            )
            for index, name in enumerate(table.columns):
                shown.add_column(name, justify="left" if index in table.text else "right")
            grouped = any(not row[0] for row in table.rows)
            for row in table.rows:
                if grouped and row[0]:
                    shown.add_section()
                # Intervals in a line of their own: narrower, and easier to compare.
                cells = (str(cell).replace(" (", "\n(") for cell in row)
                shown.add_row(*map(rich.markup.escape, cells))
            console.print(shown)


def _runs(method: MethodResult) -> str:
    runs = len(method.seeds)
    unpaired = method.p is not None and method.pairs < runs
    return f"{runs} ({method.pairs} paired)" if unpaired else str(runs)


def _points(share: float) -> str:
    # Without a negative zero.
    return f"{round(100 * share, 1) + 0.0:+.1f}".replace("-", "−")


def _plain(x: float) -> str:
    return signed(x).removeprefix("+")


def _interval(one: Estimate, text: Callable[[float], str]) -> str:
    if one.low is None or one.high is None:
        return ""
    # A line may end before the interval, but not inside.
    return f" ({text(one.low)}\u00a0to\u00a0{text(one.high)})"
