"""Sources of rows: files, TFDS data sets, the hub and the built-in data sets."""

from __future__ import annotations

import functools
import glob
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from etils import epath

from ranktuner_jax.data.builtin import BUILTIN, prepare_builtin
from ranktuner_jax.data.fetched import fetched
from ranktuner_jax.errors import UserError

__all__ = ["Record", "Source", "open_source", "read_source"]


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


class View(Protocol):
    """Rows by their number."""

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> Iterator[Record]:
        """The rows from `start` to `stop`."""


class Source:
    """A split of a source, read from any row on.

    Attributes:
      name: As in `read_source`.
      files: The files whose bytes are its content.
    """

    def __init__(
        self, name: str, split: str, views: Mapping[str, View], files: Sequence[epath.Path]
    ) -> None:
        self.name, self.files = name, tuple(files)
        self._split, self._views = split, views

    @functools.cached_property
    def _parts(self) -> list[tuple[View, int, int]]:
        lengths = {name: len(view) for name, view in self._views.items()}
        parts = _instructions(self.name, self._split, lengths)
        return [(self._views[name], start, stop) for name, start, stop in parts]

    def __len__(self) -> int:
        return sum(stop - start for _, start, stop in self._parts)

    def read(self, start: int = 0, stop: int | None = None) -> Iterator[Record]:
        """The rows from `start` to `stop`, by default all.

        Raises:
          UserError: If there is no such split.
        """
        first, chosen = 0, []
        stop = len(self) if stop is None else stop
        for view, begin, end in self._parts:
            last = first + end - begin
            if max(start, first) < min(stop, last):
                low, high = max(start, first) - first, min(stop, last) - first
                chosen.append(view.read(begin + low, begin + high))
            first = last
        return itertools.chain.from_iterable(chosen)


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
    return open_source(source, split, subset=subset, data_dir=data_dir).read()


def open_source(
    source: str, split: str = "train", *, subset: str = "", data_dir: str = ""
) -> Source:
    """Finds a source, without reading rows of it; everything is as in `read_source`."""
    if not source:
        raise UserError(
            "data.source: expected a name or a path, got nothing; name your rows, such as "
            "--config.data.source=rows.jsonl"
        )
    if source.startswith("hub:"):
        return _open_hub(source.removeprefix("hub:"), split, subset)
    if source.endswith((".jsonl", ".parquet")):
        return _open_files(source, split)
    folder = str(prepare_builtin(source)) if source in BUILTIN else source
    return _open_tfds(source, _tfds_builder(folder, data_dir), split)


def _instructions(source: str, split: str, lengths: dict[str, int]) -> list[tuple[str, int, int]]:
    """The rows that a TFDS split string selects, as (split name, start, stop)."""
    if split in lengths:
        return [(split, 0, lengths[split])]
    import tensorflow_datasets as tfds

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


def _open_files(pattern: str, split: str) -> Source:
    names = {name.split("[")[0].strip() for name in split.split("+")}
    if "{split}" not in pattern:
        if names != {"train"}:
            raise UserError(
                f"split: {pattern} is one file and has the one split 'train', got {split!r}; "
                "take a slice such as 'train[-500:]', or write {split} into the path"
            )
        paths = {"train": _glob(pattern)}
    else:
        paths = {name: _glob(pattern.replace("{split}", name)) for name in sorted(names)}
    views = {name: _Joined([_view(path) for path in files]) for name, files in paths.items()}
    return Source(pattern, split, views, list(itertools.chain.from_iterable(paths.values())))


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


def _view(path: epath.Path) -> View:
    return _Parquet(path) if path.suffix == ".parquet" else _Lines(path)


class _Joined:
    """The rows of several views, one after the other."""

    def __init__(self, views: Sequence[View]) -> None:
        self._views = views

    def __len__(self) -> int:
        return sum(map(len, self._views))

    def read(self, start: int, stop: int) -> Iterator[Record]:
        first = 0
        for view in self._views:
            last = first + len(view)
            if max(start, first) < min(stop, last):
                yield from view.read(max(start, first) - first, min(stop, last) - first)
            first = last


