"""Fine-tune a model: evaluate it, train it, evaluate it again, export it, show what changed.

  ranktuner train --workdir=runs/first
  ranktuner train --config=smollm2_chain_sum --config.optimizer.learning_rate=3e-5 --workdir=runs/x
  ranktuner train --config=my/config.py --config.loss.weighting=sft --workdir=runs/sft

The same command goes on with an interrupted run, and shows a finished one. It exits with 0 when
the run is finished, 2 for a mistake in what was asked, 75 when it was stopped and saved.
"""

from __future__ import annotations

import argparse

from ranktuner_jax.train import distributed
from ranktuner_jax.train.compilation import keep_compiled
from ranktuner_jax.train.config import config_names, describe, load_config
from ranktuner_jax.train.loop import train_and_evaluate

__all__ = ["add_arguments", "run"]

DEFAULT_CONFIG = "smollm2_chain_sum"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares what `ranktuner train` takes."""
    parser.add_argument(
        "--config",
        default=DEFAULT_CONFIG,
        help=f"a config by name ({', '.join(config_names())}) or a Python file with get_config(); "
        "default %(default)s",
    )
    parser.add_argument(
        "--workdir", required=True, help="folder of the run: checkpoints, metrics, exported model"
    )
    distributed.add_arguments(parser)
    parser.set_defaults(overrides=[])
    parser.epilog = f"keys of a config, their defaults and their meaning:\n{describe()}"


def run(args: argparse.Namespace) -> int:
    """Runs it."""
    config = load_config(args.config, args.overrides)  # A mistake is said before anybody waits.
    distributed.initialize(args)
    keep_compiled()
    return train_and_evaluate(config, args.workdir)
