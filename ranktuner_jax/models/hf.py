"""Hugging Face folders, read and written tensor by tensor."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, SingleDeviceSharding

from ranktuner_jax.errors import UserError
from ranktuner_jax.models import partition
from ranktuner_jax.models.config import DecoderConfig
from ranktuner_jax.models.decoder import Decoder

if TYPE_CHECKING:
    from jaxtyping import DTypeLike

__all__ = [
    "NAMES",
    "abstract_decoder",
    "read_config",
    "read_decoder",
    "tensor_names",
    "write_weights",
]

_LLAMA = {
    "embed": "model.embed_tokens.weight",
    "attention_norm": "model.layers.{}.input_layernorm.weight",
    "q": "model.layers.{}.self_attn.q_proj.weight",
    "k": "model.layers.{}.self_attn.k_proj.weight",
    "v": "model.layers.{}.self_attn.v_proj.weight",
    "q_bias": "model.layers.{}.self_attn.q_proj.bias",
    "k_bias": "model.layers.{}.self_attn.k_proj.bias",
    "v_bias": "model.layers.{}.self_attn.v_proj.bias",
    "o": "model.layers.{}.self_attn.o_proj.weight",
    "o_bias": "model.layers.{}.self_attn.o_proj.bias",
    "mlp_norm": "model.layers.{}.post_attention_layernorm.weight",
    "gate": "model.layers.{}.mlp.gate_proj.weight",
    "up": "model.layers.{}.mlp.up_proj.weight",
    "gate_bias": "model.layers.{}.mlp.gate_proj.bias",
    "up_bias": "model.layers.{}.mlp.up_proj.bias",
    "down": "model.layers.{}.mlp.down_proj.weight",
    "down_bias": "model.layers.{}.mlp.down_proj.bias",
    "final_norm": "model.norm.weight",
    "head": "lm_head.weight",
}

# Our parameter -> Hugging Face's tensor, `{}` standing for the layer. Which of them a
# checkpoint has follows from its config.
NAMES: dict[str, dict[str, str]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA
    | {
        "q_norm": "model.layers.{}.self_attn.q_norm.weight",
        "k_norm": "model.layers.{}.self_attn.k_norm.weight",
    },
}

# How many of a matrix's axes (without the layer) are outputs; Hugging Face flattens them, and
# the inputs likewise. Whatever is not here is a vector.
_OUTPUTS = {"embed": 1, "head": 1, "q": 2, "k": 2, "v": 2, "o": 1, "gate": 1, "up": 1, "down": 1}

# Tensors that old checkpoints carry and nothing reads.
_IGNORED = (".rotary_emb.inv_freq",)

_INDEX = "model.safetensors.index.json"


def tensor_names(config: DecoderConfig) -> dict[str, tuple[str, int | None, tuple[int, ...]]]:
    """Every tensor of a checkpoint: `{its name: (our parameter, layer, its shape)}`.

    Example:
      >>> tensor_names(DecoderConfig())["model.layers.3.mlp.up_proj.weight"]
      ('up', 3, (1536, 576))
    """
    names: dict[str, tuple[str, int | None, tuple[int, ...]]] = {}
    for name, axes in partition.param_axes(config).items():
        sizes = [
            config.vocab_size if axis == "vocab" else size
            for axis, size in axes.items()
            if axis != "layers"
        ]
        outputs = _OUTPUTS.get(name, len(sizes))
        parts = [part for part in (sizes[:outputs], sizes[outputs:]) if part]
        shape = tuple(map(math.prod, parts))
        template = NAMES[config.family][name]
        layers = range(config.num_layers) if "layers" in axes else (None,)
        names |= {template.format(layer): (name, layer, shape) for layer in layers}
    return names


def read_config(folder: Path) -> DecoderConfig:
    """The config of a Hugging Face folder.

    Raises:
      UserError: If there is none, or it is of a model that is not supported.
    """
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no config.json; expected a Hugging Face model folder")
    try:
        hf = AutoConfig.from_pretrained(folder)
    except (ValueError, OSError, KeyError) as error:
        raise UserError(f"{folder}/config.json: {_first_line(error)}") from error
    return DecoderConfig.from_hf(hf)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


class _Checkpoint:
    """The tensors of a folder's safetensors files, by name, read a slice at a time."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack):
        from safetensors import SafetensorError, safe_open

        if (folder / _INDEX).is_file():
            index = json.loads((folder / _INDEX).read_text())
            files = sorted(set(index["weight_map"].values()))
        elif (folder / "model.safetensors").is_file():
            files = ["model.safetensors"]
        else:
            files = sorted(p.name for p in folder.glob("*.safetensors"))
        if len(files) == 0 or (len(files) > 1 and not (folder / _INDEX).is_file()):
            raise UserError(
                f"{folder}: expected model.safetensors, or {_INDEX} with its shards, "
                f"found {', '.join(files) or 'no safetensors file'}"
            )
        self.folder = folder
        self.slices: dict[str, Any] = {}
        for file in files:
            if not (folder / file).is_file():
                raise UserError(f"{folder}: {_INDEX} names {file}, which is missing")
            try:
                handle = stack.enter_context(safe_open(folder / file, framework="numpy"))
            except SafetensorError as error:
                raise UserError(f"{folder / file}: not a safetensors file: {error}") from error
            self.slices |= {key: handle.get_slice(key) for key in handle.keys()}  # noqa: SIM118

    def check(self, config: DecoderConfig) -> None:
        """Refuses a checkpoint that is not exactly what the config says."""
        wanted = tensor_names(config)
        found = {k for k in self.slices if not k.endswith(_IGNORED)}
        if config.tie_embeddings:
            # Some exporters write the tied head again.
            found.discard(NAMES[config.family]["head"])
        problems = {
            "missing": sorted(wanted.keys() - found),
            "surplus": sorted(found - wanted.keys()),
            "wrongly shaped": [
                f"{name} (expected {shape}, got {got})"
                for name, (_, _, shape) in wanted.items()
                if name in found and (got := tuple(self.slices[name].get_shape())) != shape
            ],
        }
        if any(problems.values()):
            lines = [
                f"{len(names)} {kind}: {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"
                for kind, names in problems.items()
                if names
            ]
            raise UserError(
                f"{self.folder}: the tensors do not match config.json: {'; '.join(lines)}"
            )

    def read(
        self,
        config: DecoderConfig,
        name: str,
        index: tuple[slice, ...],
        shape: tuple[int, ...],
        dtype: np.dtype,
    ) -> np.ndarray:
        """The part `index` of our parameter `name`, whose whole shape is `shape`."""
        bounds = [s.indices(size)[:2] for s, size in zip(index, shape, strict=True)]
        out = np.zeros([stop - start for start, stop in bounds], dtype)
        template = NAMES[config.family][name]
        if "layers" not in partition.PARAM_AXES[name]:
            self._fill(out, template, name, bounds, shape)
            return out
        for i, layer in enumerate(range(*bounds[0])):
            self._fill(out[i], template.format(layer), name, bounds[1:], shape[1:])
        return out

    def _fill(
        self,
        out: np.ndarray,
        tensor: str,
        name: str,
        bounds: list[tuple[int, int]],
        shape: tuple[int, ...],
    ) -> None:
        source = self.slices[tensor]
        outputs = _OUTPUTS.get(name, len(shape))
        rows = _flat(bounds[:outputs], shape[:outputs])
        # Rows of the vocabulary beyond the real ones are padding, and stay zero.
        stop = min(rows.stop, source.get_shape()[0])
        if rows.start >= stop:
            return
        if outputs == len(shape):
            out.reshape(-1)[...] = source[rows]
        else:
            columns = _flat(bounds[outputs:], shape[outputs:])
            flat = out.reshape(rows.stop - rows.start, -1)
            flat[: stop - rows.start] = source[rows.start : stop, columns]


