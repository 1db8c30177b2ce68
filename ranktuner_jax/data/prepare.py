r"""Write any source once as a TFDS data set, which training reads by random access.

Conversations are checked on the way: rows that cannot be used are named, or counted and left out
with --on_bad_row=skip. Nothing that exists is overwritten, and a run that stops leaves nothing.

  ranktuner data prepare --source='gsm8k_{split}.jsonl' --split=train --split=test \
      --strip_calculator_marks --output=data/gsm8k
  ranktuner data prepare --source=hub:AI-MO/NuminaMath-CoT --split='train=train[:10000]' \
      --split='test=train[-500:]' --output=data/numina

The folder is then a source: --config.data.source=data/gsm8k.
"""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ranktuner_jax.data import storage
from ranktuner_jax.data.options import add_config_arguments, config_from
from ranktuner_jax.data.pipeline import DataConfig, Summary, conversations
from ranktuner_jax.errors import UserError

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `ranktuner data prepare`."""
    parser.add_argument("--output", required=True, help="folder of the data set; must not exist")
    parser.add_argument(
        "--split",
        action="append",
        metavar="NAME[=SLICE]",
        help="a split to write, and what of the source goes into it; repeatable [train]",
    )
    add_config_arguments(
        parser,
        "source",
        "subset",
        "data_dir",
        "prompt_column",
        "completion_column",
        "system",
        "strip_calculator_marks",
        "on_bad_row",
    )


def run(args: argparse.Namespace) -> int:
    """Writes the data set and says what became of the rows."""
    output = Path(args.output).expanduser()
    if output.exists():
        raise UserError(f"--output: expected a folder that does not exist, got {output}")
    splits = dict((*split.split("=", 1), split)[:2] for split in args.split or ["train"])
    for name in splits:
        if not re.fullmatch(r"\w+", name):
            raise UserError(
                f"--split: expected a name, or NAME=SLICE, got {name!r}; "
                "write a slice as train='train[:1000]'"
            )
    del args.split
    config = config_from(args)
    summaries = {name: Summary(config.row_length) for name in splits}
    try:
        storage.write_dataset(
            output,
            {name: _records(config, splits[name], summaries[name]) for name in splits},
            name=re.sub(r"\W+", "_", output.name).lower(),
        )
    except PermissionError as error:
        raise UserError(f"--output: cannot write to {output.parent}: {error.strerror}") from error
    for name, summary in summaries.items():
        bad = f", {summary.bad.total():,} bad and skipped" if summary.bad else ""
        print(f"{name}: {summary.kept:,} of {summary.read:,} conversations{bad}")
        for reason, count in summary.bad.most_common(10):
            print(f"  {count:,} × {reason}")
    print(f"train on it with --config.data.source={shlex.quote(str(output))}")
    return 0


def _records(config: DataConfig, split: str, summary: Summary) -> Iterator[dict[str, Any]]:
    for conversation in conversations(config, config.source, split, summary):
        summary.kept += 1
        turns = [
            {**message, "weight": weight}
            for message, weight in zip(conversation.messages, conversation.weights, strict=True)
        ]
        own = {key: value for key, value in conversation.row.items() if key not in _WRITTEN}
        yield storage.to_record(turns, own)
    if not summary.kept:
        raise UserError(f"data: nothing to write of {config.source}, split {split}: {summary}")


# What the messages say already: the weight of the row is part of theirs.
_WRITTEN = ("messages", "weight")
