"""A config as a Python file, found by name or path; what is wrong in it is said in one line."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import linecache
import pathlib
import pkgutil
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

from ranktuner_jax.errors import UserError

__all__ = ["config_names", "read_config_file", "suggestion"]


def config_names() -> list[str]:
    """Names of the configs that ship with the package.

    Example:
      >>> "smollm2_chain_sum" in config_names()
      True
    """
    package = importlib.import_module("ranktuner_jax.configs")
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__))


def read_config_file(name: str) -> ml_collections.ConfigDict | Mapping[str, Any]:
    """What `get_config()` of a config file returns.

    Args:
      name: A name in the package `ranktuner_jax.configs`, or a path that ends in ".py".

    Raises:
      UserError: If there is no such file, or it is not a config: it cannot be parsed, raises, or
        returns something else. The message shows the line of the file at which that happened.

    Example:
      >>> read_config_file("smollm2_chain_sum").data.source
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
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        get_config = getattr(module, "get_config", None)
        config = get_config() if callable(get_config) else None
    except Exception as error:  # The file is the user's: anything may come out of it.
        raise UserError(_blame(name, str(spec.origin), error)) from error
    if get_config is None:
        raise UserError(f"--config: {name} defines no get_config()")
    if not isinstance(config, Mapping | ml_collections.ConfigDict):
        raise UserError(
            f"--config: expected get_config() of {name} to return a ConfigDict, got "
            f"{type(config).__name__}; end it with `return ConfigDict(...)`"
        )
    return config


def suggestion(word: str, known: Sequence[str]) -> str:
    """The name that was meant, as the end of a message; "" where none is near.

    Example:
      >>> suggestion("sed", ["seed", "model"])
      '; did you mean seed?'
    """
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _blame(name: str, file: str, error: Exception) -> str:
    """File, line, error and the text of the line, in one line."""
    line: int | None = None
    if isinstance(error, SyntaxError) and error.filename == file:
        line, said = error.lineno, error.msg
    else:
        # The innermost frame that is the user's: what it called is none of their business.
        frames = traceback.extract_tb(error.__traceback__)
        line = next((f.lineno for f in reversed(frames) if f.filename == file), None)
        said = str(error)
    linecache.checkcache(file)
    text = linecache.getline(file, line).strip() if line else ""
    where = f"{name}:{line}" if line else name
    reason = " ".join(f"{type(error).__name__}: {said}".split())
    return f"--config: {where}: {reason}" + (f", in `{text}`" if text else "")