def _flat(bounds: list[tuple[int, int]], shape: tuple[int, ...]) -> slice:
    """A block of axes as one slice of the flattened axes; only the first may be divided."""
    inner = math.prod(shape[1:])
    assert all(b == (0, size) for b, size in zip(bounds[1:], shape[1:], strict=True))
    return slice(bounds[0][0] * inner, bounds[0][1] * inner)


def abstract_decoder(
    config: DecoderConfig, *, mesh: Mesh | None, param_dtype: DTypeLike, **options: Any
) -> tuple[nnx.GraphDef[Decoder], nnx.State]:
    """A decoder without its arrays: its structure, and shapes that say where each will lie.

    Args:
      config: Its config.
      mesh: Where the parameters will lie; `None` for the default device.
      param_dtype: Their type.
      **options: Passed to `Decoder`.

    Returns:
      What `nnx.split` gives of a decoder, with a `jax.ShapeDtypeStruct` for each array.
    """
    graph, params = nnx.split(
        nnx.eval_shape(
            lambda: Decoder(config, rngs=nnx.Rngs(0), param_dtype=param_dtype, mesh=mesh, **options)
        )
    )
    default = SingleDeviceSharding(jnp.zeros(()).device)
    shardings = (
        jax.tree.map(lambda _: default, params)
        if mesh is None
        else partition.param_shardings(params, mesh)
    )
    return graph, jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        params,
        shardings,
    )


