"""What decides the tokens of a split: a cache belongs to these."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from etils import epath

import ranktuner_jax
from ranktuner_jax.data.encode import Split

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "OPTIONS",
    "READ_OPTIONS",
    "digest",
    "identify",
    "library_versions",
    "source_key",
    "tokenizer_digest",
]

# What else decides the tokens: the keys of the config that `Split` and `ChatEncoder` read.
READ_OPTIONS = (
    *("holdout", "prompt_column", "completion_column", "system", "strip_calculator_marks"),
    "on_bad_row",
)
OPTIONS = (*READ_OPTIONS, "enable_thinking", "row_length", "too_long")


def source_key(split: Split, files: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What of a split's source decides its tokens, given what `identify` found of its files."""
    chosen = split.split
    if split.config.holdout:  # Of which split rows are held out.
        chosen = f"{split.split} of {split.config.split}"
    kinds = [[Path(file["path"]).suffix, file["content"]] for file in files]
    return {"source": kinds, "split": chosen}


def identify(files: Sequence[epath.Path], others: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Path, size, time and content of each file.

    The content is a digest of the bytes. It is taken from another cache if the same file, of the
    same size and time, is there already. Of objects in a store it is their size and time.
    """
    known = {
        (file["path"], file["size"], file["time"]): file["content"]
        for other in others
        for file in other["files"]
    }
    found = []
    for path in files:
        name, remote = os.fspath(path), "://" in os.fspath(path)
        if remote:
            stat = path.stat()
            size, changed = stat.length, stat.mtime
        else:
            status = os.stat(name)
            size, changed = status.st_size, status.st_mtime_ns
        content = known.get((name, size, changed))
        if content is None:
            content = f"{name} {size} {changed}" if remote else _file_digest(Path(name))
        found.append({"path": name, "size": size, "time": changed, "content": content})
    return found


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(text: str) -> str:
    """64 hexadecimal digits that stand for a text."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Changes with whatever decides a tokenizer's tokens, but the chat template."""
    special = sorted(tokenizer.all_special_tokens), sorted(tokenizer.special_tokens_map.items())
    return digest(tokenizer.backend_tokenizer.to_str() + repr(special))


def library_versions() -> dict[str, str]:
    """The versions of what makes tokens, ours included."""
    names = ("jinja2", "tokenizers", "transformers")
    versions = {name: importlib.metadata.version(name) for name in names}
    return {**versions, "ranktuner_jax": ranktuner_jax.__version__}
