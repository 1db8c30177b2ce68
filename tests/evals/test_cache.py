"""What a saved evaluation depends on, and when it is found again."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils
from transformers import PreTrainedTokenizerBase

from ranktuner_jax.data import Batch, Example
from ranktuner_jax.evals import (
    TASKS,
    EvalConfig,
    EvalResult,
    cache,
    cached_evaluation,
    evaluate,
    fingerprint,
)
from ranktuner_jax.evals.tasks import Scorer
from ranktuner_jax.models import Decoder

Rows = list[Batch[np.ndarray]]
CONFIG = EvalConfig(rows=5, batch_size=2, examples=4, prompts_per_batch=3, max_new_tokens=3)


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    # Sparse, and large enough to count as weights.
    with (folder / "model.safetensors").open("wb") as file:
        file.truncate(1 << 25)
    return folder


def test_a_cached_evaluation_is_found_again(
    model: Decoder,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    examples: list[Example],
    folder: pathlib.Path,
    tmp_path: pathlib.Path,
) -> None:
    options: dict[str, Any] = {
        "rows": rows,
        "examples": examples,
        "config": dataclasses.replace(CONFIG, task="exact"),
        "model_folder": folder,
        "cache_dir": tmp_path / "cache",
    }
    first, was_cached = cached_evaluation(model, tokenizer, **options)
    assert not was_cached
    [path] = (tmp_path / "cache" / "evaluations").iterdir()

    def progress(done: int, total: int) -> None:
        pytest.fail("evaluated twice")

    found = cached_evaluation(model, tokenizer, **options, progress=progress)
    assert found == (first, True)
    edited = dataclasses.replace(first, nll=first.nll + 1)
    path.write_text(json.dumps(edited.to_json()))
    assert cached_evaluation(model, tokenizer, **options, progress=progress) == (edited, True)

    path.write_text(path.read_text()[:40])
    again, was_cached = cached_evaluation(model, tokenizer, **options)
    assert not was_cached
    assert dataclasses.replace(again, seconds=0) == dataclasses.replace(first, seconds=0)
    assert EvalResult.from_json(json.loads(path.read_text())) == again
    assert list(path.parent.iterdir()) == [path]


def test_the_users_cache_is_the_default(
    model: Decoder,
    rows: Rows,
    folder: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RANKTUNER_CACHE", str(tmp_path / "cache"))
    cached_evaluation(model, rows=rows, config=CONFIG, model_folder=folder)
    assert len(list((tmp_path / "cache" / "evaluations").iterdir())) == 1


@pytest.mark.parametrize("found", [True, False])
def test_the_first_of_several_processes_decides_and_is_the_only_one_to_use_the_cache(
    found: bool,
    model: Decoder,
    rows: Rows,
    folder: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = evaluate(model, rows=rows, config=CONFIG)
    kept = dataclasses.replace(made, nll=made.nll + 1)
    text = json.dumps(kept.to_json()).encode() if found else b""
    sent: Iterator[np.ndarray] = iter(
        [np.array(len(text), np.int32), np.frombuffer(text, np.uint8)]
    )

    def broadcast(mine: np.ndarray) -> np.ndarray:
        value = next(sent)
        assert np.shape(mine) == value.shape  # Else the processes wait for each other forever.
        return value

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", broadcast)
    result, was_cached = cached_evaluation(
        model, rows=rows, config=CONFIG, model_folder=folder, cache_dir=tmp_path / "cache"
    )
    assert was_cached == found
    assert dataclasses.replace(result, seconds=made.seconds) == (kept if found else made)
    assert not (tmp_path / "cache").exists()


def test_a_fingerprint_changes_with_all_that_is_read_and_nothing_else(
    rows: Rows, examples: list[Example], folder: pathlib.Path
) -> None:
    config = dataclasses.replace(CONFIG, task="exact")
    precision = "float32"

    def name() -> str | None:
        return fingerprint(folder, precision=precision, rows=rows, examples=examples, config=config)

    base = name()
    assert base is not None
    assert name() == base
    rows[6].tokens[0] += 1  # Beyond config.rows.
    config = dataclasses.replace(config, every_steps=7)
    assert name() == base

    seen: list[str | None] = [base]
    rows[4].mask[0] ^= True
    seen.append(name())
    examples[3] = dataclasses.replace(examples[3], row={"answer": "other"})
    seen.append(name())
    config = dataclasses.replace(config, max_new_tokens=4)
    seen.append(name())
    precision = "bfloat16"
    seen.append(name())
    (folder / "config.json").write_text("[]")
    seen.append(name())
    os.utime(folder / "model.safetensors", (1, 1))
    seen.append(name())
    assert len(set(seen)) == len(seen)


def load(path: pathlib.Path) -> Any:
    """Runs a Python file as a module of its own, which `import` does not find."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_fingerprint_changes_with_the_code_the_libraries_and_the_device(
    rows: Rows, folder: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def name(package: pathlib.Path) -> str | None:
        """As the `cache.py` in a copy of the package computes it."""
        copy = load(package / "evals" / "cache.py")
        return copy.fingerprint(folder, precision="float32", rows=rows, examples=[], config=CONFIG)

    def copy(to: str) -> pathlib.Path:
        return pathlib.Path(shutil.copytree(cache.PACKAGE, tmp_path / to))

    base = name(cache.PACKAGE)
    assert base == fingerprint(folder, precision="float32", rows=rows, examples=[], config=CONFIG)
    assert name(copy("the same")) == base

    seen: list[str | None] = [base]
    for package in ("losses", "models", "data", "evals"):
        changed = copy(package)
        with sorted((changed / package).glob("*.py"))[-1].open("a") as file:
            file.write("# Other code.")
        seen.append(name(changed))
    monkeypatch.setattr(jax, "devices", lambda: [Device()])
    seen.append(name(cache.PACKAGE))
    for library in ("jax", "jaxlib", "transformers"):
        with monkeypatch.context() as patch:
            patch.setattr(importlib.metadata, "version", versions(library, "9.9.9"))
            seen.append(name(cache.PACKAGE))
            patch.setattr(importlib.metadata, "version", versions(library, None))
            seen.append(name(cache.PACKAGE))
    assert None not in seen
    assert len(set(seen)) == len(seen)


