"""From a decoder to the weights of a Hugging Face folder, file by file."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from ranktuner_jax.models.decoder import Decoder
from ranktuner_jax.models.hf.names import INDEX, tensor_names

__all__ = ["fetch_tensor", "save_tensors", "write_weights"]


def fetch_tensor(value: jax.Array, layer: int | None, shape: tuple[int, ...]) -> np.ndarray:
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
        # The axis of layers is never divided.
        array[shard.index if layer is None else shard.index[1:]] = part
    return array


def save_tensors(tensors: dict[str, np.ndarray], file: Path) -> None:
    """Writes a safetensors file; system errors (a full disk), which it only quotes, are raised."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


def write_weights(model: Decoder, folder: Path, *, max_shard_bytes: int) -> None:
    """Writes the weights as `model.safetensors`, or as shards with an index.

    Only process 0 writes, but all processes must call, since they gather the tensors together. A
    model on one CPU device is written straight from its memory; otherwise the host holds a copy
    of one file's tensors.
    """
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    params = {str(path[-1]): variable.get_value() for path, variable in flat}
    tensors = tensor_names(model.config)
    sizes = {
        tensor: math.prod(shape) * params[name].dtype.itemsize
        for tensor, (name, _, shape) in tensors.items()
    }
    groups: list[list[str]] = [[]]
    space = max_shard_bytes
    for tensor, size in sizes.items():
        if size > space and groups[-1]:
            groups.append([])
            space = max_shard_bytes
        groups[-1].append(tensor)
        space -= size
    first = jax.process_index() == 0
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, 1):
        file = f"model-{number:05}-of-{len(groups):05}.safetensors"
        if len(groups) == 1:
            file = "model.safetensors"
        values = {}
        for tensor in group:
            name, layer, shape = tensors[tensor]
            value = fetch_tensor(params[name], layer, shape)
            if first:
                values[tensor] = value
        if first:
            save_tensors(values, folder / file)
        del values  # Freed before the next file's are gathered.
        weight_map |= dict.fromkeys(group, file)
    if len(groups) > 1 and first:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
