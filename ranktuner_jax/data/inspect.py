"""A data set on the terminal: rows as text, a histogram of lengths, and counts."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from ranktuner_jax.data.rows import Rows
from ranktuner_jax.data.summary import Summary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["show_rows", "show_summary"]


def show_rows(console: Console, rows: Rows, tokenizer: PreTrainedTokenizerBase, count: int) -> None:
    """Prints the first rows as text.

    Supervised text is green, or in ⟦brackets⟧ on a terminal without colours.
    """
    decode = tokenizer.backend_tokenizer.decode
    for index in range(count):
        row = rows[index]
        for segment in range(1, row.segment_ids.max() + 1):
            console.print(Rule(f"row {index}, conversation {segment}", style="dim"))
            here = row.segment_ids == segment
            # The last token of a conversation is only a label.
            tokens = [*row.tokens[here], row.labels[here][-1]]
            supervised = [False, *row.mask[here]]
            text = Text()
            marked = zip(supervised, tokens, strict=True)
            for is_supervised, pairs in itertools.groupby(marked, key=lambda pair: pair[0]):
                part = _printable(decode([token for _, token in pairs], skip_special_tokens=False))
                if is_supervised and console.color_system is None:
                    part = f"⟦{part}⟧"
                text.append(part, "green" if is_supervised else "dim")
            console.print(text)


def show_summary(console: Console, summary: Summary) -> None:
    """Prints a histogram of lengths, and the counts."""
    lengths = summary.lengths
    edges = np.unique(np.linspace(lengths.min(), lengths.max() + 1, 11).astype(int))
    counts, _ = np.histogram(lengths, edges)
    histogram = Table(title="Lengths", box=None, show_header=False, title_justify="left")
    histogram.add_column(justify="right")
    histogram.add_column(justify="right")
    histogram.add_column()
    for count, low, high in zip(counts, edges[:-1], edges[1:] - 1, strict=True):
        bar = "█" * round(40 * count / max(counts))
        histogram.add_row(f"{low:,} to {high:,} tokens", f"{count:,}", bar)
    console.print(Rule(style="dim"), histogram)

    table = Table(title="Counts", box=None, show_header=False, title_justify="left")
    table.add_column()
    table.add_column(justify="right")
    table.add_row("conversations read", f"{summary.read:,}")
    if summary.held_out:
        table.add_row("held out", f"{summary.held_out:,}")
    table.add_row("samples kept", f"{summary.kept:,}")
    table.add_row("truncated", f"{summary.truncated:,}")
    table.add_row("too long and dropped", f"{summary.dropped:,}")
    table.add_row("bad and skipped", f"{summary.bad.total():,}")
    for reason, count in summary.bad.most_common(10):
        table.add_row(f"  {_printable(reason)}", f"{count:,}")
    table.add_row("tokens", f"{summary.tokens:,}")
    table.add_row("supervised", f"{summary.supervised / summary.tokens:.1%}")
    table.add_row(f"rows of {summary.row_length:,}", f"{summary.rows:,}")
    table.add_row("filled", f"{summary.fill:.1%}")
    console.print(table)


def _printable(text: str) -> str:
    """The text with control characters escaped, so that data cannot control the terminal."""
    return "".join(
        char if char.isprintable() or char in "\n\t" else f"\\x{ord(char):02x}" for char in text
    )