class Device:
    device_kind = "another device"


def versions(library: str, version: str | None) -> Callable[[str], str]:
    """`importlib.metadata.version` where one library has another version, or is not installed."""
    real = importlib.metadata.version

    def lookup(name: str) -> str:
        if name != library:
            return real(name)
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    return lookup


@pytest.fixture
def task() -> Iterator[str]:
    """The name of a task that a test may register."""
    yield "mine"
    TASKS.pop("mine", None)


@pytest.fixture
def name_with_task(
    rows: Rows, examples: list[Example], folder: pathlib.Path, task: str
) -> Callable[[], str | None]:
    """The fingerprint of an evaluation with that task, as it is registered when called."""

    def name() -> str | None:
        config = dataclasses.replace(CONFIG, task=task)
        return fingerprint(folder, precision="float32", rows=rows, examples=examples, config=config)

    return name


REGISTRATION = """
from ranktuner_jax import evals

def accept(completion, record):
    return True

class Reject:
    def __call__(self, completion, record):
        return False

evals.TASKS["mine"] = lambda: """


def test_a_fingerprint_changes_with_the_file_that_registers_a_scorer(
    name_with_task: Callable[[], str | None], tmp_path: pathlib.Path
) -> None:
    path = tmp_path / "my_config.py"
    seen = []
    for scorer in ("accept", "Reject()", "lambda *_: False"):
        path.write_text(REGISTRATION + scorer)
        load(path)
        seen.append(name_with_task())
        assert name_with_task() == seen[-1]
    assert None not in seen
    assert len(set(seen)) == len(seen)


def test_a_fingerprint_changes_with_the_file_that_defines_a_registered_scorer(
    task: str, name_with_task: Callable[[], str | None], tmp_path: pathlib.Path
) -> None:
    path = tmp_path / "my_scorer.py"
    path.write_text(REGISTRATION + "accept")
    score = load(path).accept
    TASKS[task] = lambda: score
    before = name_with_task()
    path.write_text(path.read_text().replace("True", "False"))
    after = name_with_task()
    assert None not in (before, after)
    assert before != after


def typed(expression: str) -> Any:
    """The value of an expression that stands in no file, as if typed into an interpreter."""
    return eval(expression)


@pytest.mark.parametrize(
    "maker",
    [
        typed("lambda: lambda *_: True"),
        lambda: typed("lambda *_: True"),
        functools.partial(lambda: lambda *_: True),
        lambda: functools.partial(lambda *_: True),
    ],
    ids=["maker typed", "scorer typed", "maker without code", "scorer without code"],
)
def test_an_evaluation_by_a_scorer_of_unknown_source_is_not_saved(
    maker: Callable[[], Scorer],
    model: Decoder,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    examples: list[Example],
    folder: pathlib.Path,
    tmp_path: pathlib.Path,
    task: str,
    name_with_task: Callable[[], str | None],
) -> None:
    TASKS[task] = maker
    assert name_with_task() is None
    for _ in range(2):
        result, was_cached = cached_evaluation(
            model,
            tokenizer,
            rows=rows,
            examples=examples,
            config=dataclasses.replace(CONFIG, task=task),
            model_folder=folder,
            cache_dir=tmp_path / "cache",
        )
        assert (result.correct, was_cached) == (4, False)
    assert not (tmp_path / "cache").exists()
