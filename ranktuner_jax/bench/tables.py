"""Make Markdown tables of what the benchmarks measured.

ranktuner bench loss --json > loss.json
ranktuner bench tables loss.json other.json
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ranktuner_jax.errors import UserError

__all__ = ["add_arguments", "describe", "markdown", "run"]

_KEYS = {"bench", "setting", "case", "figures", "dtype", "failed", "machine"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `ranktuner bench tables`."""
    parser.add_argument("files", nargs="+", metavar="FILE", help="what a benchmark's --json wrote")


def run(args: argparse.Namespace) -> int:
    """Prints the tables of all files."""
    print(markdown([record for file in args.files for record in read_records(file)]))
    return 0


def read_records(file: str) -> list[dict[str, Any]]:
    """The records of a file.

    Raises:
      UserError: If there is no such file, or it holds something else.
    """
    expected = "expected a file that --json of a benchmark wrote"
    try:
        found = json.loads(pathlib.Path(file).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"bench tables: {expected}, got {file}: {error}") from None
    if not isinstance(found, list) or not all(
        isinstance(record, dict) and record.keys() >= _KEYS for record in found
    ):
        raise UserError(f"bench tables: {expected}, got {file} without its records")
    return found


def markdown(records: Iterable[Mapping[str, Any]]) -> str:
    """A table for each benchmark, setting and machine, below the machine's name and peak.

    Args:
      records: As `Record.to_json` returns them.

    Example:
      >>> peak = {"float32": 2e11}
      >>> machine = {"name": "cpu", "devices": 1, "cores": 2, "jax": "0.10.2", "peak_flops": peak}
      >>> figures = {"median_s": 0.25, "flops_per_s": 1e11}
      >>> record = {"bench": "loss", "setting": "8 tokens", "case": "fused", "figures": figures}
      >>> print(markdown([{**record, "dtype": "float32", "failed": "", "machine": machine}]))
      **loss: 8 tokens**
      <BLANKLINE>
      cpu, 2 cores, jax 0.10.2; a matrix product by itself: 0.20 TFLOP/s in float32
      <BLANKLINE>
      |       |   median |        FLOP/s | of the peak |
      |:------|---------:|--------------:|------------:|
      | fused | 250.0 ms | 0.100 TFLOP/s |       50.0% |
    """
    groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for record in records:
        machine = _caption(record["machine"])
        groups.setdefault((record["bench"], record["setting"], machine), []).append(record)
    return "\n\n".join(
        f"**{bench}: {setting}**\n\n{machine}\n\n{_table(found)}"
        for (bench, setting, machine), found in groups.items()
    )


def describe(figures: Mapping[str, float | None]) -> str:
    """Figures in one line.

    Example:
      >>> describe({"median_s": 0.25, "tokens_per_s": 1200.0})
      'median 250.0 ms, tokens/s 1,200.0'
    """
    cells = ((_heading(name), _cell(name, value)) for name, value in figures.items())
    return ", ".join(f"{heading} {cell}" for heading, cell in cells if cell)


def _caption(machine: Mapping[str, Any]) -> str:
    devices = f"{machine['devices']} × " if machine["devices"] > 1 else ""
    cores = f", {machine['cores']} cores" if machine["cores"] else ""
    caption = f"{devices}{machine['name']}{cores}, jax {machine['jax']}"
    peaks = (f"{peak / 1e12:.2f} TFLOP/s in {t}" for t, peak in machine["peak_flops"].items())
    if text := ", ".join(peaks):
        caption += f"; a matrix product by itself: {text}"
    return caption


def _table(records: Sequence[Mapping[str, Any]]) -> str:
    figures = [_with_peak(record) for record in records]
    names = list(dict.fromkeys(name for row in figures for name in row))
    rows = [["", *map(_heading, names)]]
    for record, row in zip(records, figures, strict=True):
        case = record["case"] + f" (failed: {record['failed']})" * bool(record["failed"])
        rows.append([case.replace("|", "\\|"), *(_cell(name, row.get(name)) for name in names)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| "
        + " | ".join(
            cell.rjust(width) if index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        + " |"
        for row in rows
    ]
    rule = [
        f":{'-' * (width + 1)}" if not i else f"{'-' * (width + 1)}:"
        for i, width in enumerate(widths)
    ]
    return "\n".join([lines[0], f"|{'|'.join(rule)}|", *lines[1:]])


def _with_peak(record: Mapping[str, Any]) -> dict[str, float | None]:
    """The figures, with `flops_per_s` also as a share of what the machine's devices can do."""
    figures, machine = dict(record["figures"]), record["machine"]
    speed, peak = figures.get("flops_per_s"), machine["peak_flops"].get(record["dtype"])
    if speed is not None and peak:
        figures["of the peak_share"] = speed / (peak * machine["devices"])
    return figures


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.1f} ms"


def _bytes(value: float) -> str:
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.1f} MB"


# The end of a figure's name, what the heading has instead of it, and how its numbers are written.
_UNITS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("flops_per_s", "FLOP/s", lambda value: f"{value / 1e12:.3f} TFLOP/s"),
    ("_per_s", "/s", lambda value: f"{value:,.1f}"),
    ("_share", "", lambda value: f"{value:.1%}"),
    ("_bytes", " memory", _bytes),
    ("_s", "", _seconds),
)


def _heading(name: str) -> str:
    for end, heading, _ in _UNITS:
        if name.endswith(end):
            return (name.removesuffix(end) + heading).replace("_", " ")
    return name.replace("_", " ")


def _cell(name: str, value: float | None) -> str:
    if value is None or math.isnan(value):
        return ""
    for end, _, text in _UNITS:
        if name.endswith(end):
            return text(value)
    return f"{value:.3f}" if "÷" in name else f"{value:,.4g}"
