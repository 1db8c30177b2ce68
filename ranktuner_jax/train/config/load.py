"""Reads a config file, applies arguments such as `--config.train.steps=5`, and validates it."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import re
import tempfile
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import ml_collections
from absl import flags
from etils import epath
from ml_collections import config_dict, config_flags

from ranktuner_jax import losses
from ranktuner_jax.errors import UserError
from ranktuner_jax.train.config.checks import one_of, suggestion
from ranktuner_jax.train.config.files import ConfigFile, execute, read_config_file
from ranktuner_jax.train.config.schema import TrainConfig, keys
from ranktuner_jax.train.config.show import flatten, to_dict
from ranktuner_jax.train.step.optimizers import OPTIMIZERS, optimizer_options

__all__ = ["CODE", "load_config", "read_config", "read_config_json", "write_out"]

CODE = "config.py"
"""Name of the copy of the user's config file in the folder of a run."""

_T = TypeVar("_T")

# Keys that decide results, with what runs did that were begun before there were these keys.
_BEFORE = {"data": {"packer": "best_fit"}}

# Group -> the key that selects a method, which determines the group's options.
_METHODS = {"loss": "weighting", "optimizer": "name"}


def load_config(name: str, overrides: Sequence[str] = ()) -> TrainConfig:
    """Reads a config by name or path and applies overrides from the command line.

    A config file defines `get_config() -> ml_collections.ConfigDict`, which sets only the keys that
    differ from the defaults. A user's file may also register weightings, optimizers and tasks, such
    as `losses.WEIGHTINGS["mine"] = Mine`; the folder of a run keeps a copy of it. Overriding
    `loss.weighting` resets `loss.options` to those of the new weighting, and `train.steps` takes
    the place of a file's `train.epochs`.

    Args:
      name: A name in the package `ranktuner_jax.configs`, or a path that ends in ".py"; "" for the
        defaults of all keys.
      overrides: Arguments such as "--config.optimizer.learning_rate=1e-5".

    Returns:
      The validated config.

    Raises:
      UserError: If the config is not found, a key is unknown or a value has the wrong type.

    Example:
      >>> config = load_config("smollm2_chain_sum", ["--config.train.steps=5"])
      >>> config.train.steps
      5
    """
    file = read_config_file(name) if name else ConfigFile({}, "")
    config = _apply_overrides(_complete(file.chosen, name), overrides)
    return dataclasses.replace(_from_config_dict(TrainConfig, config), code=file.code)


def read_config(workdir: str | os.PathLike[str], overrides: Sequence[str] = ()) -> TrainConfig:
    """Reads the config of a run; registers what the run's copy of its config file registers.

    Args:
      workdir: The folder of the run.
      overrides: As for `load_config`.

    Raises:
      UserError: If there is no run, a key is unknown or a value has the wrong type.
    """
    folder = epath.Path(workdir)
    code = ""
    if (folder / CODE).exists():
        code = (folder / CODE).read_text()
        with tempfile.TemporaryDirectory() as local:  # The workdir may be a bucket.
            path = pathlib.Path(local, CODE)
            path.write_text(code)
            try:
                execute(path)
            except Exception as error:  # User code may raise anything.
                raise UserError(
                    f"--workdir: {folder / CODE}, the run's copy of its config file, raises "
                    f"{type(error).__name__}: {' '.join(str(error).split())}"
                ) from error
    return dataclasses.replace(read_config_json(folder / "config.json", overrides), code=code)


