r"""Convert any data source to a TFDS data set, which training reads by random access.

All rows are checked: an invalid row is an error, or is counted and skipped with
--config.data.on_bad_row=skip. An existing folder is never overwritten, and an interrupted command
leaves nothing behind.

  ranktuner data prepare --config.data.source='gsm8k_{split}.jsonl' --split=train --split=test \
      --config.data.strip_calculator_marks=True --output=data/gsm8k
  ranktuner data prepare --config.data.source=hub:AI-MO/NuminaMath-CoT \
      --split='train=train[:10000]' --split='test=train[-500:]' --output=data/numina

Then train on the folder with --config.data.source=data/gsm8k.
"""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

from ranktuner_jax.data.prepare import prepare
from ranktuner_jax.errors import UserError
from ranktuner_jax.train.commands import flags

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `ranktuner data prepare`."""
    parser.add_argument("--output", required=True, help="folder to write; must not exist yet")
    parser.add_argument(
        "--split",
        action="append",
        metavar="NAME[=SLICE]",
        help="a split to write, and the slice of the source to fill it; repeatable [train]",
    )
    flags.add_config(parser, default="own_data", groups=("data",))


def run(args: argparse.Namespace) -> int:
    """Writes the data set and prints how many rows were kept."""
    config = flags.read_config(args).data
    splits = dict((*split.split("=", 1), split)[:2] for split in args.split or ["train"])
    for name in splits:
        if not re.fullmatch(r"\w+", name):
            raise UserError(
                f"--split: expected a name, or NAME=SLICE, got {name!r}; "
                "write a slice as train='train[:1000]'"
            )
    output = Path(args.output).expanduser()
    for name, summary in prepare(config, output, splits).items():
        bad = f", {summary.bad.total():,} bad and skipped" if summary.bad else ""
        print(f"{name}: {summary.kept:,} of {summary.read:,} conversations{bad}")
        for reason, count in summary.bad.most_common(10):
            print(f"  {count:,} × {reason}")
    print(f"train on it with --config.data.source={shlex.quote(str(output))}")
    return 0
