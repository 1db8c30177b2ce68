"""Evaluations kept on disk, so that a second run does not repeat the first one's."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np
from jax.experimental import multihost_utils

from ranktuner_jax.data import Example
from ranktuner_jax.evals.run import ROW_KEYS, EvalConfig, EvalResult, Progress, RowSource, evaluate
from ranktuner_jax.models import Decoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["cached_evaluation", "fingerprint"]

PACKAGE = pathlib.Path(__file__).parents[1]
# The code that decides the numbers: our packages, and the libraries that they call.
PACKAGES = ("losses", "models", "data", "evals")
LIBRARIES = ("jax", "jaxlib", "transformers", "reasoning-gym")


def cached_evaluation(
    model: Decoder,
    tokenizer: PreTrainedTokenizerBase,
    *,
    rows: RowSource,
    examples: Sequence[Example],
    config: EvalConfig,
    model_folder: os.PathLike[str] | str,
    cache_dir: os.PathLike[str] | str,
    progress: Progress | None = None,
) -> tuple[EvalResult, bool]:
    """`evaluate`, or what it found before for the same model, data and settings.

    The model must be the one in `model_folder`, untouched: the folder's files stand for its
    parameters (see `fingerprint`). With several processes, all must call; the cache is that of
    process 0.

    Returns:
      The result, and whether it came from the cache.
    """
    path = pathlib.Path(cache_dir) / "evaluations"
    first = jax.process_index() == 0
    text = ""
    if first:
        precision = f"{model.dtype} over {model.unembed.dtype}"
        key = fingerprint(
            model_folder, precision=precision, rows=rows, examples=examples, config=config
        )
        path /= f"{key}.json"
        text = _read(path)
    # One process decides for all, for they compute together or not at all.
    if text := _from_first_process(text):
        return EvalResult.from_json(json.loads(text)), True
    result = evaluate(
        model, tokenizer, rows=rows, examples=examples, config=config, progress=progress
    )
    if first:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(result.to_json(), indent=1))
        partial.replace(path)
    return result, False


def _read(path: pathlib.Path) -> str:
    """A saved result, or "" where there is none that is whole."""
    try:
        text = path.read_text()
        EvalResult.from_json(json.loads(text))
    except (OSError, ValueError, KeyError, TypeError):
        return ""  # Absent, or torn by a crash: evaluated again.
    return text


def _from_first_process(text: str) -> str:
    """The text of process 0, in every process."""
    if jax.process_count() == 1:
        return text
    encoded = np.frombuffer(text.encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(encoded.size)))
    if jax.process_index() != 0:
        encoded = np.zeros(size, np.uint8)
    return bytes(multihost_utils.broadcast_one_to_all(encoded)).decode()


def fingerprint(
    model_folder: os.PathLike[str] | str,
    *,
    precision: str,
    rows: RowSource,
    examples: Sequence[Example],
    config: EvalConfig,
) -> str:
    """A name for an evaluation, which changes with whatever may change the result beyond rounding.

    It covers our code, the versions of the libraries, the kind of device, the settings, the
    precision of the arithmetic, every token that is looked at, and the folder's files: small ones
    by content, large ones (weights) by name, size and time of writing.
    """
    settings = dataclasses.asdict(config)
    del settings["every_steps"]  # When, not what.
    digest = hashlib.sha256()
    machine = [_code(PACKAGE), _versions(), jax.devices()[0].device_kind]
    what = [*machine, precision, settings]
    digest.update(json.dumps(what, sort_keys=True).encode())
    for path in sorted(pathlib.Path(model_folder).iterdir()):
        if path.is_file():
            stat = path.stat()
            digest.update(f"{path.name} {stat.st_size} ".encode())
            small = stat.st_size < 1 << 24
            digest.update(path.read_bytes() if small else str(stat.st_mtime_ns).encode())
    for i in range(min(len(rows), config.rows)):
        for key in ROW_KEYS:
            digest.update(np.ascontiguousarray(rows[i][key]).tobytes())
    if config.task:
        for example in examples[: config.examples]:
            record = [
                list(map(int, example.prompt_tokens)),
                list(map(int, example.completion_tokens)),
                {key: str(value) for key, value in example.row.items()},
            ]
            digest.update(json.dumps(record, sort_keys=True).encode())
    return digest.hexdigest()[:32]


@functools.cache
def _code(package: pathlib.Path) -> str:
    """A digest of the sources in `PACKAGES`, by name and content."""
    digest = hashlib.sha256()
    for path in sorted(path for room in PACKAGES for path in (package / room).rglob("*.py")):
        source = path.read_bytes()
        digest.update(f"{path.relative_to(package).as_posix()} {len(source)} ".encode())
        digest.update(source)
    return digest.hexdigest()


def _versions() -> dict[str, str]:
    """The version of each of `LIBRARIES` that is installed."""
    versions = {}
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions
