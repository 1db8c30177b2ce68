"""What every benchmark measures: records of one shape, shown as tables or as JSON."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterable, Mapping
from typing import Any

from ranktuner_jax.bench.tables import markdown

__all__ = ["Record", "add_json", "show"]


@dataclasses.dataclass(frozen=True)
class Record:
    """What was measured of one case.

    Attributes:
      bench: The benchmark.
      setting: What all cases of a table have in common: sizes, dtypes.
      case: What was measured.
      figures: The numbers by name. The end of a name is the unit: `_s` seconds, `_bytes`, `_share`
        a fraction, `_per_s`; a name with "÷" in it is a ratio. `flops_per_s` also gets a
        column that compares it with the machine's own peak.
      dtype: The type of the matrix products, by whose peak `flops_per_s` is measured.
      failed: Why there are no figures, or why they are wrong.

    Example:
      >>> Record("loss", "8 tokens", "fused", {"median_s": 0.5}).figures["median_s"]
      0.5
    """

    bench: str
    setting: str
    case: str
    figures: Mapping[str, float | None]
    dtype: str = ""
    failed: str = ""

    def to_json(self, machine: Mapping[str, Any]) -> dict[str, Any]:
        """The record with the machine that it was measured on, as `--json` prints it."""
        return {**dataclasses.asdict(self), "machine": machine}


def add_json(parser: argparse.ArgumentParser) -> None:
    """Adds `--json`."""
    parser.add_argument(
        "--json",
        action="store_true",
        help="print the records as JSON, of which `ranktuner bench tables` makes tables",
    )


def show(
    records: Iterable[Record], *, as_json: bool, machine: Mapping[str, Any] | None = None
) -> None:
    """Prints records as tables, or as a JSON list.

    Args:
      records: The records.
      as_json: What `--json` says.
      machine: What they are of; this machine, whose peak is measured now, if left out.
    """
    if machine is None:
        from ranktuner_jax.bench.machine import describe_machine

        machine = describe_machine()
    found = [record.to_json(machine) for record in records]
    print(json.dumps(found, indent=1) if as_json else markdown(found))
