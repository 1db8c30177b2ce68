"""The flags that every command with data or a model takes: `--config` and `--config.KEY=VALUE`."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Collection, Sequence

from ranktuner_jax.train import distributed
from ranktuner_jax.train.config import TrainConfig, describe, load_config
from ranktuner_jax.train.config_file import config_names

__all__ = ["add_config", "read_config", "read_config_and_meet"]


def add_config(
    parser: argparse.ArgumentParser, *, default: str | None = None, groups: Collection[str] = ()
) -> None:
    """Declares `--config` and lets `--config.KEY=VALUE` through.

    The help ends in the keys of the config that the command line names, with its values.

    Args:
      parser: The parser of the command.
      default: The config where none is named; without one it has to be.
      groups: The keys of the first level that the command reads, for its help; all if left out.

    Example:
      >>> parser = argparse.ArgumentParser()
      >>> add_config(parser, default="smollm2_chain_sum")
      >>> args = parser.parse_args([])
      >>> args.overrides = ["--config.train.steps=5"]
      >>> read_config(args).train.steps
      5
    """
    parser.add_argument(
        "--config",
        default=default,
        required=default is None,
        metavar="NAME|FILE",
        help=f"a config by name ({', '.join(config_names())}) or a Python file with get_config()"
        + f"; default {default}" * (default is not None),
    )
    parser.set_defaults(
        overrides=[], describe_config=functools.partial(_describe, default=default, groups=groups)
    )


def read_config(args: argparse.Namespace) -> TrainConfig:
    """The config that the flags name, with what they change.

    Raises:
      UserError: As `load_config`.
    """
    return load_config(args.config, args.overrides)


def read_config_and_meet(args: argparse.Namespace) -> TrainConfig:
    """`read_config`, and joins the other processes of the run, where the flags say there are any.

    A mistake is said before anybody waits, unless JAX has yet to find out which process this is.

    Raises:
      UserError: As `load_config` and `distributed.initialize`.
    """
    if args.distributed:
        distributed.initialize(args)
        return read_config(args)
    config = read_config(args)
    distributed.initialize(args)
    return config


def _describe(arguments: Sequence[str], *, default: str | None, groups: Collection[str]) -> str:
    """The keys of the config that a command line names, for the end of its help."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", default=default)
    args, rest = parser.parse_known_args(arguments)
    given = [argument for argument in rest if argument.startswith("--config.") and "=" in argument]
    config = load_config(args.config, given) if args.config else None
    title = f"keys of {args.config}, their values" if args.config else "keys of a config, defaults"
    return f"{title} and meaning:\n{describe(config, groups)}"