def read_config_json(path: epath.Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Reads a config saved as JSON; keys added since then have their defaults, or do as before.

    Raises:
      UserError: If the file cannot be read.
    """
    try:
        chosen = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"--workdir: expected the config of a run at {path}, got {error}"
        ) from error
    for group, values in _BEFORE.items():
        if isinstance(chosen.get(group), Mapping):  # Otherwise _update reports the error.
            chosen[group] = {**values, **chosen[group]}
    return _from_config_dict(TrainConfig, _apply_overrides(_complete(chosen, str(path)), overrides))


def write_out(config: TrainConfig) -> TrainConfig:
    """The same config with all options of its weighting and its optimizer filled in."""
    full = _from_config_dict(TrainConfig, _complete(to_dict(config), "config"))
    return dataclasses.replace(full, code=config.code)


def _complete(chosen: Mapping[str, Any], origin: str) -> ml_collections.ConfigDict:
    """The defaults, updated with the chosen values."""
    config = _to_config_dict(TrainConfig())
    for group, key in _METHODS.items():
        values = chosen.get(group)
        if not isinstance(values, Mapping | ml_collections.ConfigDict):
            values = {}  # _update reports the error.
        _complete_options(config, group, values.get(key, config[group][key]))
    _update(config, chosen, origin)
    return config


def _complete_options(config: ml_collections.ConfigDict, group: str, method: str) -> None:
    """Writes every option of a method into the config, so that each can be overridden."""
    if group == "loss":
        one_of("loss.weighting", method, losses.WEIGHTINGS)
        options = _to_config_dict(losses.WEIGHTINGS[method]())
    else:
        one_of("optimizer.name", method, OPTIMIZERS)
        options = ml_collections.ConfigDict(optimizer_options(method))
    config[group][_METHODS[group]] = method
    config[group].options = options  # Replaces the options of the previous method.


def _update(
    config: ml_collections.ConfigDict, chosen: Mapping[str, Any], origin: str, prefix: str = ""
) -> None:
    """Sets the values of a config file key by key, so that an error names its key."""
    for key, value in chosen.items():
        name = f"{prefix}{key}"
        if key not in config:
            raise UserError(f"{origin}: unknown key {name}{suggestion(key, list(config))}")
        if isinstance(config[key], ml_collections.ConfigDict):
            if not isinstance(value, Mapping | ml_collections.ConfigDict):
                raise UserError(f"{origin}: {name} is a group of keys, got {value!r}")
            _update(config[key], value, origin, f"{name}.")
            continue
        kind = config.get_type(key)
        try:
            config[key] = tuple(value) if kind is tuple and isinstance(value, list) else value
        except TypeError as error:
            raise UserError(f"{origin}: {name} expected {kind.__name__}, got {value!r}") from error


def _apply_overrides(
    config: ml_collections.ConfigDict, overrides: Sequence[str]
) -> ml_collections.ConfigDict:
    """Applies "--config.key=value" arguments, checked against the types in the config."""
    given = _given_keys(overrides)
    for group, key in _METHODS.items():
        method = given.get(f"{group}.{key}", config[group][key])
        if method != config[group][key]:
            _complete_options(config, group, method)
    if "train.steps" in given:
        if "train.epochs" in given:
            raise UserError(
                "--config.train.steps and --config.train.epochs: expected one of them, got both; "
                "leave one out"
            )
        config.train.epochs = None
    keys = [key for key, _ in flatten(config)]
    for key in given:
        if key not in keys:
            raise UserError(f"unknown key --config.{key}{suggestion(key, keys)}")
    flag_values = flags.FlagValues()
    argv = ["ranktuner", *overrides]
    try:
        config_flags.DEFINE_config_dict(
            "config", config, flag_values=flag_values, lock_config=True, sys_argv=argv
        )
        flag_values(argv)
    except (flags.Error, ValueError, TypeError) as error:
        message = " ".join(str(error).split())
        raise UserError(f"{message.removeprefix('flag ')}; see ranktuner train --help") from error
    return flag_values.config


def _given_keys(overrides: Sequence[str]) -> dict[str, str]:
    """Key -> value of arguments "--config.key=value" or "--config.key value"."""
    given: dict[str, str] = {}
    open_key = None
    for argument in overrides:
        match = re.fullmatch(r"--?(?:no)?config\.([^=]+)(?:=(.*))?", argument, re.DOTALL)
        if open_key is not None and match is None:
            given[open_key], open_key = argument, None
        elif match is None:
            raise UserError(f"expected --config.key=value, got {argument!r}")
        else:
            given[match[1]] = match[2] or ""
            open_key = match[1] if match[2] is None else None
    return given


def _to_config_dict(value: Any) -> ml_collections.ConfigDict:
    """A dataclass as a ConfigDict in which None is a placeholder with the type of the field."""
    result = ml_collections.ConfigDict()
    hints = typing.get_type_hints(type(value))
    for field in keys(type(value)):
        item = getattr(value, field.name)
        if dataclasses.is_dataclass(item):
            item = _to_config_dict(item)
        elif isinstance(item, Mapping):
            item = ml_collections.ConfigDict(dict(item))
        elif item is None:
            item = config_dict.placeholder(_plain_type(hints[field.name]))
        result[field.name] = item
    return result


def _from_config_dict(cls: type[_T], config: ml_collections.ConfigDict) -> _T:
    """The inverse of `_to_config_dict`."""
    hints = typing.get_type_hints(cls)
    values = {}
    for field in keys(cls):
        item = config[field.name]
        if dataclasses.is_dataclass(hints[field.name]):
            item = _from_config_dict(hints[field.name], item)
        elif isinstance(item, ml_collections.ConfigDict):
            item = item.to_dict()
        values[field.name] = item
    return cls(**values)


def _plain_type(hint: Any) -> type:
    """The type T of a hint `T | None`."""
    for choice in typing.get_args(hint) or (hint,):
        origin = typing.get_origin(choice) or choice
        if isinstance(origin, type) and origin is not type(None):
            return origin
    return str
