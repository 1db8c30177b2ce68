r"""Tokenize what a config trains on and is evaluated on, before training does; or convert a source.

Without --output the tokens of large sources are written where `data.cache` says, and training with
the same config starts from them. An interrupted command goes on with what is there.

  ranktuner data prepare --config=own_data --config.data.source=rows.jsonl
  ranktuner data prepare --config=gsm8k --config.data.cache=gs://bucket/tokens

With --output the source is written as a TFDS data set, which training reads by random access. All
rows are checked: an invalid row is an error, or is counted and skipped with
--config.data.on_bad_row=skip. An existing folder is never overwritten, and an interrupted command
leaves nothing behind. Then train on the folder with --config.data.source=data/gsm8k.

  ranktuner data prepare --config.data.source='gsm8k_{split}.jsonl' --split=train --split=test \
      --config.data.strip_calculator_marks=True --output=data/gsm8k
  ranktuner data prepare --config.data.source=hub:AI-MO/NuminaMath-CoT \
      --split='train=train[:10000]' --split='test=train[-500:]' --output=data/numina
"""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

from ranktuner_jax import data, models
from ranktuner_jax.data.cache import is_kept
from ranktuner_jax.data.encode import Split
from ranktuner_jax.data.prepare import prepare
from ranktuner_jax.errors import UserError
from ranktuner_jax.train.commands import flags
from ranktuner_jax.train.config import TrainConfig

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `ranktuner data prepare`."""
    parser.add_argument("--output", help="folder of a TFDS data set to write; must not exist yet")
    parser.add_argument(
        "--split",
        action="append",
        metavar="NAME[=SLICE]",
        help="with --output: a split to write, and the slice of the source to fill it; repeatable "
        "[train]",
    )
    flags.add_config(parser, default="own_data", groups=("model", "seed", "data"))


def run(args: argparse.Namespace) -> int:
    """Writes tokens or a data set, and prints how many rows were kept."""
    if args.output is None:
        return _tokenize(flags.read_config(args), args)
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


def _tokenize(config: TrainConfig, args: argparse.Namespace) -> int:
    """Loads the rows of a config as training does, which keeps their tokens."""
    if args.split:
        raise UserError(
            f"--split: expected --output with it, got {args.split[0]!r} alone; name the splits to "
            "tokenize in --config.data.split and --config.eval.split"
        )
    splits = list(dict.fromkeys((config.data.split, config.eval.split)))
    data.check_sources(config.data, *splits)
    tokenizer = data.load_tokenizer(models.resolve(config.model), config.data.chat_template)
    for split in splits:
        rows = data.load_rows(
            config.data, tokenizer, split=split, seed=config.seed, min_rows=config.train.batch_size
        )
        print(f"{split}: {rows.summary}")
        for source, _ in rows.sources:
            if not is_kept(Split(config.data, source, split)):
                print(
                    f"{split}: {source} is tokenized at each start; "
                    "--config.data.cache=always keeps its tokens too"
                )
    return 0