class _Lines:
    """The lines of a JSONL file that are not blank."""

    # Where a row begins is kept of each so many.
    _STRIDE = 1024

    def __init__(self, path: epath.Path) -> None:
        self._path = path

    def __len__(self) -> int:
        return self._scanned[0]

    @functools.cached_property
    def _scanned(self) -> tuple[int, list[tuple[int, int]]]:
        """The number of rows, and byte and line of every 1024th."""
        rows, at, marks = 0, 0, []
        with self._path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.isspace():
                    if rows % self._STRIDE == 0:
                        marks.append((at, number))
                    rows += 1
                at += len(line)
        return rows, marks

    def read(self, start: int, stop: int) -> Iterator[Record]:
        at, first = self._scanned[1][start // self._STRIDE]
        with self._path.open("rb") as file:
            file.seek(at)
            lines = ((n, line) for n, line in enumerate(file, first) if not line.isspace())
            skipped = start % self._STRIDE
            for number, line in itertools.islice(lines, skipped, skipped + stop - start):
                yield _from_line(f"{self._path}:{number}", line)


def _from_line(where: str, line: bytes) -> Record:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:  # ValueError includes invalid UTF-8.
        return Record(where, {}, f"broken JSON: {error}")
    if isinstance(fields, dict):
        return Record(where, fields)
    return Record(where, {}, f"expected a JSON object, got {type(fields).__name__}")


class _Parquet:
    """The rows of a Parquet file."""

    def __init__(self, path: epath.Path) -> None:
        self._path = path

    def __len__(self) -> int:
        return int(_parquet(self._path).metadata.num_rows)

    def read(self, start: int, stop: int) -> Iterator[Record]:
        file = _parquet(self._path)
        sizes = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
        ends = list(itertools.accumulate(sizes))
        # Of those before and after, nothing is read.
        groups = [i for i, end in enumerate(ends) if end > start and end - sizes[i] < stop]
        number = ends[groups[0]] - sizes[groups[0]]
        for batch in file.iter_batches(batch_size=1024, row_groups=groups):
            low = min(max(start - number, 0), len(batch))
            high = min(max(stop - number, 0), len(batch))
            for i, fields in enumerate(batch.slice(low, high - low).to_pylist(), number + low + 1):
                yield Record(f"{self._path}:{i}", fields)
            number += len(batch)


def _parquet(path: epath.Path) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        remote = "://" in os.fspath(path)
        return pyarrow.parquet.ParquetFile(path.open("rb") if remote else os.fspath(path))
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(f"data.source: {path} is not a Parquet file: {error}") from error


# --- TFDS ---


def _tfds_builder(source: str, data_dir: str) -> Any:
    import tensorflow_datasets as tfds

    folder = fetched(source) if "://" in source else Path(source).expanduser()
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


def _open_tfds(source: str, builder: Any, split: str) -> Source:
    views = {name: _Tfds(source, builder, name) for name in builder.info.splits}
    files = [path for path in epath.Path(builder.data_path).iterdir() if path.is_file()]
    opened = Source(source, split, views, sorted(files, key=os.fspath))
    len(opened)  # An unknown split is an error already.
    return opened


class _Tfds:
    """The rows of a split of a TFDS data set."""

    def __init__(self, source: str, builder: Any, name: str) -> None:
        self._source, self._builder, self._name = source, builder, name

    def __len__(self) -> int:
        return int(self._builder.info.splits[self._name].num_examples)

    @functools.cached_property
    def _view(self) -> Any:
        try:
            return self._builder.as_data_source(self._name)
        except (NotImplementedError, ImportError, ValueError) as error:
            raise UserError(
                f"data.source: {self._source} has no random access ({error}); rewrite it once with "
                "`ranktuner data prepare`, or prepare it with file_format='array_record'"
            ) from error

    def read(self, start: int, stop: int) -> Iterator[Record]:
        rows = _slices(self._view, start, stop)
        return (
            Record(f"{self._source}[{self._name}]:{number}", _unpack(row))
            for number, row in enumerate(rows, start + 1)
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


def _open_hub(name: str, split: str, subset: str) -> Source:
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"data.source=hub:{name}: expected the package datasets, got {error}; "
            "run pip install 'ranktuner-jax[hub]'"
        ) from error
    try:
        rows: Any = datasets.load_dataset(name, subset or None, split=split)
    except Exception as error:  # Anything that its network stack raises.
        raise UserError(
            f"data.source=hub:{name}: could not load split {split!r}: {_first_line(error)}"
        ) from error
    files = [epath.Path(file["filename"]) for file in getattr(rows, "cache_files", ())]
    # The hub has cut out the split already.
    return Source(f"hub:{name}", "train", {"train": _Hub(f"hub:{name}[{split}]", rows)}, files)


class _Hub:
    """The rows of a data set of the hub."""

    def __init__(self, name: str, rows: Any) -> None:
        self._name, self._rows = name, rows

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, start: int, stop: int) -> Iterator[Record]:
        return (Record(f"{self._name}:{i + 1}", dict(self._rows[i])) for i in range(start, stop))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
