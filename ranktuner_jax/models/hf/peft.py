"""Adapters as PEFT's folders: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import dataclasses
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
from ranktuner_jax.models.lora import Lora, adapter_factors, adapter_shapes

if TYPE_CHECKING:
    from ranktuner_jax.models.decoder import Decoder

__all__ = ["ADAPTER_CONFIG", "read_adapter", "write_adapter"]

ADAPTER_CONFIG = "adapter_config.json"
_TENSORS = "adapter_model.safetensors"
_PREFIX = "base_model.model."

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
    "ensure_weight_tying": (False, None),
}


def read_adapter(folder: Path, model: Decoder) -> tuple[Lora, dict[str, np.ndarray]]:
    """An adapter for a model: its options, and its factors.

    The matrices that have one are those with tensors; `target_modules`, which may be a
    regular expression, is not read. Dropout, which is for training alone, is not either. PEFT
    saves embeddings and head themselves beside their adapters: they must be the model's.

    Args:
      folder: PEFT's folder.
      model: The model; its parameters may be shapes alone, which are not compared.

    Returns:
      The options; and the factors, named and shaped as by `adapter_shapes`.

    Raises:
      UserError: If there is no adapter, it is of a kind other than LoRA on the model's
        matrices, or its tensors do not fit the model.
    """
    config = model.config
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
        for name in partition.TARGETS
        if any(tensor in tensors for _, tensor in _tensors(config, name, "a"))
    )
    if not targets:
        raise UserError(
            f"{folder}: expected adapters of the model's matrices, such as "
            f"{_tensors(config, 'q', 'a')[0][1]}, got {', '.join(list(tensors)[:3]) or 'none'}"
        )
    lora = Lora(rank, alpha, bool(options.get("use_rslora")), targets)
    factors = {}
    problems = []
    flat_shapes = _flat_shapes(config, lora)
    for name, shape in adapter_shapes(config, lora).items():
        factor = factors[name] = np.zeros(shape, np.float32)
        target, _, part = name.partition("_lora_")
        for layer, tensor in _tensors(config, target, part):
            expected = flat_shapes[name][:: -1 if target == "embed" else 1]
            value = tensors.pop(tensor, None)
            if value is None or value.shape != expected:
                got = "none" if value is None else str(value.shape)
                problems.append(f"{tensor} (expected {expected}, got {got})")
                continue
            whole = factor if layer is None else factor[layer]
            rows = value.T if target == "embed" else value
            rows = rows.reshape(-1, *whole.shape[1:])
            whole[: len(rows)] = rows  # The rest pads the vocabulary.
    for name, parameter in (("embed", model.embed.get_value()), ("head", model.unembed)):
        tensor = _PREFIX + _module(config, name) + ".base_layer.weight"
        copy = tensors.pop(tensor, None)
        if copy is not None and not _same(copy, parameter, config.vocab_size):
            problems.append(f"{tensor} (expected the model's values, got others)")
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
    flat_shapes = _flat_shapes(model.config, lora)
    for name, value in adapter_factors(model).items():
        target, _, part = name.partition("_lora_")
        for layer, tensor in _tensors(model.config, target, part):
            rows = fetch_tensor(value, layer, flat_shapes[name])
            tensors[tensor] = np.ascontiguousarray(rows.T) if target == "embed" else rows
    if jax.process_index() != 0:
        return
    save_tensors(tensors, folder / _TENSORS)
    modules = [_module(model.config, name).split(".")[-1] for name in lora.targets]
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


def _module(config: DecoderConfig, target: str) -> str:
    return FAMILIES[config.family].tensors[target].removesuffix(".weight")


def _tensors(config: DecoderConfig, target: str, part: str) -> list[tuple[int | None, str]]:
    """PEFT's tensor of a factor, `a` or `b`, in each layer; or outside of them, with None."""
    module = _PREFIX + _module(config, target)
    if target == "embed":
        # To PEFT embeddings map from the vocabulary: transposed, and so A and B change places.
        return [(None, f"{module}.lora_embedding_{'BA'['ab'.index(part)]}")]
    layers = range(config.num_layers) if target in partition.PROJECTIONS else (None,)
    return [(layer, f"{module.format(layer)}.lora_{part.upper()}.weight") for layer in layers]


def _flat_shapes(config: DecoderConfig, lora: Lora) -> dict[str, tuple[int, int]]:
    """The shape of each factor in one layer: outputs and inputs flattened, nothing padded."""
    shapes = {}
    for name, shape in adapter_shapes(dataclasses.replace(config, vocab_multiple=1), lora).items():
        inside = shape["layers" in partition.ADAPTER_AXES[name] :]
        outputs = partition.OUTPUTS[name]
        shapes[name] = math.prod(inside[:outputs]), math.prod(inside[outputs:])
    return shapes


def _same(copy: np.ndarray, parameter: Any, rows: int) -> bool:
    """Whether a tensor has a parameter's values, in the narrower of their types."""
    if isinstance(parameter, jax.ShapeDtypeStruct):
        return True
    own = fetch_tensor(parameter, None, (rows, *parameter.shape[1:]))
    narrow = min(copy.dtype, own.dtype, key=lambda dtype: dtype.itemsize)
    return np.array_equal(copy.astype(narrow), own.astype(narrow))


def _read_tensors(file: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        tensors: dict[str, np.ndarray] = load_file(file)
    except SafetensorError as error:
        raise UserError(f"{file}: not a safetensors file: {error}") from error
    return tensors
