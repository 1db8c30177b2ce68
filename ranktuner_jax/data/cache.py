"""Tokens of large sources, made once, kept in files and mapped into memory."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import importlib.metadata
import json
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from etils import epath

import ranktuner_jax
from ranktuner_jax.data.arrays import BrokenFileError, read_arrays, write_arrays
from ranktuner_jax.data.chat import ChatEncoder
from ranktuner_jax.data.chats import Facts, Part, checksums
from ranktuner_jax.data.config import DataConfig
from ranktuner_jax.data.encode import Split
from ranktuner_jax.data.packing import Groups, best_fit, packing_order
from ranktuner_jax.data.summary import Summary
from ranktuner_jax.data.workers import Workers
from ranktuner_jax.errors import RunError, UserError
from ranktuner_jax.files import cache_dir, write_whole

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Builder", "Tokenized", "is_kept", "keep_held_out", "tokenize"]

# To be raised when the same rows would be written as other tokens, or other files.
_FORMAT = 1
# Rows of the source in one file. A process that is killed loses what it has of one.
_ROWS = 8192
# From this size on tokenizing a source takes more than some seconds, and `auto` keeps the tokens.
_LARGE = 32 << 20
# What else decides the tokens: the keys of the config that `Split` and `ChatEncoder` read.
_READ = (
    *("holdout", "prompt_column", "completion_column", "system", "strip_calculator_marks"),
    "on_bad_row",
)
_OPTIONS = (*_READ, "enable_thinking", "row_length", "too_long")


@dataclasses.dataclass(frozen=True)
class Tokenized:
    """The samples of a split.

    Attributes:
      parts: Their tokens.
      summary: Counts of the source's rows.
      row_length: Positions of a row.
      folder: Where they are kept; None if they are in memory only.
    """

    parts: Sequence[Part]
    summary: Summary
    row_length: int
    folder: epath.Path | None = None

    def packed(self, lengths: np.ndarray, seed: int) -> Groups:
        """Which samples share a row; kept beside the tokens.

        Args:
          lengths: The positions of each sample.
          seed: Determines which ones.
        """
        path = self.folder and self.folder / f"rows-{seed}.arrow"
        if path is not None and (kept := _read_kept(path)) is not None:
            return Groups(**kept)
        groups = best_fit(lengths, self.row_length, packing_order(lengths, seed))
        if path is not None:
            write_arrays(path, {"items": groups.items, "stops": groups.stops})
        return groups


def tokenize(
    split: Split,
    encoder: ChatEncoder,
    tokenizer: PreTrainedTokenizerBase,
    limit: int | None = None,
) -> Tokenized:
    """The samples of a split, from the cache if its config says so.

    Args:
      split: What to read.
      encoder: Makes tokens of it.
      tokenizer: The encoder's.
      limit: At most so many conversations, the first ones, which are not kept; all if None.

    Raises:
      UserError: If a row is bad or too long and the config says `error`.
    """
    config = split.config
    if limit is None and is_kept(split):
        return _Cache(split, encoder, tokenizer).load()
    summary = Summary(config.row_length)
    chats = list(split.samples(encoder, summary, limit=limit))
    summary.supervised = sum(int(chat.mask[1:].sum()) for chat in chats)
    return Tokenized([Part.of(chats)], summary, config.row_length)


def is_kept(split: Split) -> bool:
    """Whether the tokens of a split are kept in files: see `DataConfig.cache`."""
    if split.config.cache == "auto":
        return sum(int(path.stat().length) for path in split.source.files) >= _LARGE
    return split.config.cache != "never"


def keep_held_out(split: Split) -> None:
    """Finds the rows that are held out of a split, if there are any and its tokens are kept.

    They are kept as well, so that a later process need not read all prompts to know them.
    """
    if not split.config.holdout or not is_kept(split):
        return
    root = _root(split.config)
    files = _identify(split.source.files, list(_manifests(root)))
    options = {name: getattr(split.config, name) for name in _READ}
    key = {**_source_key(split, files), **options, "split": split.config.split}
    path = root / f"held-out-{_digest(json.dumps(key, sort_keys=True))[:16]}.arrow"
    kept = _read_kept(path)
    if kept is not None:
        split.__dict__["held_out"] = kept["rows"]  # The cached property.
    elif split.held_out is not None:
        write_arrays(path, {"rows": split.held_out})


class Builder:
    """Writes the parts of a cache, each once, whoever else does.

    Args:
      split: What to read.
      encoder: Makes tokens of it.
      folder: Where to write.
      rows: Rows of the source in a part.
    """

    def __init__(self, split: Split, encoder: ChatEncoder, folder: epath.Path, rows: int) -> None:
        self._encoder, self._rows = encoder, rows
        self.split, self.folder = split, folder

    def job(self) -> tuple[Any, ...]:
        """What `serve` makes another such builder of; what is held out is found once."""
        split = self.split
        return split.config, split.name, split.split, split.held_out, self.folder, self._rows

    def build(self, number: int, wait: bool) -> bool:
        """Writes a part unless it is there.

        Args:
          number: Which part.
          wait: Whether to wait for another process that writes it.

        Returns:
          Whether it is there now.
        """
        path = part_path(self.folder, number)
        with _locked(path, wait) as held:
            if not held:
                return False
            if not path.exists():
                self._write(path, number)
            return True

    def repair(self, number: int, facts: Facts) -> None:
        """Sets a broken part aside and writes it anew.

        Raises:
          RunError: If the source gives other tokens now.
        """
        path = part_path(self.folder, number)
        with _locked(path, wait=True):
            _forget_copy(path)
            if read_facts(path) == facts:
                return  # Another process was faster.
            set_aside(path)
            self._write(path, number)
            if read_facts(path) != facts:
                raise RunError(
                    f"data cache: {path} was broken, and the source has changed since it was "
                    "written; run the same command again to tokenize the source anew"
                )

    def _write(self, path: epath.Path, number: int) -> None:
        summary = Summary(self.split.config.row_length)
        start = number * self._rows
        stop = min(start + self._rows, len(self.split.source))
        chats = list(self.split.samples(self._encoder, summary, start, stop))
        summary.supervised = sum(int(chat.mask[1:].sum()) for chat in chats)
        part = Part.of(chats)
        tokens, weights = part.open()
        write_arrays(
            path,
            {
                "tokens": tokens,
                "weights": weights,
                "lengths": part.lengths,
                "checksums": checksums(chats),
                "counts": np.frombuffer(json.dumps(summary.counts()).encode(), np.uint8),
            },
        )


class _Cache:
    """The cache of one split under one tokenizer."""

    def __init__(
        self, split: Split, encoder: ChatEncoder, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self._split, self._encoder, self._tokenizer = split, encoder, tokenizer
        self._root = _root(split.config)
        self._others = list(_manifests(self._root))
        self._files = _identify(split.source.files, self._others)
        self._key: dict[str, Any] = {
            "format": {"version": _FORMAT, "rows": _ROWS},
            **_source_key(split, self._files),
            "tokenizer": _tokenizer_digest(tokenizer),
            "chat template": _digest(tokenizer.get_chat_template()),
            "options": {name: getattr(split.config, name) for name in _OPTIONS},
            "libraries": _versions(),
        }
        name = _digest(json.dumps(self._key, sort_keys=True))[:16]
        self._folder = self._root / name

    def load(self) -> Tokenized:
        """The samples; those that are missing are made."""
        builder = Builder(self._split, self._encoder, self._folder, _ROWS)
        manifest, found = self._read()
        if manifest is None:
            self._say_why()
            keep_held_out(self._split)
            manifest, found = self._make(builder)
        facts = [Facts(**part) for part in manifest["parts"]]
        self._build(builder, len(facts))
        stops = np.cumsum([part.chats for part in facts])
        parts = [
            Part(
                one,
                found["lengths"][stop - one.chats : stop],
                functools.partial(self._open, builder, number, one),
                found["checksums"][stop - one.chats : stop],
                functools.partial(builder.repair, number, one),
            )
            for number, (one, stop) in enumerate(zip(facts, stops, strict=True))
        ]
        return Tokenized(
            parts,
            Summary.of(manifest["counts"]),
            self._split.config.row_length,
            self._folder,
        )

    def _open(self, builder: Builder, number: int, facts: Facts) -> tuple[np.ndarray, np.ndarray]:
        path = part_path(self._folder, number)
        for last in (False, True):
            try:
                arrays = read_arrays(_local(path), check=False)
                if len(arrays["tokens"]) == len(arrays["weights"]) == facts.tokens:
                    return arrays["tokens"], arrays["weights"]
            except (FileNotFoundError, BrokenFileError, KeyError):
                if last:
                    raise
            builder.repair(number, facts)
        raise AssertionError  # A repaired part has these facts.

    def _read(self) -> tuple[dict[str, Any] | None, dict[str, np.ndarray]]:
        """What a finished cache says of itself, and its index."""
        manifest = _read_manifest(self._folder)
        if manifest is None:
            set_aside(self._folder / "cache.json")  # Unless there is none.
            return None, {}
        index = _read_kept(self._folder / "index.arrow")
        return (None, {}) if index is None else (manifest, index)

    def _make(self, builder: Builder) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        count = -(-len(self._split.source) // _ROWS)
        self._folder.mkdir(parents=True, exist_ok=True)
        parts: list[dict[str, np.ndarray] | None] = [None]
        while None in parts:  # Those of a process that was killed may be broken.
            self._build(builder, count)
            parts = [self._checked(number) for number in range(count)]
        read = [part for part in parts if part is not None]
        summary = Summary(self._split.config.row_length)
        for part in read:
            summary.add(Summary.of(json.loads(part["counts"].tobytes())))
        index = {
            name: np.concatenate([np.zeros(0, kind), *(part[name] for part in read)])
            for name, kind in (("lengths", np.int32), ("checksums", np.uint32))
        }
        if _identify(self._split.source.files, ()) != self._files:
            raise UserError(
                f"data.source: {self._split.name} changed while it was tokenized; run again when "
                "nothing writes to it"
            )
        write_arrays(self._folder / "index.arrow", index)
        manifest = {
            "source": self._split.name,
            "key": self._key,
            "files": self._files,
            "counts": summary.counts(),
            "parts": [dataclasses.asdict(_facts(part)) for part in read],
        }
        text = json.dumps(manifest, indent=1)
        write_whole(self._folder / "cache.json", f"{_digest(text)}\n{text}\n")
        # What processes left that were killed: nobody writes a part that is there.
        for path in self._folder.iterdir():
            if re.fullmatch(r"\d+\.arrow\.(lock|partial-\d+)", path.name):
                path.unlink(missing_ok=True)
        return manifest, index

    def _checked(self, number: int) -> dict[str, np.ndarray] | None:
        """The arrays of a part, all of which is read; None if it was broken, and is set aside."""
        path = part_path(self._folder, number)
        try:
            return read_arrays(_local(path))
        except (BrokenFileError, FileNotFoundError):
            _forget_copy(path)
            with _locked(path, wait=True):
                if read_facts(path) is None:  # Otherwise another process was faster.
                    set_aside(path)
            return None

    def _build(self, builder: Builder, count: int) -> None:
        """Makes missing parts on all cores; those that another process makes are waited for."""
        names = {path.name for path in self._folder.iterdir()}
        missing = [k for k in range(count) if part_path(self._folder, k).name not in names]
        if not missing:
            return
        rank, ranks = 0, 1
        if jax.distributed.is_initialized():
            rank, ranks = jax.process_index(), jax.process_count()
        # Each process begins with its own share. Where files are shared the others then have
        # theirs; otherwise each process has a cache of its own, and makes all.
        missing = [k for share in range(ranks) for k in missing[(rank + share) % ranks :: ranks]]
        progress = _Progress(len(missing), self._split.name, show=rank == 0)
        with Workers(builder, self._tokenizer, len(missing)) as workers:
            for wait in (False, True):
                # Locks keep two processes of a host from making the same part.
                later = []
                for k, done in zip(missing, workers.build(missing, wait), strict=True):
                    progress.step(done)
                    if not done:
                        later.append(k)
                missing = later

    def _say_why(self) -> None:
        """Says which part of the key differs from that of the newest cache of this source."""
        mine = [
            other
            for other in self._others
            if other["source"] == self._split.name and other["key"]["split"] == self._key["split"]
        ]
        if mine:
            old = mine[-1]["key"]
            changed = [name for name in self._key if self._key[name] != old.get(name)]
            if changed == ["options"]:
                before = old["options"]
                changed = [
                    f"data.{name}"
                    for name in _OPTIONS
                    if before.get(name) != self._key["options"][name]
                ]
            _say(f"{self._split.name}: {' and '.join(changed)} changed; building anew")


class _Progress:
    """A line each time another tenth is done, or a minute has passed."""

    def __init__(self, total: int, what: str, show: bool) -> None:
        self._total, self._what, self._show = total, what, show
        self._done = self._tenths = 0
        self._start = self._last = time.monotonic()

    def step(self, done: bool) -> None:
        """Another part is there, if `done`."""
        self._done += done
        tenths, now = self._done * 10 // self._total, time.monotonic()
        if not self._show or (tenths == self._tenths and now - self._last < 60) or not self._done:
            return
        self._tenths, self._last = tenths, now
        left = (self._total - self._done) * (now - self._start) / self._done
        _say(
            f"{self._what}: {self._done:,} of {self._total:,} parts of {_ROWS:,} rows tokenized, "
            f"{left / 60:,.1f} min left"
        )


def part_path(folder: epath.Path, number: int) -> epath.Path:
    """The file of a part."""
    return folder / f"{number:06d}.arrow"


def read_facts(path: epath.Path) -> Facts | None:
    """The facts of a part that is not broken, all of which is read; None if it is."""
    try:
        return _facts(read_arrays(_local(path)))
    except (FileNotFoundError, BrokenFileError):
        return None


def _facts(arrays: dict[str, np.ndarray]) -> Facts:
    return Facts.of(len(arrays["lengths"]), arrays["tokens"], arrays["weights"])


def set_aside(path: epath.Path) -> None:
    """Renames a broken file, which is kept for whoever wants to know what broke it."""
    _forget_copy(path)
    with contextlib.suppress(FileNotFoundError):
        path.replace(path.parent / f"{path.name}.broken")
        _say(f"{path} is broken; set aside as {path.name}.broken, and made anew")


@contextlib.contextmanager
def _locked(path: epath.Path, wait: bool) -> Iterator[bool]:
    """Holds the lock of a file that is to be written; yields False if another process has it.

    The lock of a process that is killed is free. On an object store there are no locks, and what
    two processes write is the same.
    """
    if "://" in os.fspath(path):
        yield True
        return
    lock = Path(f"{os.fspath(path)}.lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True
        # Whoever waits for the removed file finds the part written.
        lock.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def _local(path: epath.Path) -> Path:
    """The path, or that of a local copy of an object, which is made when it is first read."""
    if "://" not in os.fspath(path):
        return Path(path)
    copy = _copy_of(path)
    if not copy.exists():
        write_whole(copy, path.read_bytes())
    return copy


def _forget_copy(path: epath.Path) -> None:
    """Removes the local copy of an object, which may be broken where the object is not."""
    if "://" in os.fspath(path):
        _copy_of(path).unlink(missing_ok=True)


def _read_kept(path: epath.Path) -> dict[str, np.ndarray] | None:
    """The arrays of a file; None if there is none, or it is broken, and is set aside."""
    for attempt in range(2):
        try:
            return read_arrays(_local(path))
        except FileNotFoundError:
            return None
        except BrokenFileError:
            _forget_copy(path) if attempt == 0 else set_aside(path)
    return None


def _copy_of(path: epath.Path) -> Path:
    name = _digest(os.fspath(path.parent))[:16]
    return cache_dir() / "fetched" / f"tokens-{name}" / path.name


def _root(config: DataConfig) -> epath.Path:
    if config.cache in ("auto", "always"):
        return epath.Path(cache_dir() / "tokens")
    return epath.Path(config.cache).expanduser()


def _source_key(split: Split, files: Sequence[dict[str, Any]]) -> dict[str, Any]:
    chosen = split.split
    if split.config.holdout:  # Of which split rows are held out.
        chosen = f"{split.split} of {split.config.split}"
    kinds = [[Path(file["path"]).suffix, file["content"]] for file in files]
    return {"source": kinds, "split": chosen}


def _manifests(root: epath.Path) -> Iterator[dict[str, Any]]:
    """What the caches of a folder say of themselves, the oldest first."""
    with contextlib.suppress(FileNotFoundError):
        folders = sorted(root.iterdir(), key=lambda path: path.stat().mtime)
        yield from filter(None, map(_read_manifest, folders))


def _read_manifest(folder: epath.Path) -> dict[str, Any] | None:
    try:
        checksum, _, text = (folder / "cache.json").read_text().partition("\n")
    except (FileNotFoundError, NotADirectoryError, UnicodeDecodeError):
        return None
    if checksum != _digest(text.removesuffix("\n")):
        return None
    manifest: dict[str, Any] = json.loads(text)
    return manifest


def _identify(
    files: Sequence[epath.Path], others: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
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


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    special = sorted(tokenizer.all_special_tokens), sorted(tokenizer.special_tokens_map.items())
    return _digest(tokenizer.backend_tokenizer.to_str() + repr(special))


def _versions() -> dict[str, str]:
    names = ("jinja2", "tokenizers", "transformers")
    versions = {name: importlib.metadata.version(name) for name in names}
    return {**versions, "ranktuner_jax": ranktuner_jax.__version__}


def _say(line: str) -> None:
    print(f"data cache: {line}", file=sys.stderr, flush=True)
