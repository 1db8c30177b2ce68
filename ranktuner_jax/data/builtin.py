"""Data sets that need no download: generated once by reasoning-gym, then cached."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ranktuner_jax.data import storage
from ranktuner_jax.data.generator import import_reasoning_gym
from ranktuner_jax.files import cache_dir

__all__ = ["BUILTIN", "prepare_builtin"]

_Splits = dict[str, list[dict[str, Any]]]


def _generate(name: str, size: int, **options: Any) -> Any:
    reasoning_gym = import_reasoning_gym(f"data.source={name}")
    return reasoning_gym.create_dataset(name, size=size, seed=0, **options)


def _record(row: dict[str, Any], completion: str) -> dict[str, Any]:
    turns = [
        {"role": "user", "content": row["question"]},
        {"role": "assistant", "content": completion},
    ]
    return storage.to_record(
        turns,
        {key: row[key] for key in ("question", "answer", "metadata")} | {"completion": completion},
    )


def _chain_sum() -> _Splits:
    """Sums and differences of 2 or 3 numbers of 1 or 2 digits; no question occurs twice."""
    rows = _generate("chain_sum", 6000, min_terms=2, max_terms=3, min_digits=1, max_digits=2)
    unique = {row["question"]: _record(row, row["answer"]) for row in rows}
    records = list(unique.values())
    return {"train": records[512:], "test": records[:512]}


def _gsm_symbolic() -> _Splits:
    """Word problems with a chain of thought; the test's templates never occur in training.

    The template is `task_indices`; `source_index` in the metadata is only the row's number, and
    a split by it would test on templates seen in training.
    """
    rows = _generate("gsm_symbolic", 5000)
    held_out = set(sorted(set(rows.task_indices))[::5])
    splits: dict[str, dict[str, dict[str, Any]]] = {"train": {}, "test": {}}
    for template, row in zip(rows.task_indices, rows, strict=True):
        row["metadata"]["template"] = template
        split = "test" if template in held_out else "train"
        splits[split].setdefault(row["question"], _record(row, row["metadata"]["answer_cot"]))
    return {split: list(records.values()) for split, records in splits.items()}


BUILTIN: dict[str, Callable[[], _Splits]] = {
    "chain_sum": _chain_sum,
    "gsm_symbolic": _gsm_symbolic,
}


def prepare_builtin(name: str) -> Path:
    """The TFDS folder of a built-in data set, generated at the first call.

    Args:
      name: A key of `BUILTIN`.

    Returns:
      A folder in the user's cache, for `tfds.builder_from_directory`.

    Raises:
      UserError: If reasoning-gym is not installed.

    Example:
      >>> sorted(BUILTIN)
      ['chain_sum', 'gsm_symbolic']
    """
    folder = cache_dir() / "data" / f"{name}-1"
    if not folder.is_dir():
        storage.write_dataset(folder, BUILTIN[name](), name=name)
    return folder
