"""The flags of every command with data or a model: `--config` and `--config.KEY=VALUE`."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Collection, Sequence

from ranktuner_jax.train.config import TrainConfig, config_names, describe, load_config
from ranktuner_jax.train.config import read_config as read_workdir
from ranktuner_jax.train.runtime import distributed

__all__ = ["add_adapter", "add_config", "read_config", "read_config_and_connect"]


def add_adapter(parser: argparse.ArgumentParser) -> None:
    """Adds `--adapter`, a shorter name for a config's `lora.adapter`."""
    parser.add_argument("--adapter", metavar="FOLDER", help="PEFT's folder of the model's adapters")


def add_config(
    parser: argparse.ArgumentParser,
    *,
    default: str | None = None,
    groups: Collection[str] = (),
    workdir: str = "",
    needed: bool = True,
) -> None:
    """Adds `--config` and accepts `--config.KEY=VALUE`.

    The command's help ends with the keys of the chosen config and their values.

    Args:
      parser: The parser of the command.
      default: The default config; without one, `--config` is required.
      groups: The top-level keys that the command reads and its help lists; all if empty.
      workdir: Help text of `--workdir`, a run whose config is used instead of `--config`; "" for
        commands without this flag.
      needed: Whether a config or a workdir is required; without one, `read_config` returns the
        defaults of all keys.

    Example:
      >>> parser = argparse.ArgumentParser()
      >>> add_config(parser, default="smollm2_chain_sum")
      >>> args = parser.parse_args([])
      >>> args.overrides = ["--config.train.steps=5"]
      >>> read_config(args).train.steps
      5
    """
    chosen: argparse.ArgumentParser | argparse._MutuallyExclusiveGroup = parser
    if workdir:
        chosen = parser.add_mutually_exclusive_group(required=needed and default is None)
        chosen.add_argument("--workdir", help=workdir)
    chosen.add_argument(
        "--config",
        default=default,
        required=default is None and not workdir,
        metavar="NAME|FILE",
        help=f"name of a config ({', '.join(config_names())}) or a Python file with get_config()"
        + f"; default {default}" * (default is not None),
    )
    parser.set_defaults(
        overrides=[], describe_config=functools.partial(_describe, default=default, groups=groups)
    )


def read_config(args: argparse.Namespace) -> TrainConfig:
    """The config that the flags select, with their overrides.

    Raises:
      UserError: Like `load_config`.
    """
    if getattr(args, "workdir", None) and not args.config:
        return read_workdir(args.workdir, args.overrides)
    return load_config(args.config or "", args.overrides)


def read_config_and_connect(args: argparse.Namespace) -> TrainConfig:
    """Reads the config, and connects to the other processes of a multi-process run.

    The config is read first, so that an error in it is reported without waiting for the other
    processes; with `--distributed`, only JAX knows which process this is, so it connects first.

    Raises:
      UserError: Like `load_config` and `distributed.initialize`.
    """
    if args.distributed:
        distributed.initialize(args)
        return read_config(args)
    config = read_config(args)
    distributed.initialize(args)
    return config


def _describe(arguments: Sequence[str], *, default: str | None, groups: Collection[str]) -> str:
    """The keys of the config that a command line selects, for the end of its help."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", default=default)
    args, rest = parser.parse_known_args(arguments)
    given = [argument for argument in rest if argument.startswith("--config.") and "=" in argument]
    config = load_config(args.config, given) if args.config else None
    values = f"values in {args.config}" if args.config else "defaults"
    return f"config keys, with their {values} and meaning:\n{describe(config, groups)}"