def read_decoder(
    folder: Path,
    config: DecoderConfig,
    *,
    mesh: Mesh | None,
    param_dtype: DTypeLike,
    **options: Any,
) -> Decoder:
    """A decoder with the folder's weights, each shard read straight to its device.

    Host memory beyond what the process keeps is at most one shard of the largest
    stacked parameter and one tensor.

    Args:
      folder: A Hugging Face folder.
      config: What `read_config` said, with any change of ours.
      mesh: Where to put the parameters; `None` for the default device.
      param_dtype: Their type.
      **options: Passed to `Decoder`.

    Raises:
      UserError: If a tensor is missing, surplus or wrongly shaped.
    """
    graph, shapes = abstract_decoder(config, mesh=mesh, param_dtype=param_dtype, **options)
    with contextlib.ExitStack() as stack:
        checkpoint = _Checkpoint(folder, stack)
        checkpoint.check(config)

        def load(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
            name = path[-2].key  # (..., the parameter's name, its value)
            shards: list[jax.Array] = []
            part: tuple[slice, ...] | None = None
            host: np.ndarray | None = None
            # Devices that hold the same part stand together, so that it is read once.
            parts = leaf.sharding.addressable_devices_indices_map(leaf.shape)
            for device, index in sorted(parts.items(), key=lambda item: str(item[1])):
                assert index is not None
                if index != part:
                    host = None  # Let go before the next part is read.
                    part, host = index, checkpoint.read(config, name, index, leaf.shape, leaf.dtype)
                shards.append(jax.block_until_ready(jax.device_put(host, device)))
            return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, shards)

        params = jax.tree_util.tree_map_with_path(load, shapes)
    return nnx.merge(graph, params)


def _fetch(value: jax.Array, layer: int | None, shape: tuple[int, ...]) -> np.ndarray:
    """One tensor in Hugging Face's shape, gathered from all devices and processes."""
    if value.is_fully_addressable:
        array = _gather(value, layer)
    else:
        from jax.experimental import multihost_utils

        part = value if layer is None else value[layer]
        array = np.asarray(multihost_utils.process_allgather(part, tiled=True))
    rows = array.size // math.prod(shape[1:])
    return array.reshape(rows, *shape[1:])[: shape[0]]


def _gather(value: jax.Array, layer: int | None) -> np.ndarray:
    """One layer of an array, or all of it, from this process's devices.

    Not `np.asarray(value)`: JAX would keep that copy as long as the array.
    """
    where = slice(None) if layer is None else layer
    shards = [shard for shard in value.addressable_shards if shard.replica_id == 0]
    parts = [
        np.asarray(shard.data)[where]  # A view.
        if shard.device.platform == "cpu"
        else np.asarray(shard.data[where])
        for shard in shards
    ]
    if len(parts) == 1:
        return parts[0]
    array = np.empty(value.shape if layer is None else value.shape[1:], value.dtype)
    for shard, part in zip(shards, parts, strict=True):
        array[shard.index if layer is None else shard.index[1:]] = part  # No layer is divided.
    return array


@contextlib.contextmanager
def _system_errors() -> Iterator[None]:
    """Raises what the system said (a full disk) as `OSError`; safetensors has it in words."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


def write_weights(model: Decoder, folder: Path, *, max_shard_bytes: int) -> None:
    """Writes the weights as `model.safetensors`, or as shards with an index.

    Only process 0 writes; all processes must call, for they gather the tensors together. Where one
    CPU device holds the model, its own memory is written from; elsewhere the host holds a copy of
    the tensors of one file.
    """
    from safetensors.numpy import save_file

    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    params = {str(path[-1]): variable.get_value() for path, variable in flat}
    tensors = tensor_names(model.config)
    sizes = {
        tensor: math.prod(shape) * params[name].dtype.itemsize
        for tensor, (name, _, shape) in tensors.items()
    }
    groups: list[list[str]] = [[]]
    room = max_shard_bytes
    for tensor, size in sizes.items():
        if size > room and groups[-1]:
            groups.append([])
            room = max_shard_bytes
        groups[-1].append(tensor)
        room -= size
    first = jax.process_index() == 0
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, 1):
        file = f"model-{number:05}-of-{len(groups):05}.safetensors"
        if len(groups) == 1:
            file = "model.safetensors"
        values = {}
        for tensor in group:
            name, layer, shape = tensors[tensor]
            value = _fetch(params[name], layer, shape)
            if first:
                values[tensor] = value
        if first:
            with _system_errors():
                save_file(values, folder / file, metadata={"format": "pt"})
        del values  # Before those of the next file are made.
        weight_map |= dict.fromkeys(group, file)
    if len(groups) > 1 and first:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
