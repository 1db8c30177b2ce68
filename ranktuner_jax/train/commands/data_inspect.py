"""Show a data set as the model sees it: the first rows as text, what is supervised, and lengths.

Supervised text is shown in green (in ⟦brackets⟧ without colors): the model learns to generate it
from everything before it in the same conversation.

  ranktuner data inspect --config.data.source=rows.jsonl
  ranktuner data inspect --config=gsm8k --config.model=Qwen/Qwen3-0.6B --config.data.row_length=512
"""

from __future__ import annotations

import argparse

from rich.console import Console

from ranktuner_jax import data, models
from ranktuner_jax.data.inspect import show_rows, show_summary
from ranktuner_jax.errors import UserError
from ranktuner_jax.train.commands import flags

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `ranktuner data inspect`."""
    flags.add_config(parser, default="own_data", groups=("model", "seed", "data"))
    parser.add_argument("--rows", type=int, default=2, help="number of rows to show [%(default)s]")


def run(args: argparse.Namespace) -> int:
    """Prints the first rows, the lengths and the counts."""
    if args.rows < 0:
        raise UserError(f"--rows: expected at least 0, got {args.rows}")
    config = flags.read_config(args)
    data.check_sources(config.data, config.data.split)
    tokenizer = data.load_tokenizer(models.resolve(config.model), config.data.chat_template)
    rows = data.load_rows(config.data, tokenizer, seed=config.seed)
    console = Console(highlight=False)
    show_rows(console, rows, tokenizer, min(args.rows, len(rows)))
    show_summary(console, rows.summary)
    return 0
