"""Fine-tune a model: evaluate it, train it, evaluate it again, export it, show what changed.

  ranktuner train --workdir=runs/first
  ranktuner train --config=own_data --config.data.source=rows.jsonl --workdir=runs/mine
  ranktuner train --config=my/config.py --config.loss.weighting=sft --workdir=runs/sft

Run the same command again to resume an interrupted run, or to see the results of a finished one.
It exits with 0 when the run is finished, 2 for a mistake in what was asked, 75 when it was stopped
and saved.
"""

from __future__ import annotations

import argparse

from ranktuner_jax.train import distributed
from ranktuner_jax.train.commands import flags
from ranktuner_jax.train.compilation import keep_compiled
from ranktuner_jax.train.loop import train_and_evaluate
from ranktuner_jax.train.one_voice import one_voice

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares what `ranktuner train` takes."""
    flags.add_config(parser, default="smollm2_chain_sum")
    parser.add_argument(
        "--workdir", required=True, help="folder of the run: checkpoints, metrics, exported model"
    )
    distributed.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Runs it."""
    with one_voice(args):
        config = flags.read_config_and_meet(args)
        keep_compiled()
        return train_and_evaluate(config, args.workdir)
