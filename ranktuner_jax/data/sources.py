"""Sources of rows: files, TFDS data sets, the hub and the built-in data sets."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import itertools
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from ranktuner_jax.data.builtin import BUILTIN, prepare_builtin
from ranktuner_jax.errors import UserError
from ranktuner_jax.files import cache_dir, whole_folder

__all__ = ["Record", "read_source"]

# The copies of remote folders that this process reads, each with the descriptor that holds its
# lock. Readers open files lazily, so the lock is held until the process ends.
_HELD: dict[Path, int] = {}


@dataclass(frozen=True, slots=True)
class Record:
    """One row of a source, or the reason why it could not be read.

    Attributes:
      where: File and line, or data set and row number, for messages to the user.
      fields: The row; empty if it is broken.
      error: Why the row is broken; empty if it is not.
    """

    where: str
    fields: dict[str, Any]
    error: str = ""


def read_source(
    source: str, split: str = "train", *, subset: str = "", data_dir: str = ""
) -> Iterator[Record]:
    r"""Yields the rows of a split, in the order of the source.

    Args:
      source: One of: a built-in name (`chain_sum`, `gsm_symbolic`); the path of
        a `.jsonl` or `.parquet` file, which may hold `*` and `{split}`; a
        folder that TFDS or `ranktuner data prepare` wrote; `hub:owner/name`; a
        TFDS name such as `gsm8k` or `name/config:1.0.0`. Paths may be those of
        an object store (`gs://`); a folder is copied into the user's cache,
        and copied again when the name, size or time of a file has changed.
      split: In the notation of TFDS: `train`, `test`, `train[:10000]`,
        `train[90%:]`, `train+test`. A file whose path lacks `{split}` has only
        the split `train`.
      subset: The configuration of a hub data set.
      data_dir: Where TFDS keeps its data sets; its own default when empty.

    Yields:
      Records; a broken row is a record with an `error`, so that reading continues.

    Raises:
      UserError: If the source or the split does not exist.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as tmp:
      ...     path = Path(tmp, "sums.jsonl")
      ...     _ = path.write_text('{"prompt": "2 + 2", "completion": "4"}\n')
      ...     [record.fields["completion"] for record in read_source(str(path))]
      ['4']
    """
    if not source:
        raise UserError(
            "data.source: expected a name or a path, got nothing; name your rows, such as "
            "--config.data.source=rows.jsonl"
        )
    if source.startswith("hub:"):
        return _read_hub(source.removeprefix("hub:"), split, subset)
    if source.endswith((".jsonl", ".parquet")):
        return _read_files(source, split)
    if source in BUILTIN:
        return _read_tfds(source, tfds.builder_from_directory(prepare_builtin(source)), split)
    return _read_tfds(source, _tfds_builder(source, data_dir), split)


def _instructions(source: str, split: str, lengths: dict[str, int]) -> list[tuple[str, int, int]]:
    """The rows that a TFDS split string selects, as (split name, start, stop)."""
    infos = {
        name: tfds.core.SplitInfo(name=name, shard_lengths=[length], num_bytes=0)
        for name, length in lengths.items()
    }
    try:
        parts = tfds.core.ReadInstruction.from_spec(split).to_absolute(infos)
    except (ValueError, KeyError, AssertionError, NotImplementedError) as error:
        raise UserError(
            f"split: expected one of {sorted(lengths)} of {source}, or a slice such as "
            f"'train[:1000]', got {split!r}"
        ) from error
    return [
        (part.splitname, part.from_ or 0, lengths[part.splitname] if part.to is None else part.to)
        for part in parts
    ]


# --- files ---


def _read_files(pattern: str, split: str) -> Iterator[Record]:
    names = {name.split("[")[0].strip() for name in split.split("+")}
    if "{split}" not in pattern:
        if names != {"train"}:
            raise UserError(
                f"split: {pattern} is one file and has the one split 'train', got {split!r}; "
                "take a slice such as 'train[-500:]', or write {split} into the path"
            )
        files = {"train": _glob(pattern)}
    else:
        files = {name: _glob(pattern.replace("{split}", name)) for name in sorted(names)}
    lengths = {name: sum(map(_count_rows, paths)) for name, paths in files.items()}
    parts = _instructions(pattern, split, lengths)
    return itertools.chain.from_iterable(
        itertools.islice(itertools.chain.from_iterable(map(_read_file, files[name])), start, stop)
        for name, start, stop in parts
    )


def _glob(pattern: str) -> list[epath.Path]:
    path = epath.Path(pattern)
    # The path of an existing file is not a pattern, even if it contains brackets.
    if path.is_file():
        return [path]
    if "://" in pattern:
        # A pattern is relative to its bucket.
        root = epath.Path("/".join(pattern.split("/")[:3]))
        paths = sorted(root.glob(pattern.split("/", 3)[-1]), key=os.fspath)
    else:
        paths = [epath.Path(name) for name in sorted(glob.glob(os.fspath(path.expanduser())))]
    if not paths:
        raise UserError(f"data.source: expected a file, got {pattern}, which does not exist")
    return paths


def _count_rows(path: epath.Path) -> int:
    if path.suffix == ".parquet":
        return int(_parquet(path).metadata.num_rows)
    with path.open("rb") as file:
        return sum(1 for line in file if not line.isspace())


def _read_file(path: epath.Path) -> Iterator[Record]:
    return _read_parquet(path) if path.suffix == ".parquet" else _read_jsonl(path)


def _read_jsonl(path: epath.Path) -> Iterator[Record]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.isspace():
                continue
            where = f"{path}:{number}"
            try:
                fields = json.loads(line)
            except (ValueError, RecursionError) as error:  # ValueError includes invalid UTF-8.
                yield Record(where, {}, f"broken JSON: {error}")
                continue
            if isinstance(fields, dict):
                yield Record(where, fields)
            else:
                yield Record(where, {}, f"expected a JSON object, got {type(fields).__name__}")


def _parquet(path: epath.Path) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        remote = "://" in os.fspath(path)
        return pyarrow.parquet.ParquetFile(path.open("rb") if remote else os.fspath(path))
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(f"data.source: {path} is not a Parquet file: {error}") from error


def _read_parquet(path: epath.Path) -> Iterator[Record]:
    number = 0
    for group in _parquet(path).iter_batches(batch_size=1024):
        for fields in group.to_pylist():
            number += 1
            yield Record(f"{path}:{number}", fields)


# --- TFDS ---


def _tfds_builder(source: str, data_dir: str) -> Any:
    folder = _fetched(source) if "://" in source else Path(source).expanduser()
    try:
        if folder.is_dir():
            # The folder itself, or name/1.0.0 below it as TFDS lays them out.
            found = sorted(folder.glob("**/dataset_info.json"))
            if len(found) != 1:
                raise UserError(
                    f"data.source: expected a TFDS folder (one dataset_info.json), got {source}, "
                    f"which holds {len(found)}; name the folder of one version"
                )
            return tfds.builder_from_directory(found[0].parent)
        return tfds.builder(source, data_dir=data_dir or None)
    except (tfds.core.DatasetNotFoundError, ValueError, ImportError) as error:
        raise UserError(
            f"data.source: expected {', '.join(sorted(BUILTIN))}, a .jsonl or .parquet file, "
            f"hub:owner/name, or a TFDS name or folder, got {source!r}; check the spelling"
        ) from error


def _fetched(source: str) -> Path:
    """An up-to-date local copy of a remote folder: array_record reads local files only."""
    origin = epath.Path(source)
    if not (origin / "dataset_info.json").exists():
        raise UserError(
            f"data.source: expected the TFDS folder of one version, got {source}, which holds "
            "no dataset_info.json"
        )
    files = _listing(origin)
    prefix, state = (hashlib.sha256(text.encode()).hexdigest()[:16] for text in (source, files))
    target = cache_dir() / "fetched" / f"{prefix}-{state}"
    while not _hold(target):
        _copy(origin, files, target)
    for other in target.parent.glob(f"{prefix}-*"):
        if other != target:
            _remove_unless_held(other)
    return target


def _listing(origin: epath.Path) -> str:
    """Name, size and time of each file, as JSON. TFDS writes no subfolders."""
    stats = {path.name: path.stat() for path in origin.iterdir()}
    files = [(n, s.length, s.mtime) for n, s in sorted(stats.items()) if not s.is_directory]
    return json.dumps(files)


def _copy(origin: epath.Path, files: str, target: Path) -> None:
    """Copies the files of a listing; if several processes do so, the first to finish wins."""
    with whole_folder(target) as scratch:
        for name, _, _ in json.loads(files):
            (scratch / name).write_bytes((origin / name).read_bytes())
        if _listing(origin) != files:
            raise UserError(
                f"data.source: {origin} changed while it was copied; run again when nothing "
                "writes to it"
            )


def _hold(copy: Path) -> bool:
    """Locks a copy until this process ends; False if there is none."""
    if copy in _HELD and copy.is_dir():
        return True
    try:
        directory = os.open(copy, os.O_RDONLY)
    except FileNotFoundError:
        return False
    # On a file system without locks `_remove_unless_held` removes nothing.
    with contextlib.suppress(OSError):
        fcntl.flock(directory, fcntl.LOCK_SH)
    # Another process may have removed the copy before this one got the lock.
    with contextlib.suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(directory), copy.stat()):
            _HELD[copy] = directory
            return True
    os.close(directory)
    return False


def _remove_unless_held(copy: Path) -> None:
    """Removes an outdated copy unless a process reads it; a later call removes it then."""
    try:
        directory = os.open(copy, os.O_RDONLY)
    except FileNotFoundError:
        return  # Another process was faster.
    with contextlib.suppress(OSError):
        fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with tempfile.TemporaryDirectory(dir=copy.parent) as scratch:
            copy.rename(Path(scratch, "outdated"))  # No process finds half a copy.
    os.close(directory)


def _read_tfds(source: str, builder: Any, split: str) -> Iterator[Record]:
    lengths = {name: info.num_examples for name, info in builder.info.splits.items()}
    parts = _instructions(source, split, lengths)
    try:
        views = {name: builder.as_data_source(name) for name, _, _ in parts}
    except (NotImplementedError, ImportError, ValueError) as error:
        raise UserError(
            f"data.source: {source} has no random access ({error}); rewrite it once with "
            "`ranktuner data prepare`, or prepare it with file_format='array_record'"
        ) from error
    return (
        Record(f"{source}[{name}]:{number + 1}", _unpack(row))
        for name, start, stop in parts
        for number, row in zip(range(start, stop), _slices(views[name], start, stop), strict=True)
    )


def _slices(view: Any, start: int, stop: int, size: int = 1024) -> Iterator[Any]:
    for first in range(start, stop, size):
        yield from view.__getitems__(list(range(first, min(first + size, stop))))


def _unpack(row: dict[str, Any]) -> dict[str, Any]:
    """A TFDS row with text as str and sequences of features as lists of dicts."""
    fields = _plain(row)
    if set(fields) == {"messages", "weight", "row"}:  # Written by `write_dataset`.
        return {
            **json.loads(fields["row"]),
            "messages": [
                {**json.loads(turn.pop("more", "{}")), **turn} for turn in fields["messages"]
            ],
            "weight": fields["weight"],
        }
    return fields


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")  # `to_conversation` reports surrogates.
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, dict):
        fields = {key: _plain(item) for key, item in value.items()}
        turns = fields.get("messages")
        if isinstance(turns, dict):  # TFDS gives a list of dicts as a dict of lists.
            fields["messages"] = [
                dict(zip(turns, turn, strict=True)) for turn in zip(*turns.values(), strict=True)
            ]
        return fields
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


# --- the hub ---


def _read_hub(name: str, split: str, subset: str) -> Iterator[Record]:
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"data.source=hub:{name}: expected the package datasets, got {error}; "
            "run pip install 'ranktuner-jax[hub]'"
        ) from error
    try:
        rows: Iterable[dict[str, Any]] = datasets.load_dataset(name, subset or None, split=split)
    except Exception as error:  # Anything that its network stack raises.
        raise UserError(
            f"data.source=hub:{name}: could not load split {split!r}: {_first_line(error)}"
        ) from error
    return (Record(f"hub:{name}[{split}]:{i}", dict(row)) for i, row in enumerate(rows, 1))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
