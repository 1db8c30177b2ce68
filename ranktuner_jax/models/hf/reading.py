"""From a Hugging Face folder to a decoder, shard by shard."""

from __future__ import annotations

import contextlib
import json
import logging
import math
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
from ranktuner_jax.models.families import FAMILIES
from ranktuner_jax.models.hf.names import INDEX, tensor_names
from ranktuner_jax.models.hf.peft import ADAPTER_CONFIG
from ranktuner_jax.models.lora import quantize_layers
from ranktuner_jax.models.quantized import BLOCK, Quantized, quantize

if TYPE_CHECKING:
    from jaxtyping import DTypeLike

__all__ = ["abstract_decoder", "read_config", "read_decoder"]

_log = logging.getLogger(__name__)

# Tensors that old checkpoints carry and nothing reads.
_IGNORED = (".rotary_emb.inv_freq",)


def read_config(folder: Path) -> DecoderConfig:
    """The config of a Hugging Face folder.

    Raises:
      UserError: If there is no config.json, or its model is not supported.
    """
    from transformers import AutoConfig

    if (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file():
        raise UserError(
            f"{folder}: an adapter, expected a whole model; name the model that it belongs to, and "
            "this folder with --adapter"
        )
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
    """The tensors of a folder's safetensors files, by name, read a slice at a time.

    Of a multimodal model it has those of the text model, under the names that they have alone.
    """

    def __init__(self, folder: Path, config: DecoderConfig, stack: contextlib.ExitStack):
        from safetensors import SafetensorError, safe_open

        if (folder / INDEX).is_file():
            index = json.loads((folder / INDEX).read_text())
            files = sorted(set(index["weight_map"].values()))
        elif (folder / "model.safetensors").is_file():
            files = ["model.safetensors"]
        else:
            files = sorted(p.name for p in folder.glob("*.safetensors"))
        if len(files) == 0 or (len(files) > 1 and not (folder / INDEX).is_file()):
            raise UserError(
                f"{folder}: expected model.safetensors, or {INDEX} with its shards, "
                f"found {', '.join(files) or 'no safetensors file'}"
            )
        self.folder = folder
        self.slices: dict[str, Any] = {}
        for file in files:
            if not (folder / file).is_file():
                raise UserError(f"{folder}: {INDEX} names {file}, which is missing")
            try:
                handle = stack.enter_context(safe_open(folder / file, framework="numpy"))
            except SafetensorError as error:
                raise UserError(f"{folder / file}: not a safetensors file: {error}") from error
            self.slices |= {key: handle.get_slice(key) for key in handle.keys()}  # noqa: SIM118
        prefix = FAMILIES[config.family].text_prefix
        if prefix and any(name.startswith(prefix) for name in self.slices):
            aside = {name.split(".")[0] for name in self.slices if not name.startswith(prefix)}
            self.slices = {
                name.removeprefix(prefix): tensor
                for name, tensor in self.slices.items()
                if name.startswith(prefix)
            }
            if jax.process_index() == 0:
                _log.warning(
                    "%s: the text model is read, and saved, alone: %s left aside",
                    folder,
                    ", ".join(sorted(aside)) or "nothing",
                )

    def check(self, config: DecoderConfig) -> None:
        """Raises unless the tensors are exactly those that the config calls for."""
        wanted = tensor_names(config)
        found = {k for k in self.slices if not k.endswith(_IGNORED)}
        if config.tie_embeddings:
            # Some exporters write a tied head as well.
            found.discard(FAMILIES[config.family].tensors["head"])
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
        template = FAMILIES[config.family].tensors[name]
        if "layers" not in partition.PARAM_AXES[name]:
            self._fill(out, template, name, bounds, shape)
            return out
        for i, layer in enumerate(range(*bounds[0])):
            self._fill(out[i], template.format(layer), name, bounds[1:], shape[1:])
        return out

    def read_quantized(
        self,
        config: DecoderConfig,
        name: str,
        index: tuple[slice, ...],
        shapes: Quantized,
    ) -> Quantized:
        """The part `index`, counted in blocks, of our matrix `name`, a layer at a time."""
        kind = "nf4" if shapes.codes.dtype == np.uint8 else "int8"
        first, last, _ = index[-1].indices(shapes.scales.shape[-1])
        layers = range(*index[0].indices(shapes.shape[0]))
        parts = []
        for layer in layers:
            inside = (slice(layer, layer + 1), *index[1:-1], slice(first * BLOCK, last * BLOCK))
            matrix = self.read(config, name, inside, shapes.shape, np.dtype(np.float32))
            parts.append(jax.device_get(quantize(matrix, kind)))
        return jax.tree.map(lambda *parts: np.concatenate(parts), *parts)

    def _fill(
        self,
        out: np.ndarray,
        tensor: str,
        name: str,
        bounds: list[tuple[int, int]],
        shape: tuple[int, ...],
    ) -> None:
        source = self.slices[tensor]
        outputs = partition.OUTPUTS.get(name, len(shape))
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
    config: DecoderConfig,
    *,
    mesh: Mesh | None,
    param_dtype: DTypeLike,
    quantized: str = "",
    **options: Any,
) -> tuple[nnx.GraphDef[Decoder], nnx.State]:
    """A decoder without its arrays: its structure, and the shape and sharding of each.

    Args:
      config: Its config.
      mesh: Where the parameters will lie; `None` for the default device.
      param_dtype: Their type.
      quantized: Type of the layers' matrices, one of `quantized.TYPES`; "" for `param_dtype`.
      **options: Passed to `Decoder`.

    Returns:
      What `nnx.split` gives of a decoder, with a `jax.ShapeDtypeStruct` for each array.

    Raises:
      UserError: If a matrix cannot be quantised.
    """

    def create() -> Decoder:
        model = Decoder(config, rngs=nnx.Rngs(0), param_dtype=param_dtype, mesh=mesh, **options)
        if quantized:
            quantize_layers(model, quantized)
        return model

    graph, params = nnx.split(nnx.eval_shape(create))
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
    quantized: str = "",
    **options: Any,
) -> Decoder:
    """A decoder with the folder's weights, each shard read straight to its device.

    Beside the model itself, host memory holds at most one shard of the largest stacked
    parameter, quantised if it will be, and one tensor.

    Args:
      folder: A Hugging Face folder.
      config: What `read_config` returns, possibly with another `vocab_multiple`.
      mesh: Where to put the parameters; `None` for the default device.
      param_dtype: Their type.
      quantized: As in `abstract_decoder`.
      **options: Passed to `Decoder`.

    Raises:
      UserError: If a tensor is missing, surplus or wrongly shaped, or cannot be quantised.
    """
    graph, shapes = abstract_decoder(
        config, mesh=mesh, param_dtype=param_dtype, quantized=quantized, **options
    )
    with contextlib.ExitStack() as stack:
        checkpoint = _Checkpoint(folder, config, stack)
        checkpoint.check(config)

        def read(name: str, index: tuple[slice, ...], leaf: Any) -> Any:
            if isinstance(leaf, Quantized):
                return checkpoint.read_quantized(config, name, index, leaf)
            return checkpoint.read(config, name, index, leaf.shape, leaf.dtype)

        def load(path: tuple[Any, ...], leaf: Any) -> Any:
            name = path[-2].key  # (..., the parameter's name, its value)
            shards: list[Any] = []
            part: tuple[slice, ...] | None = None
            host: Any = None
            # Sorted, so that a part is read once for all devices that hold it.
            whole = leaf.scales if isinstance(leaf, Quantized) else leaf
            parts = whole.sharding.addressable_devices_indices_map(whole.shape)
            for device, index in sorted(parts.items(), key=lambda item: str(item[1])):
                assert index is not None
                if index != part:
                    host = None  # Freed before the next part is read.
                    part, host = index, read(name, index, leaf)
                shards.append(jax.block_until_ready(jax.device_put(host, device)))

            def join(leaf: jax.ShapeDtypeStruct, *shards: jax.Array) -> jax.Array:
                return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, shards)

            return jax.tree.map(join, leaf, *shards)

        params = jax.tree_util.tree_map_with_path(
            load, shapes, is_leaf=lambda leaf: isinstance(leaf, Quantized)
        )
    return nnx.merge(graph, params)
