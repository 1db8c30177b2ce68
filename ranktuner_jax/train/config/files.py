"""Config files: Python files found by name or path, whose errors are reported in one line."""

from __future__ import annotations

import importlib
import importlib.util
import linecache
import os
import pathlib
import pkgutil
import sys
import traceback
from collections.abc import Mapping
from types import ModuleType
from typing import Any, NamedTuple

import ml_collections

from ranktuner_jax.errors import UserError
from ranktuner_jax.train.config.checks import suggestion

__all__ = ["ConfigFile", "config_names", "execute", "read_config_file"]


def config_names() -> list[str]:
    """Names of the configs that ship with the package.

    Example:
      >>> "smollm2_chain_sum" in config_names()
      True
    """
    package = importlib.import_module("ranktuner_jax.configs")
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__))


class ConfigFile(NamedTuple):
    """The content of a config file.

    Attributes:
      chosen: The result of `get_config()`.
      code: The source of a user's config file, which may register weightings, optimizers and tasks;
        "" for a config that ships with the package.
    """

    chosen: Mapping[str, Any] | ml_collections.ConfigDict
    code: str


def read_config_file(name: str) -> ConfigFile:
    """Executes a config file and calls its `get_config()`.

    Args:
      name: A name in the package `ranktuner_jax.configs`, or a path that ends in ".py".

    Raises:
      UserError: If the file does not exist, cannot be parsed, raises, or returns something else.
        The message shows the line of the file at which that happened.

    Example:
      >>> read_config_file("smollm2_chain_sum").chosen.data.source
      'chain_sum'
      >>> read_config_file("smollm2_chain_sun")
      Traceback (most recent call last):
      ranktuner_jax.errors.UserError: --config: expected ... did you mean smollm2_chain_sum?
    """
    if name.endswith(".py"):
        path = pathlib.Path(name)
        if not path.is_file():
            raise UserError(f"--config: expected a Python file, found none at {name}")
    elif name in config_names():
        [folder] = importlib.import_module("ranktuner_jax.configs").__path__
        path = pathlib.Path(folder, f"{name}.py")
    else:
        raise UserError(
            f"--config: expected {', '.join(config_names())} or a path that ends in .py, "
            f"got {name!r}{suggestion(name, config_names())}"
        )
    try:
        module = execute(path)
        get_config = getattr(module, "get_config", None)
        chosen = get_config() if callable(get_config) else None
    except Exception as error:  # User code may raise anything.
        raise UserError(_describe_error(name, os.path.abspath(path), error)) from error
    if get_config is None:
        raise UserError(f"--config: {name} defines no get_config()")
    if not isinstance(chosen, Mapping | ml_collections.ConfigDict):
        raise UserError(
            f"--config: expected get_config() of {name} to return a ConfigDict, got "
            f"{type(chosen).__name__}; end it with `return ConfigDict(...)`"
        )
    return ConfigFile(chosen, path.read_text() if name.endswith(".py") else "")


def execute(path: pathlib.Path) -> ModuleType:
    """Executes a Python file as a separate module.

    Raises:
      Exception: Whatever the file raises.
    """
    spec = importlib.util.spec_from_file_location(f"ranktuner_config_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # Dataclasses look up their types here.
    spec.loader.exec_module(module)
    return module


def _describe_error(name: str, file: str, error: Exception) -> str:
    """The file, the line number, the error and the source line, in one line."""
    line: int | None = None
    if isinstance(error, SyntaxError) and error.filename == file:
        line, message = error.lineno, error.msg
    else:
        # The innermost frame in the user's file, not in the libraries that it calls.
        frames = traceback.extract_tb(error.__traceback__)
        line = next((f.lineno for f in reversed(frames) if f.filename == file), None)
        message = str(error)
    linecache.checkcache(file)
    text = linecache.getline(file, line).strip() if line else ""
    where = f"{name}:{line}" if line else name
    reason = " ".join(f"{type(error).__name__}: {message}".split())
    return f"--config: {where}: {reason}" + (f", in `{text}`" if text else "")
