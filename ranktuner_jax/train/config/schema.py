"""What a training run is made of: frozen dataclasses, read from a config file and overrides."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import textwrap
import typing
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, TypeVar

import ml_collections
from absl import flags
from etils import epath
from ml_collections import config_dict, config_flags

from ranktuner_jax import losses, models
from ranktuner_jax.data import HOLDOUT, DataConfig
from ranktuner_jax.errors import UserError
from ranktuner_jax.evals import EvalConfig
from ranktuner_jax.train.config_file import config_names, read_config_file, suggestion

__all__ = [
    "CheckpointConfig",
    "LossConfig",
    "MeshConfig",
    "OptimizerConfig",
    "StepConfig",
    "TelemetryConfig",
    "TrainConfig",
    "config_names",
    "describe",
    "differences",
    "load_config",
    "read_config",
    "to_dict",
]

_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """How tokens are weighted.

    Attributes:
      weighting: The method: ranktuner, sft, dft, eaft, talr, profit, deft, idft or entropy.
      options: Options of that method; its own defaults where they are not given.
      normalize: "tokens" divides the loss by the supervised tokens of the whole batch (the
        paper), "weights" by the sum of their weights.
      ramp_steps: Steps over which the weights go from 1 to their own value; 0 starts there.
      chunk_size: Tokens whose logits are formed at once; 0 lets the loss choose.
    """

    weighting: str = "ranktuner"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    normalize: Literal["tokens", "weights"] = "tokens"
    ramp_steps: int = 0
    chunk_size: int = 0

    def __post_init__(self) -> None:
        _one_of("loss.weighting", self.weighting, losses.WEIGHTINGS)
        _one_of("loss.normalize", self.normalize, ("tokens", "weights"))
        _at_least("loss.ramp_steps", self.ramp_steps, 0)
        _at_least("loss.chunk_size", self.chunk_size, 0)
        self.make_weighting()

    def make_weighting(self) -> Any:
        """The weighting itself, built from its name and options."""
        method = losses.WEIGHTINGS[self.weighting]
        known = [field.name for field in dataclasses.fields(method)]
        for name in self.options:
            if name not in known:
                raise UserError(
                    f"loss.options: {self.weighting} takes {', '.join(known) or 'no options'}, "
                    f"got {name!r}{suggestion(name, known)}"
                )
        try:
            return method(**self.options)
        except (TypeError, ValueError) as error:
            raise UserError(f"loss.options of {self.weighting}: {error}") from error


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule.

    Attributes:
      learning_rate: Peak learning rate.
      schedule: "cosine" falls to zero at the last step, "linear" too, "constant" stays.
      warmup_ratio: Share of the steps over which the rate rises from zero.
      b1: Decay of the first moment.
      b2: Decay of the second moment.
      weight_decay: Decoupled weight decay, on matrices only (norms and biases are spared).
      clip_norm: Largest global gradient norm; 0 does not clip.
    """

    learning_rate: float = 1e-5
    schedule: str = "cosine"
    warmup_ratio: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    weight_decay: float = 0.01
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        _one_of("optimizer.schedule", self.schedule, ("cosine", "linear", "constant"))
        for name in ("learning_rate", "weight_decay", "clip_norm"):
            _at_least(f"optimizer.{name}", getattr(self, name), 0)
        for name in ("warmup_ratio", "b1", "b2"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise UserError(f"optimizer.{name}: expected a number in [0, 1), got {value}")


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """The size, the number and the arithmetic of the steps.

    Attributes:
      steps: Optimizer steps.
      epochs: Passes over the data; where it is given, it replaces `steps`.
      batch_size: Rows of a step, over all devices and micro-batches.
      accumulation: Micro-batches that a step is cut into; more need less memory.
      log_every: Steps between two lines of metrics.
      remat: What the backward pass computes again instead of storing: "none", "dots" (all but
        projections) or "full".
      compute_dtype: Type of the activations, "float32" or "bfloat16".
      param_dtype: Type of the parameters and of the optimizer state.
      on_nonfinite: A step whose loss or gradient is not finite changes nothing; "stop" then ends
        the run and keeps what does the step again, "skip" goes on with the next rows.
      nonfinite_limit: Steps of a run that "skip" may leave out; one more ends it.
      profile_steps: First and last step of a profiler's trace, such as 10,12, which goes to
        profile/ in the workdir; () for none.
    """

    steps: int = 100
    epochs: float | None = None
    batch_size: int = 16
    accumulation: int = 1
    log_every: int = 1
    remat: str = "none"
    compute_dtype: str = "float32"
    param_dtype: str = "float32"
    on_nonfinite: str = "stop"
    nonfinite_limit: int = 10
    profile_steps: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation", "log_every"):
            _at_least(f"train.{name}", getattr(self, name), 1)
        if self.epochs is not None and self.epochs <= 0:
            raise UserError(f"train.epochs: expected more than 0, got {self.epochs}")
        if self.batch_size % self.accumulation:
            raise UserError(
                f"train.batch_size: expected a multiple of train.accumulation "
                f"({self.accumulation}), got {self.batch_size}"
            )
        _one_of("train.remat", self.remat, models.REMAT_POLICIES)
        _one_of("train.on_nonfinite", self.on_nonfinite, ("stop", "skip"))
        _at_least("train.nonfinite_limit", self.nonfinite_limit, 0)
        if self.profile_steps and not (
            len(self.profile_steps) == 2 and 1 <= self.profile_steps[0] <= self.profile_steps[1]
        ):
            raise UserError(
                "train.profile_steps: expected the first and the last step of a trace, such as "
                f"10,12, got {self.profile_steps}"
            )
        for name in ("compute_dtype", "param_dtype"):
            _one_of(f"train.{name}", getattr(self, name), ("float32", "bfloat16"))


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Over how many devices what is cut; one size may be -1, which takes the devices left over.

    Attributes:
      data: Copies of the model, each with its own rows.
      fsdp: Devices that share one copy of the parameters and also cut the rows.
      tensor: Devices that share the work of one row.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        sizes = (self.data, self.fsdp, self.tensor)
        if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
            raise UserError(
                f"mesh: expected sizes of at least 1, of which one may be -1, got data={self.data}"
                f" fsdp={self.fsdp} tensor={self.tensor}"
            )


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When the state of the run is saved, and what is kept.

    Attributes:
      every_steps: Steps between two checkpoints; 0 saves at the end only.
      keep_last: Newest checkpoints that are kept.
      keep_every: Checkpoints at multiples of this step are kept for good; 0 for none.
      asynchronous: Writes while training goes on; this takes a second copy of the state, in the
        host's memory.
    """

    every_steps: int = 0
    keep_last: int = 2
    keep_every: int = 0
    asynchronous: bool = True

    def __post_init__(self) -> None:
        _at_least("checkpoint.every_steps", self.every_steps, 0)
        _at_least("checkpoint.keep_last", self.keep_last, 1)
        _at_least("checkpoint.keep_every", self.keep_every, 0)


@dataclasses.dataclass(frozen=True)
class TelemetryConfig:
    """Where the numbers of a run go, beside metrics.jsonl in its workdir.

    Attributes:
      tensorboard: Writes TensorBoard's events to tensorboard/ in the workdir.
      wandb: A project of Weights & Biases, or entity/project, that takes them too; "" for none.
    """

    tensorboard: bool = True
    wandb: str = ""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A whole run.

    Attributes:
      model: What is fine-tuned: a Hugging Face folder, a hub id, or "smollm2-135m".
      seed: Seed of the order of the data.
    """

    model: str = "smollm2-135m"
    seed: int = 0
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    train: StepConfig = dataclasses.field(default_factory=StepConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    telemetry: TelemetryConfig = dataclasses.field(default_factory=TelemetryConfig)

    def __post_init__(self) -> None:
        if (self.eval.split == HOLDOUT) != (self.data.holdout > 0):
            raise UserError(
                "eval.split: expected 'holdout' where data.holdout keeps something out of training,"
                f" and only there, got eval.split={self.eval.split!r} and data.holdout="
                f"{self.data.holdout}; set both, or data.holdout=0 and a split of the source"
            )


def load_config(name: str, overrides: Sequence[str] = ()) -> TrainConfig:
    """Reads a config by name or path and applies overrides from the command line.

    A config file defines `get_config() -> ml_collections.ConfigDict`, which names only what it
    changes. An override of `loss.weighting` brings the options of the new weighting with it.

    Args:
      name: A name in the package `ranktuner_jax.configs`, or a path that ends in ".py".
      overrides: Arguments such as "--config.optimizer.learning_rate=1e-5".

    Returns:
      The checked config.

    Raises:
      UserError: If the config is not found, a key is unknown or a value has a wrong type.

    Example:
      >>> config = load_config("smollm2_chain_sum", ["--config.train.steps=5"])
      >>> config.train.steps
      5
    """
    config = _apply_overrides(_complete(read_config_file(name), name), overrides)
    return _from_config_dict(TrainConfig, config)


def read_config(workdir: str | os.PathLike[str]) -> TrainConfig:
    """The config of the run in a workdir.

    Raises:
      UserError: If there is no run.
    """
    path = epath.Path(workdir) / "config.json"
    try:
        chosen = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"--workdir: expected the config of a run at {path}, got {error}"
        ) from error
    return _from_config_dict(TrainConfig, _complete(chosen, str(path)))


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """The config as nested dictionaries of JSON types.

    Example:
      >>> to_dict(TrainConfig(seed=3))["seed"]
      3
    """
    return _jsonable(config)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """One "key: old, now new" for each key in which two configs (`to_dict`) differ.

    Example:
      >>> differences({"train": {"steps": 5}, "seed": 0}, {"train": {"steps": 9}, "seed": 0})
      ['train.steps: 5, now 9']
    """
    before, after = dict(_flatten(old)), dict(_flatten(new))
    absent = object()
    return [
        f"{key}: {before.get(key, 'absent')!r}, now {after.get(key, 'absent')!r}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key, absent) != after.get(key, absent)
    ]


def describe(config: TrainConfig | None = None, groups: Collection[str] = ()) -> str:
    """A line for each key that can be overridden: its name, its value and what it means.

    Args:
      config: Whose values; the defaults if left out.
      groups: The keys of the first level that count, such as "data"; all if left out.

    Example:
      >>> print([line for line in describe().splitlines() if "clip_norm" in line][0])
        --config.optimizer.clip_norm=1.0     Largest global gradient norm; 0 does not clip.
    """
    config = TrainConfig() if config is None else config
    names = groups or [field.name for field in dataclasses.fields(config)]
    return "\n".join(_describe_group(config, "", names)).strip("\n")


def _describe_group(group: Any, prefix: str, names: Collection[str] | None = None) -> list[str]:
    docs, keys, groups = _attribute_docs(type(group)), [], []
    for field in dataclasses.fields(group):
        if names is not None and field.name not in names:
            continue
        value, name = getattr(group, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            summary = _summary(type(value))
            groups += ["", f"{name}: {summary}", *_describe_group(value, f"{name}.")]
        elif name == "loss.options":
            groups += _describe_group(group.make_weighting(), "loss.options.")
        else:
            flag = f"  --config.{name}={value}"
            keys += textwrap.wrap(
                f"{flag:<38} {docs.get(field.name, '')}",
                width=100,
                subsequent_indent=" " * 39,
                drop_whitespace=True,
                replace_whitespace=False,
                break_long_words=False,
                break_on_hyphens=False,
            )
    return keys + groups


def _complete(chosen: Mapping[str, Any], origin: str) -> ml_collections.ConfigDict:
    """The defaults, and what was chosen over them."""
    config = _to_config_dict(TrainConfig())
    loss = chosen.get("loss")
    weighting = (
        loss.get("weighting") if isinstance(loss, Mapping | ml_collections.ConfigDict) else None
    )
    _complete_options(config, weighting)
    _update(config, chosen, origin)
    return config


def _complete_options(config: ml_collections.ConfigDict, weighting: str | None) -> None:
    """Writes every option of the weighting into the config, so that each can be overridden."""
    if weighting is not None:
        _one_of("loss.weighting", weighting, losses.WEIGHTINGS)
        config.loss.weighting = weighting
    method = losses.WEIGHTINGS[config.loss.weighting]
    config.loss.options = _to_config_dict(method())


def _update(
    config: ml_collections.ConfigDict, chosen: Mapping[str, Any], origin: str, prefix: str = ""
) -> None:
    """Sets what a config file chose, key by key, so that a mistake can be named."""
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
    """Applies "--config.key=value" arguments; they are checked against the types in the config."""
    given = _given_keys(overrides)
    weighting = given.get("loss.weighting", config.loss.weighting)
    if weighting != config.loss.weighting:
        _complete_options(config, weighting)
    keys = [key for key, _ in _flatten(config)]
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
    """The keys that arguments name, "--config.key=value" or "--config.key value"."""
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
    """A dataclass as a ConfigDict in which an absent value keeps its type."""
    result = ml_collections.ConfigDict()
    hints = typing.get_type_hints(type(value))
    for field in dataclasses.fields(value):
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
    """The frozen dataclass that `_to_config_dict` unfolded."""
    hints = typing.get_type_hints(cls)
    values = {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
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


def _jsonable(value: Any) -> Any:
    """Dataclasses, mappings and tuples as what JSON can hold."""
    if dataclasses.is_dataclass(value):
        return {
            field.name: _jsonable(getattr(value, field.name)) for field in dataclasses.fields(value)
        }
    if isinstance(value, Mapping):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_jsonable(item) for item in value]
    return value


def _flatten(config: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """All (dotted key, value) pairs of nested mappings."""
    pairs: list[tuple[str, Any]] = []
    for key, value in config.items():
        if isinstance(value, Mapping | ml_collections.ConfigDict):
            pairs.append((f"{prefix}{key}", {}))
            pairs += _flatten(value, f"{prefix}{key}.")
        else:
            pairs.append((f"{prefix}{key}", value))
    return pairs


def _summary(cls: type) -> str:
    return (cls.__doc__ or "").strip().splitlines()[0]


def _attribute_docs(cls: type) -> dict[str, str]:
    """The "Attributes:" of a Google docstring."""
    section = re.search(r"\n\s*Attributes:\n(.*?)(?:\n\s*\n|\Z)", cls.__doc__ or "", re.DOTALL)
    entries = re.split(r"\n\s+(?=\w+: )", "\n" + section[1]) if section else []
    pairs = (entry.strip().split(": ", 1) for entry in entries if ": " in entry)
    return {name: " ".join(text.split()) for name, text in pairs}


def _one_of(name: str, value: str, known: Any) -> None:
    if value not in list(known):  # A list: what came may have no hash.
        raise UserError(
            f"{name}: expected one of {', '.join(known)}, got {value!r}"
            f"{suggestion(str(value), list(known))}"
        )


def _at_least(name: str, value: float, least: float) -> None:
    if value < least:
        raise UserError(f"{name}: expected at least {least}, got {value}")
