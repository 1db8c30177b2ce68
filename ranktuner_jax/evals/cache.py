"""Evaluations kept on disk, so that a second run does not repeat the first one's."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import inspect
import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from ranktuner_jax import files
from ranktuner_jax.data import Example
from ranktuner_jax.evals.config import EvalConfig
from ranktuner_jax.evals.evaluation import Progress, RowSource, evaluate
from ranktuner_jax.evals.processes import from_first_process
from ranktuner_jax.evals.result import EvalResult
from ranktuner_jax.evals.tasks import TASKS, make_scorer
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
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    rows: RowSource,
    examples: Sequence[Example] = (),
    config: EvalConfig = EvalConfig(),  # noqa: B008 (it is frozen)
    model_folder: os.PathLike[str] | str,
    cache_dir: os.PathLike[str] | str | None = None,
    progress: Progress | None = None,
) -> tuple[EvalResult, bool]:
    """`evaluate`, or its earlier result for the same model, data, settings and code.

    The model must be the one in `model_folder`, untouched: the folder's files stand for its
    parameters (see `fingerprint`). With several processes, all must call; the cache is that of
    process 0, by default in `files.cache_dir()`. Only process 0 reads or writes it.

    Returns:
      The result, and whether it came from the cache.
    """
    path, text = None, ""
    if jax.process_index() == 0:
        precision = f"{model.dtype} over {model.unembed.dtype}"
        key = fingerprint(
            model_folder, precision=precision, rows=rows, examples=examples, config=config
        )
        if key is not None:
            folder = files.cache_dir() if cache_dir is None else cache_dir
            path = pathlib.Path(folder, "evaluations", f"{key}.json")
            text = _read(path)
    # One process decides for all, for they compute together or not at all.
    if text := from_first_process(text):
        return EvalResult.from_json(json.loads(text)), True
    result = evaluate(
        model, tokenizer, rows=rows, examples=examples, config=config, progress=progress
    )
    if path is not None:
        files.write_whole(path, json.dumps(result.to_json(), indent=1))
    return result, False


def _read(path: pathlib.Path) -> str:
    """A saved result; "" if there is none, or it is damaged."""
    try:
        text = path.read_text()
        EvalResult.from_json(json.loads(text))
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return text


def fingerprint(
    model_folder: os.PathLike[str] | str,
    *,
    precision: str,
    rows: RowSource,
    examples: Sequence[Example],
    config: EvalConfig,
) -> str | None:
    """A name for an evaluation, which changes with whatever may change the result beyond rounding.

    It covers our code, the versions of the libraries, the kind of device, the settings, the
    precision of the arithmetic, every token that is read, and the folder's files: small ones
    by content, large ones (weights) by name, size and time of writing. Of a task that a user
    registered it covers the files that define its entry in `TASKS` and its scorer, but not what
    these import.

    Returns:
      32 hexadecimal digits; None if such a file cannot be read, as for a scorer typed into an
      interpreter.
    """
    settings = dataclasses.asdict(config)
    del settings["every_steps"]  # It decides when to evaluate, not what.
    task_files = _task_files(config.task) if config.task else []
    if task_files is None:
        return None
    digest = hashlib.sha256()
    machine = [_code(PACKAGE), _versions(LIBRARIES), jax.devices()[0].device_kind]
    what = [*machine, task_files, precision, settings]
    digest.update(json.dumps(what, sort_keys=True).encode())
    for path in sorted(pathlib.Path(model_folder).iterdir()):
        if path.is_file():
            stat = path.stat()
            digest.update(f"{path.name} {stat.st_size} ".encode())
            small = stat.st_size < 1 << 24
            digest.update(path.read_bytes() if small else str(stat.st_mtime_ns).encode())
    for i in range(min(len(rows), config.rows)):
        row = rows[i]
        for array in (row.tokens, row.labels, row.mask, row.positions, row.segment_ids):
            digest.update(np.ascontiguousarray(array).tobytes())
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
    for path in sorted(path for name in PACKAGES for path in (package / name).rglob("*.py")):
        source = path.read_bytes()
        digest.update(f"{path.relative_to(package).as_posix()} {len(source)} ".encode())
        digest.update(source)
    return digest.hexdigest()


def _versions(libraries: Sequence[str]) -> dict[str, str]:
    """The version of each library that is installed."""
    versions = {}
    for name in libraries:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def _task_files(task: str) -> list[str] | None:
    """Digests of the files of a user's task; none for a task of ours, which `_code` covers.

    None if a file cannot be read, or the task or its scorer is not a Python function.
    """
    try:
        paths = [_source_file(TASKS[task])]
        if paths[0].is_relative_to(PACKAGE):
            return []
        paths.append(_source_file(make_scorer(task)))
        return [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    except (AttributeError, OSError):
        return None


def _source_file(function: Callable[..., Any]) -> pathlib.Path:
    """The file that defines a function, or the `__call__` of an object."""
    function = inspect.unwrap(function)
    code = getattr(function, "__code__", None) or type(function).__call__.__code__
    return pathlib.Path(code.co_filename)
