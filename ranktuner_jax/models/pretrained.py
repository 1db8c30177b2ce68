"""From a name to a model and back: folders, hub ids and the embedded default."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh

from ranktuner_jax import files
from ranktuner_jax.errors import UserError
from ranktuner_jax.models import hf, partition, smollm2
from ranktuner_jax.models.decoder import Decoder
from ranktuner_jax.models.lora import set_adapters

if TYPE_CHECKING:
    from jaxtyping import DTypeLike
    from transformers import PretrainedConfig

__all__ = ["load_adapter", "load_pretrained", "resolve", "save_adapter", "save_pretrained"]

# Models that come in a Python package rather than from a hub.
_EMBEDDED: dict[str, Callable[[Path], None]] = {"smollm2-135m": smollm2.convert}

# Files of a model's folder beside its weights and its config.
_COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", *_COMPANIONS)


def resolve(
    path_or_name: str | os.PathLike[str], cache_dir: Path | None = None, *, weights: bool = True
) -> Path:
    """The Hugging Face folder that a name stands for.

    Args:
      path_or_name: A folder; `smollm2-135m`, which is converted into the cache at the
        first call (several processes may do so at the same time); or a hub id `owner/name`.
      cache_dir: Where converted models are kept.
      weights: Whether the weights are needed; without them, a hub is asked for the config alone.

    Raises:
      UserError: If there is no such model, or it cannot be fetched.

    Example:
      >>> resolve("smollm3")
      Traceback (most recent call last):
      ranktuner_jax.errors.UserError: model 'smollm3': no such folder; give a Hugging Face ...
    """
    name = str(path_or_name)
    if Path(name).is_dir():
        return Path(name)
    if name in _EMBEDDED:
        folder = (cache_dir or files.cache_dir()) / "models" / name
        if not folder.is_dir():
            with _new_folder(folder) as scratch:
                _EMBEDDED[name](scratch)
        return folder
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return _download(name, ["config.json", *(_WEIGHTS if weights else ())])
    raise UserError(
        f"model {name!r}: no such folder; give a Hugging Face folder, a hub id owner/name, "
        f"or one of: {', '.join(_EMBEDDED)}"
    )


@contextlib.contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """`files.whole_folder`, with a `UserError` where nothing can be written."""
    with contextlib.ExitStack() as stack:
        try:
            scratch = stack.enter_context(files.whole_folder(folder))
        except OSError as error:
            raise UserError(f"{folder}: cannot be written: {error}") from error
        yield scratch


def _upload(folder: Path, target: epath.Path) -> None:
    """Copies files to an object store: config.json, without which there is no model, comes last."""
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(folder.iterdir(), key=lambda file: file.name == "config.json"):
        with file.open("rb") as source, (target / file.name).open("wb") as sink:
            shutil.copyfileobj(source, sink, 16 * 2**20)


def _download(hub_id: str, patterns: list[str]) -> Path:
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=patterns))
    except Exception as error:  # The hub client raises its own, httpx's and OSError.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise UserError(
            f"model {hub_id!r}: no such folder, and the hub did not give it "
            f"({type(error).__name__}: {reason}); give a local folder"
        ) from error


def load_pretrained(
    path_or_name: str | os.PathLike[str],
    mesh: Mesh | None = None,
    dtype: DTypeLike | None = None,
    *,
    param_dtype: DTypeLike = jnp.float32,
    quantized: str = "",
    cache_dir: Path | None = None,
    **options: Any,
) -> Decoder:
    """A decoder with pretrained weights, sharded over `mesh` as it is read.

    Args:
      path_or_name: See `resolve`.
      mesh: A mesh with axes among `data`, `fsdp` and `tensor`; the embedding's rows
        are padded to divide over `tensor`.
      dtype: Type of the arithmetic; float32 if left out.
      param_dtype: Type of the parameters.
      quantized: "nf4" or "int8" for layers' matrices of 4 or 8 bits, which are frozen: each is
        quantised when it is read. Embeddings, head, norms and biases have `param_dtype`.
      cache_dir: See `resolve`.
      **options: Passed to `Decoder` (`remat`, `attention`).

    Raises:
      UserError: If there is no such model, it is of an architecture or rope type that
        is not supported, its tensors do not match its config, or they cannot be quantised.

    Example: see `save_pretrained`.
    """
    folder = resolve(path_or_name, cache_dir)
    config = hf.read_config(folder)
    if mesh is not None and mesh.shape.get("tensor", 1) > 1:
        config = dataclasses.replace(config, vocab_multiple=mesh.shape["tensor"])
    return hf.read_decoder(
        folder,
        config,
        mesh=mesh,
        param_dtype=param_dtype,
        quantized=quantized,
        dtype=jnp.float32 if dtype is None else dtype,
        **options,
    )


def save_pretrained(
    model: Decoder,
    path: str | os.PathLike[str],
    tokenizer_from: str | os.PathLike[str] | None = None,
    *,
    chat_template: str = "",
    stop_ids: Sequence[int] = (),
    card: str = "",
    max_shard_bytes: int = 2 * 1024**3,
) -> None:
    """Writes a folder that `transformers` and vLLM load.

    The folder appears whole or not at all. With several processes, all must call.

    Args:
      model: The decoder.
      path: A folder that does not exist yet, or `gs://bucket/folder`.
      tokenizer_from: A folder (or name) whose tokenizer, chat template and generation
        config go with the weights.
      chat_template: Text of a chat template that replaces that folder's; empty to keep it.
      stop_ids: Tokens at which generation ends, beside those that the generation config names.
      card: Text of README.md, the model card; empty for none.
      max_shard_bytes: Weights beyond this are split into files with an index.

    Raises:
      UserError: If `path` exists or cannot be written.
      ValueError: If the model has adapters.

    Example:
      >>> from flax import nnx
      >>> from ranktuner_jax import models
      >>> config = models.DecoderConfig(vocab_size=11, hidden_size=8, intermediate_size=16,
      ...                               num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_pretrained(Decoder(config, rngs=nnx.Rngs(0)), f"{folder}/model")
      ...     load_pretrained(f"{folder}/model").config == config
      True
    """
    if model.layers.lora is not None:
        raise ValueError("model must have no adapters: use save_adapter, or merge_adapters first.")
    companions = _companions(tokenizer_from)

    def write(scratch: Path) -> None:
        hf.write_weights(model, scratch, max_shard_bytes=max_shard_bytes)
        if jax.process_index() != 0:
            return
        config = model.config.to_hf()
        config.dtype = str(model.unembed.dtype)
        config.save_pretrained(scratch)
        _copy(companions, scratch, chat_template, card)
        if stop_ids:
            _add_stop_ids(scratch, config, stop_ids)

    _write_folder(path, write)


def load_adapter(
    model: Decoder, path: str | os.PathLike[str], *, dtype: DTypeLike = jnp.float32
) -> None:
    """Freezes a decoder in place and adds the adapters of PEFT's folder.

    Args:
      model: The decoder.
      path: The folder.
      dtype: Type of the adapters.

    Raises:
      UserError: If there is no adapter, it is of a kind that is not supported, or it does not fit.
      ValueError: If the model has adapters already.

    Example: see `save_adapter`.
    """
    lora, factors = hf.read_adapter(Path(path), model)
    factors = {name: factor.astype(dtype) for name, factor in factors.items()}
    if model.mesh is None:
        set_adapters(model, lora, {name: jnp.asarray(factor) for name, factor in factors.items()})
        return
    shardings = partition.param_shardings(factors, model.mesh)
    placed = {
        name: jax.make_array_from_callback(factor.shape, shardings[name], factor.__getitem__)
        for name, factor in factors.items()
    }
    set_adapters(model, lora, placed)


def save_adapter(
    model: Decoder,
    path: str | os.PathLike[str],
    base: str = "",
    tokenizer_from: str | os.PathLike[str] | None = None,
    *,
    chat_template: str = "",
    card: str = "",
) -> None:
    """Writes the adapters of a decoder as a folder that `peft` and vLLM load.

    The folder appears whole or not at all. With several processes, all must call.

    Args:
      model: A decoder with adapters.
      path: A folder that does not exist yet, or `gs://bucket/folder`.
      base: The name or folder of the frozen model, as `peft` is to find it.
      tokenizer_from: As in `save_pretrained`.
      chat_template: As in `save_pretrained`.
      card: As in `save_pretrained`.

    Raises:
      UserError: If `path` exists or cannot be written.
      ValueError: If the model has no adapters.

    Example:
      >>> from flax import nnx
      >>> from ranktuner_jax import models
      >>> config = models.DecoderConfig(vocab_size=11, hidden_size=8, intermediate_size=16,
      ...                               num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4)
      >>> model = Decoder(config, rngs=nnx.Rngs(0))
      >>> models.add_adapters(model, models.Lora(rank=2, alpha=4.0), rngs=nnx.Rngs(1))
      >>> other = Decoder(config, rngs=nnx.Rngs(0))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_adapter(model, f"{folder}/adapter")
      ...     load_adapter(other, f"{folder}/adapter")
      >>> other.layers.lora == model.layers.lora
      True
      >>> models.merge_adapters(other)
      >>> other.layers.lora is None
      True
    """
    if model.layers.lora is None:
        raise ValueError("model must have adapters: got none.")
    companions = _companions(tokenizer_from)

    def write(scratch: Path) -> None:
        hf.write_adapter(model, scratch, base)
        if jax.process_index() == 0:
            _copy(companions, scratch, chat_template, card)

    _write_folder(path, write)


def _write_folder(path: str | os.PathLike[str], write: Callable[[Path], None]) -> None:
    """Writes a folder, whole or not at all.

    Args:
      path: The folder.
      write: Writes into the folder that it is given; processes other than the first call it too,
        to gather arrays, with a folder that it must not touch.
    """
    remote = "://" in os.fspath(path)
    folder = epath.Path(path) if remote else Path(path)
    if folder.exists():
        raise UserError(f"{folder}: exists already; give a new path, nothing is overwritten")
    _sync_processes("checked")  # Nothing may be written before all have found the path free.
    if jax.process_index() != 0:
        write(Path())
    elif remote:
        with tempfile.TemporaryDirectory() as name:
            write(Path(name))
            _upload(Path(name), folder)
    else:
        with _new_folder(Path(folder)) as scratch:
            write(scratch)
    _sync_processes("written")


def _companions(source: str | os.PathLike[str] | None) -> list[Path]:
    """The files of a model's folder beside its weights and its config; none without a folder."""
    if source is None:
        return []
    folder = resolve(source)
    return [folder / name for name in _COMPANIONS if (folder / name).is_file()]


def _copy(files: Sequence[Path], folder: Path, chat_template: str, card: str) -> None:
    """Copies them, replaces the chat template if one is given, and writes the model card."""
    for file in files:
        shutil.copyfile(file, folder / file.name)
    if chat_template:
        (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
    if card:
        (folder / "README.md").write_text(card, encoding="utf-8")


def _add_stop_ids(folder: Path, config: PretrainedConfig, stop_ids: Sequence[int]) -> None:
    from transformers import GenerationConfig

    file = folder / "generation_config.json"
    if not file.is_file():
        GenerationConfig.from_model_config(config).save_pretrained(folder)
    # As text: transformers refuses to write some generation configs that models ship with.
    settings = json.loads(file.read_text(encoding="utf-8"))
    known = settings.get("eos_token_id")
    known = known if isinstance(known, list) else [] if known is None else [known]
    settings["eos_token_id"] = sorted({*known, *stop_ids})
    file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _sync_processes(name: str) -> None:
    """Waits until every process has come to the point of this name."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(f"save_pretrained: {name}")
