"""report.html of one audit: what the weights do to these data under this model."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence

import numpy as np

from ranktuner_jax.diagnostics.report import aggregates, phrasing, words
from ranktuner_jax.diagnostics.report.aggregates import Aggregates, Extreme, aggregate
from ranktuner_jax.diagnostics.report.audit_charts import audit_charts
from ranktuner_jax.diagnostics.report.audited import Audit, label, open_audit
from ranktuner_jax.diagnostics.report.conversations import encode
from ranktuner_jax.diagnostics.report.page import (
    Figure,
    Marked,
    Page,
    Section,
    Table,
    write_page,
    write_pictures,
)
from ranktuner_jax.errors import UserError

__all__ = ["write_audit_report", "write_figures"]

# A token type is ranked once it occurs this often.
_TYPE_TOKENS = 5
_TYPES = 10


def write_audit_report(folder: str | os.PathLike[str]) -> pathlib.Path:
    """Writes report.html into the folder of a finished audit.

    It reads audit.json, tokens.parquet and conversations.jsonl, the tokens batch by batch.

    Args:
      folder: The folder, as `ranktuner audit --output` leaves it.

    Returns:
      The path of report.html, one file that needs no network.

    Raises:
      UserError: If a file is missing or of another version, or no token is supervised.
    """
    audit = open_audit(folder)
    sums = _aggregate(audit)
    return pathlib.Path(write_page(audit.folder / "report.html", _page(audit, sums)))


def write_figures(
    folder: str | os.PathLike[str], output_dir: str | os.PathLike[str]
) -> list[pathlib.Path]:
    """Writes the charts of an audit's report as pictures, `output_dir/NAME.png`.

    Raises:
      UserError: If the folder does not hold a finished audit.
    """
    return write_pictures(audit_charts(_aggregate(open_audit(folder))), output_dir)


def _aggregate(audit: Audit) -> Aggregates:
    sums = aggregate(audit)
    if not sums.tokens:
        raise UserError(
            f"{audit.folder}: expected supervised tokens with a finite nll, got none; "
            "check the data of the audit"
        )
    return sums


def _page(audit: Audit, sums: Aggregates) -> Page:
    specs = audit_charts(sums)
    about = audit.about
    n = sums.tokens

    def figure(name: str, caption: str) -> Figure:
        return Figure(caption, specs[name])

    sections = [
        Section(
            "Probability and entropy",
            words.plane(sums),
            [figure("plane", "Tokens by probability of the label and entropy")],
            [_regions(sums)],
        ),
        Section(
            "Rank under its envelope",
            words.rank(sums),
            [figure("rank", "Rank of the label against its probability, logarithmic")],
        ),
        Section(
            "Expected rank over its bound",
            words.expected_rank(sums),
            [figure("expected_rank", "Expected rank against entropy")],
        ),
        Section(
            "Weights",
            words.weights(sums),
            [figure("weights", "Distribution of the weights, one ridge a method")],
        ),
        Section(
            "Effective share of the tokens",
            words.effective(sums),
            [figure("effective", "(Σw)²/(n·Σw²) by method")],
        ),
        Section(
            "Where the loss lies",
            words.loss_mass(sums),
            [
                figure("mass_p", "By probability of the label"),
                figure("mass_entropy", "By entropy"),
                figure("mass_position", "By position in the conversation"),
                *([figure("mass_source", "By source")] if len(sums.by_source) > 1 else []),
            ],
            wide=True,
        ),
        Section(
            "Agreement between methods",
            words.agreement(sums),
            [figure("agreement", "Spearman's rank correlation of the weights")],
        ),
        Section(
            "Conversations",
            [
                f"How they were chosen: {about['chosen'].strip().rstrip('.')}.",
                "The text is coloured by I (orange: the label ranks worse than expected, so "
                "RankTuner lifts it; blue: better) or by a method's weight (orange: over its "
                "mean). Point at a token, tap it, or move with the arrow keys to see its numbers; "
                "grey text is not supervised.",
            ],
            wide=True,
            reader=encode(audit.conversations(), sums.methods, list(sums.weight / n)),
        ),
        Section(
            "Heaviest and lightest",
            [
                "Single tokens in their context, and token types by their mean weight. Of equal "
                "weights, the token that the model finds less likely comes first.",
                _type_words(sums),
            ],
            wide=True,
            switch_label="Method",
            switched={label(method): _extremes(sums, method) for method in _uneven(sums)},
        ),
    ]
    left_out = (
        f" {phrasing.counted(sums.left_out, 'token')} whose nll is not finite "
        f"{'is' if sums.left_out == 1 else 'are'} left out."
        if sums.left_out
        else ""
    )
    return Page(
        title="What the weights do",
        lead=f"{about['model']} on {about['source']} ({about['split']}), scored without training.",
        facts={
            "supervised tokens": f"{n:,}",
            "conversations": f"{about['conversations']:,}",
            "mean nll, nats": f"{sums.sums['nll'] / n:.3f}",
            "label is first choice": phrasing.percent(sums.sums["top"] / n),
            "mean entropy, nats": f"{sums.sums['entropy'] / n:.3f}",
            "in the Noise Region": phrasing.percent(sums.regions[4] / n),
        },
        sections=sections,
        footer=(
            f"Statistics in nats over a vocabulary of {sums.vocab_size:,}; rows of "
            f"{about['row_length']:,} tokens; τ of TALR {phrasing.number(about['talr_tau'])}. "
            f"Scored in {about['seconds']:,.0f} s, {about['tokens_per_second']:,.0f} tokens/s."
            + left_out
        ),
    )


def _uneven(sums: Aggregates) -> list[str]:
    """The methods whose weights differ, those that the sentences compare first."""
    first = [sums.methods[i] for i in words.compared(sums)]
    ordered = [*first, *(method for method in sums.methods if method not in first)]
    return [m for m in ordered if sums.heaviest(m)[0].weight > sums.lightest(m)[0].weight]


def _regions(sums: Aggregates) -> Table:
    total = np.where(sums.weight == 0, 1.0, sums.weight)
    rows = [("all tokens", sums.regions / sums.tokens)]
    rows += [
        (label(method), share)
        for method, share in zip(sums.methods, sums.regions_weight / total[:, None], strict=True)
    ]
    names = [name.split(":")[0] for name in aggregates.QUADRANTS]
    return Table(
        "Share of the tokens, and of each method's weight, by quadrant and in the Noise Region",
        ["", *names, "Noise Region"],
        [[name, *(_hundredths(share) for share in shares)] for name, shares in rows],
    )


def _hundredths(share: float) -> str:
    return f"{100 * share:.1f}\u00a0%"


def _ranked_types(sums: Aggregates) -> np.ndarray:
    return np.flatnonzero(sums.type_count >= _TYPE_TOKENS)


def _type_words(sums: Aggregates) -> str:
    ranked, all_types = len(_ranked_types(sums)), int(np.sum(sums.type_count > 0))
    return (
        f"{phrasing.counted(all_types, 'token type')} occur{'s' if all_types == 1 else ''} in "
        f"these data; the {ranked:,} with at least {_TYPE_TOKENS} occurrences are ranked."
    )


def _extremes(sums: Aggregates, method: str) -> list[Table]:
    row = sums.methods.index(method)
    mean = sums.weight[row] / sums.tokens
    types = _ranked_types(sums)
    average = sums.type_weight[row, types] / sums.type_count[types]
    nll = sums.type_nll[types] / sums.type_count[types]
    heavy, light = np.lexsort((-nll, -average))[:_TYPES], np.lexsort((-nll, average))[:_TYPES]

    def tokens(name: str, chosen: Sequence[Extreme]) -> Table:
        return Table(
            f"The {name} tokens",
            ["in context", "weight", "p", "R", "where"],
            [
                [
                    Marked(_visible(one.before), _visible(one.token), _visible(one.after)),
                    phrasing.number(one.weight),
                    phrasing.number(one.prob),
                    f"{one.rank:,}",
                    f"{one.conversation}:{one.position}",
                ]
                for one in chosen
            ],
        )

    def by_type(name: str, chosen: np.ndarray) -> Table:
        return Table(
            f"The {name} token types",
            ["token", "count", "mean weight", "of the mean", "mean nll"],
            [
                [
                    Marked("", _visible(sums.type_text[int(types[i])]), ""),
                    f"{int(sums.type_count[types[i]]):,}",
                    phrasing.number(average[i]),
                    f"{phrasing.number(average[i] / mean)} ×" if mean else "–",
                    phrasing.number(nll[i]),
                ]
                for i in chosen
            ],
        )

    return [
        tokens("heaviest", sums.heaviest(method)),
        tokens("lightest", sums.lightest(method)),
        by_type("heaviest", heavy),
        by_type("lightest", light),
    ]


def _visible(text: str) -> str:
    return text.replace("\n", "⏎").replace("\t", "⇥")
