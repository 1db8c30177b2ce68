"""Conversion of configs to JSON, their differences, and the help text of their keys."""

from __future__ import annotations

import dataclasses
import re
import textwrap
from collections.abc import Collection, Mapping
from typing import Any

import ml_collections

from ranktuner_jax.train.config.schema import TrainConfig, keys
from ranktuner_jax.train.step.optimizers import optimizer_options

__all__ = ["describe", "differences", "flatten", "to_dict"]


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """The config as nested dictionaries of JSON types.

    Example:
      >>> to_dict(TrainConfig(seed=3))["seed"]
      3
    """
    return jsonable(config)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """A string "key: old, now new" for each key in which two configs (`to_dict`) differ.

    Example:
      >>> differences({"train": {"steps": 5}, "seed": 0}, {"train": {"steps": 9}, "seed": 0})
      ['train.steps: 5, now 9']
    """
    before, after = dict(flatten(old)), dict(flatten(new))
    absent = object()
    return [
        f"{key}: {before.get(key, 'absent')!r}, now {after.get(key, 'absent')!r}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key, absent) != after.get(key, absent)
    ]


def describe(config: TrainConfig | None = None, groups: Collection[str] = ()) -> str:
    """Help text with one entry per key: its name, its value and its meaning.

    Args:
      config: The config whose values to show; the defaults if left out.
      groups: The top-level keys to show, such as "data"; all if empty.

    Example:
      >>> print([line for line in describe().splitlines() if "clip_norm" in line][0])
        --config.optimizer.clip_norm=1.0     Maximum global gradient norm; 0 disables clipping.
    """
    config = TrainConfig() if config is None else config
    names = groups or [field.name for field in keys(type(config))]
    return "\n".join(_describe_group(config, "", names)).strip("\n")


def _describe_group(group: Any, prefix: str, names: Collection[str] | None = None) -> list[str]:
    docs, lines, groups = _attribute_docs(type(group)), [], []
    for field in keys(type(group)):
        if names is not None and field.name not in names:
            continue
        value, name = getattr(group, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            summary = _summary(type(value))
            groups += ["", f"{name}: {summary}", *_describe_group(value, f"{name}.")]
        elif name == "loss.options":
            groups += _describe_group(group.make_weighting(), "loss.options.")
        elif name == "optimizer.options":
            options = {**optimizer_options(group.name), **value}
            groups += [
                f"  {f'--config.{name}.{key}={chosen}':<36} Option of {group.name}."
                for key, chosen in options.items()
            ]
        else:
            flag = f"  --config.{name}={value}"
            lines += textwrap.wrap(
                f"{flag:<38} {docs.get(field.name, '')}",
                width=100,
                subsequent_indent=" " * 39,
                drop_whitespace=True,
                replace_whitespace=False,
                break_long_words=False,
                break_on_hyphens=False,
            )
    return lines + groups


def jsonable(value: Any) -> Any:
    """Converts dataclasses, mappings and tuples to JSON types."""
    if dataclasses.is_dataclass(value):
        return {field.name: jsonable(getattr(value, field.name)) for field in keys(type(value))}
    if isinstance(value, Mapping):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [jsonable(item) for item in value]
    return value


def flatten(config: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """All (dotted key, value) pairs of nested mappings."""
    pairs: list[tuple[str, Any]] = []
    for key, value in config.items():
        if isinstance(value, Mapping | ml_collections.ConfigDict):
            pairs.append((f"{prefix}{key}", {}))
            pairs += flatten(value, f"{prefix}{key}.")
        else:
            pairs.append((f"{prefix}{key}", value))
    return pairs


def _summary(cls: type) -> str:
    return (cls.__doc__ or "").strip().splitlines()[0]


def _attribute_docs(cls: type) -> dict[str, str]:
    """The entries of "Attributes:" in a Google-style docstring."""
    section = re.search(r"\n\s*Attributes:\n(.*?)(?:\n\s*\n|\Z)", cls.__doc__ or "", re.DOTALL)
    entries = re.split(r"\n\s+(?=\w+: )", "\n" + section[1]) if section else []
    pairs = (entry.strip().split(": ", 1) for entry in entries if ": " in entry)
    return {name: " ".join(text.split()) for name, text in pairs}
