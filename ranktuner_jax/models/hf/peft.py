"""Adapters as PEFT's folders: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from ranktuner_jax.errors import UserError
from ranktuner_jax.models import partition
from ranktuner_jax.models.config import DecoderConfig
from ranktuner_jax.models.families import FAMILIES
from ranktuner_jax.models.hf.writing import fetch_tensor, save_tensors
from ranktuner_jax.models.lora import Lora, adapter_shapes

if TYPE_CHECKING:
    from ranktuner_jax.models.decoder import Decoder

__all__ = ["ADAPTER_CONFIG", "read_adapter", "write_adapter"]

ADAPTER_CONFIG = "adapter_config.json"
_TENSORS = "adapter_model.safetensors"

# Options of PEFT that change what an adapter computes, and the values that mean "not used".
_UNUSED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, [], {}),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "megatron_config": (None,),
}


def read_adapter(folder: Path, config: DecoderConfig) -> tuple[Lora, dict[str, np.ndarray]]:
    """An adapter for a model with this config: its options, and its factors.

    The projections that have one are those with tensors; `target_modules`, which may be a
    regular expression, is not read. Dropout, which is for training alone, is not either.

    Args:
      folder: PEFT's folder.
      config: The model.

    Returns:
      The options; and A `[L, rank, *inputs]` and B `[L, *outputs, rank]` by our names.

    Raises:
      UserError: If there is no adapter, it is of a kind other than LoRA on the layers'
        projections, or its tensors do not fit the model.
    """
    file = folder / ADAPTER_CONFIG
    if not file.is_file() or not (folder / _TENSORS).is_file():
        missing = ADAPTER_CONFIG if not file.is_file() else _TENSORS
        raise UserError(f"{folder}: expected PEFT's adapter, found no {missing}")
    try:
        options = json.loads(file.read_text(encoding="utf-8"))
        rank, alpha = int(options["r"]), float(options["lora_alpha"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: expected r and lora_alpha of an adapter, got {error!r}") from None
    for name, unused in _UNUSED.items():
        if (value := options.get(name, unused[0])) not in unused:
            raise UserError(
                f"{file}: {name}={value!r} is not supported, expected {unused[0]!r}; merge the "
                "adapter with PEFT, and load the whole model"
            )
    tensors = _read_tensors(folder / _TENSORS)
    targets = tuple(
        name
        for name in partition.PROJECTIONS
        if any(tensor in tensors for _, tensor in _tensors(config, name, "a"))
    )
    if not targets:
        raise UserError(
            f"{folder}: expected adapters of the layers' projections, such as "
            f"{_tensors(config, 'q', 'a')[0][1]}, got {', '.join(list(tensors)[:3]) or 'none'}"
        )
    lora = Lora(rank, alpha, bool(options.get("use_rslora")), targets)
    factors = {}
    problems = []
    for name, shape in adapter_shapes(config, lora).items():
        factor = np.zeros(shape, np.float32)
        target, _, part = name.partition("_lora_")
        for layer, tensor in _tensors(config, target, part):
            flat = _flat_shape(name, shape)
            value = tensors.pop(tensor, None)
            if value is None or value.shape != flat:
                got = "none" if value is None else str(value.shape)
                problems.append(f"{tensor} (expected {flat}, got {got})")
                continue
            factor[layer] = value.reshape(shape[1:])
        factors[name] = factor
    problems += [f"{tensor} (not expected)" for tensor in tensors]
    if problems:
        more = f", and {len(problems) - 4} more" * (len(problems) > 4)
        raise UserError(
            f"{folder}: the adapter does not fit the model: {', '.join(problems[:4])}{more}"
        )
    return lora, factors


def write_adapter(model: Decoder, folder: Path, base: str) -> None:
    """Writes the adapters of a decoder.

    Only process 0 writes, but all processes must call, since they gather the tensors together.

    Args:
      model: The decoder; its frozen parameters are not read, and may be shapes alone.
      folder: The folder, which exists.
      base: The name or folder of the frozen model, as PEFT is to find it.
    """
    lora = model.layers.lora
    assert lora is not None
    tensors = {}
    for name, shape in adapter_shapes(model.config, lora).items():
        target, _, part = name.partition("_lora_")
        value = getattr(model.layers, name).get_value()
        for layer, tensor in _tensors(model.config, target, part):
            tensors[tensor] = fetch_tensor(value, layer, _flat_shape(name, shape))
    if jax.process_index() != 0:
        return
    save_tensors(tensors, folder / _TENSORS)
    modules = [FAMILIES[model.config.family].tensors[name].split(".")[-2] for name in lora.targets]
    options: Mapping[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "use_rslora": lora.rslora,
        "lora_dropout": lora.dropout,
        "target_modules": modules,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    (folder / ADAPTER_CONFIG).write_text(json.dumps(options, indent=2) + "\n", encoding="utf-8")


def _tensors(config: DecoderConfig, target: str, part: str) -> list[tuple[int, str]]:
    """PEFT's tensor of a factor, `a` or `b`, in each layer."""
    module = FAMILIES[config.family].tensors[target].removesuffix(".weight")
    return [
        (layer, f"base_model.model.{module.format(layer)}.lora_{part.upper()}.weight")
        for layer in range(config.num_layers)
    ]


def _flat_shape(name: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """A layer's factor as PEFT has it: outputs and inputs flattened."""
    first_input = 1 + partition.OUTPUTS[name]
    return math.prod(shape[1:first_input]), math.prod(shape[first_input:])


def _read_tensors(file: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        tensors: dict[str, np.ndarray] = load_file(file)
    except SafetensorError as error:
        raise UserError(f"{file}: not a safetensors file: {error}") from error
    return tensors
