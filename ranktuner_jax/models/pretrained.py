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
from ranktuner_jax.models import hf, smollm2
from ranktuner_jax.models.decoder import Decoder

if TYPE_CHECKING:
    from jaxtyping import DTypeLike
    from transformers import PretrainedConfig

__all__ = ["load_pretrained", "resolve", "save_pretrained"]

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


def resolve(path_or_name: str | os.PathLike[str], cache_dir: Path | None = None) -> Path:
    """The Hugging Face folder that a name stands for.

    Args:
      path_or_name: A folder; `smollm2-135m`, which is converted into the cache at the
        first call (several processes may do so at the same time); or a hub id `owner/name`.
      cache_dir: Where converted models are kept.

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
        return _download(name)
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


def _download(hub_id: str) -> Path:
    import huggingface_hub

    patterns = ["config.json", "*.safetensors", "*.safetensors.index.json", *_COMPANIONS]
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
      cache_dir: See `resolve`.
      **options: Passed to `Decoder` (`remat`, `attention`).

    Raises:
      UserError: If there is no such model, it is of an architecture or rope type that
        is not supported, or its tensors do not match its config.

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
      max_shard_bytes: Weights beyond this are split into files with an index.

    Raises:
      UserError: If `path` exists or cannot be written.

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
    remote = "://" in os.fspath(path)
    folder = epath.Path(path) if remote else Path(path)
    if folder.exists():
        raise UserError(f"{folder}: exists already; give a new path, nothing is overwritten")
    companions: list[Path] = []
    if tokenizer_from is not None:
        source = resolve(tokenizer_from)
        companions = [source / name for name in _COMPANIONS if (source / name).is_file()]

    def write(scratch: Path) -> None:
        hf.write_weights(model, scratch, max_shard_bytes=max_shard_bytes)
        config = model.config.to_hf()
        config.dtype = str(model.unembed.dtype)
        config.save_pretrained(scratch)
        for file in companions:
            shutil.copyfile(file, scratch / file.name)
        if chat_template:
            (scratch / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
        if stop_ids:
            _add_stop_ids(scratch, config, stop_ids)

    _sync_processes("checked")  # Nothing may be written before all have found the path free.
    if jax.process_index() != 0:
        hf.write_weights(model, Path(), max_shard_bytes=max_shard_bytes)  # Only gathers.
    elif remote:
        with tempfile.TemporaryDirectory() as name:
            write(Path(name))
            _upload(Path(name), folder)
    else:
        with _new_folder(Path(folder)) as scratch:
            write(scratch)
    _sync_processes("written")


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
