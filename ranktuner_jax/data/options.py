"""Fields of `DataConfig` as command line flags."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re

from ranktuner_jax.data.pipeline import DataConfig

__all__ = ["add_config_arguments", "config_from"]


def add_config_arguments(parser: argparse.ArgumentParser, *names: str) -> None:
    """Adds a flag for each field, with its default, explained by the docstring of `DataConfig`.

    Example:
      >>> parser = argparse.ArgumentParser()
      >>> add_config_arguments(parser, "source", "row_length")
      >>> config_from(parser.parse_args(["--row_length=64"])).row_length
      64
    """
    attributes = re.split(r"\n\S", (inspect.getdoc(DataConfig) or "").split("Attributes:\n")[1])[0]
    helps = dict(re.findall(r"^  (\w+): (.*(?:\n {4}.*)*)", attributes, re.MULTILINE))
    for field in dataclasses.fields(DataConfig):
        if field.name in names:
            is_bool = isinstance(field.default, bool)
            parser.add_argument(
                f"--{field.name}",
                default=field.default,
                help=" ".join(helps[field.name].replace("%", "%%").split()) + " [%(default)s]",
                **(
                    {"action": argparse.BooleanOptionalAction}
                    if is_bool
                    else {"type": type(field.default)}
                ),
            )


def config_from(args: argparse.Namespace) -> DataConfig:
    """The configuration that the flags describe; fields without a flag keep their default.

    Raises:
      UserError: If a value is none of those allowed.
    """
    names = {field.name for field in dataclasses.fields(DataConfig)}
    return DataConfig(**{name: value for name, value in vars(args).items() if name in names})
