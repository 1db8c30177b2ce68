"""A tiny model with a byte tokenizer, and conversations with words, numbers and sentences."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest

from ranktuner_jax import data
from ranktuner_jax.diagnostics.noise import Sequences, read_sequences
from tests.train.conftest import cache, tiny_model  # noqa: F401 (fixtures)

ANSWERS = 24


def answer(i: int) -> str:
    names = ["Ada", "Bea", "Cid", "Dan"]
    return (
        f"{names[i % 4]} has {10 + i} coins. She spends {i % 7} of them on ripe red plums. "
        f"So there are {10 + i - i % 7} left, which is more than row {i} needs!"
    )


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("noise") / "rows.jsonl"
    lines = [{"prompt": f"Question {i}?", "completion": answer(i)} for i in range(ANSWERS)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="session")
def tokenizer(tiny_model: pathlib.Path) -> Any:  # noqa: F811
    return data.load_tokenizer(tiny_model)


@pytest.fixture(scope="session")
def sequences(rows: pathlib.Path, tokenizer: Any) -> Sequences:
    return read_sequences(data.DataConfig(str(rows), row_length=256), tokenizer)
