"""Tokens of large sources, made once, kept in files and mapped into memory."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from etils import epath

from ranktuner_jax.data import cache_files, cache_key
from ranktuner_jax.data.arrays import BrokenFileError, read_arrays, write_arrays
from ranktuner_jax.data.cache_builder import Builder
from ranktuner_jax.data.chat import ChatEncoder
from ranktuner_jax.data.chats import Facts, Part
from ranktuner_jax.data.config import DataConfig
from ranktuner_jax.data.encode import Split
from ranktuner_jax.data.packing import PACKERS, Groups
from ranktuner_jax.data.summary import Summary
from ranktuner_jax.data.workers import Workers
from ranktuner_jax.errors import UserError
from ranktuner_jax.files import cache_dir, write_whole

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Tokenized", "is_kept", "keep_held_out", "tokenize"]

# To be raised when the same rows would be written as other tokens, or other files.
_FORMAT = 1
# Rows of the source in one file. A process that is killed loses what it has of one.
_ROWS = 8192
# From this size on tokenizing a source takes more than some seconds, and `auto` keeps the tokens.
_LARGE = 32 << 20


@dataclasses.dataclass(frozen=True)
class Tokenized:
    """The samples of a split.

    Attributes:
      parts: Their tokens.
      summary: Counts of the source's rows.
      row_length: Positions of a row.
      packer: How rows are filled.
      folder: Where they are kept; None if they are in memory only.
    """

    parts: Sequence[Part]
    summary: Summary
    row_length: int
    packer: str
    folder: epath.Path | None = None

    def packed(self, lengths: np.ndarray, seed: int) -> Groups:
        """Which samples share a row; kept beside the tokens.

        Args:
          lengths: The positions of each sample.
          seed: Determines which ones.
        """
        path = self.folder and self.folder / f"rows-{self.packer}-{seed}.arrow"
        if path is not None and (kept := cache_files.read_kept(path)) is not None:
            return Groups(**kept)
        groups = PACKERS[self.packer](lengths, self.row_length, seed)
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
    return Tokenized([Part.of(chats)], summary, config.row_length, config.packer)


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
    files = cache_key.identify(split.source.files, list(cache_files.manifests(root)))
    options = {name: getattr(split.config, name) for name in cache_key.READ_OPTIONS}
    key = {**cache_key.source_key(split, files), **options, "split": split.config.split}
    path = root / f"held-out-{cache_key.digest(json.dumps(key, sort_keys=True))[:16]}.arrow"
    kept = cache_files.read_kept(path)
    if kept is not None:
        split.held_out = kept["rows"]
    elif split.held_out is not None:
        write_arrays(path, {"rows": split.held_out})


class _Cache:
    """The cache of one split under one tokenizer."""

    def __init__(
        self, split: Split, encoder: ChatEncoder, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self._split, self._encoder, self._tokenizer = split, encoder, tokenizer
        self._root = _root(split.config)
        self._others = list(cache_files.manifests(self._root))
        self._files = cache_key.identify(split.source.files, self._others)
        self._key: dict[str, Any] = {
            "format": {"version": _FORMAT, "rows": _ROWS},
            **cache_key.source_key(split, self._files),
            "tokenizer": cache_key.tokenizer_digest(tokenizer),
            "chat template": cache_key.digest(tokenizer.get_chat_template()),
            "options": {name: getattr(split.config, name) for name in cache_key.OPTIONS},
            "libraries": cache_key.library_versions(),
        }
        name = cache_key.digest(json.dumps(self._key, sort_keys=True))[:16]
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
            self._split.config.packer,
            self._folder,
        )

    def _open(self, builder: Builder, number: int, facts: Facts) -> tuple[np.ndarray, np.ndarray]:
        path = cache_files.part_path(self._folder, number)
        for last in (False, True):
            try:
                arrays = read_arrays(cache_files.local_copy(path), check=False)
                if len(arrays["tokens"]) == len(arrays["weights"]) == facts.tokens:
                    return arrays["tokens"], arrays["weights"]
            except (FileNotFoundError, BrokenFileError, KeyError):
                if last:
                    raise
            builder.repair(number, facts)
        raise AssertionError  # A repaired part has these facts.

    def _read(self) -> tuple[dict[str, Any] | None, dict[str, np.ndarray]]:
        """What a finished cache says of itself, and its index."""
        manifest = cache_files.read_manifest(self._folder)
        if manifest is None:
            cache_files.set_aside(self._folder / "cache.json")  # Unless there is none.
            return None, {}
        index = cache_files.read_kept(self._folder / "index.arrow")
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
        if cache_key.identify(self._split.source.files, ()) != self._files:
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
            "parts": [dataclasses.asdict(cache_files.facts_of(part)) for part in read],
        }
        text = json.dumps(manifest, indent=1)
        write_whole(self._folder / "cache.json", f"{cache_key.digest(text)}\n{text}\n")
        # What processes left that were killed: nobody writes a part that is there.
        for path in self._folder.iterdir():
            if re.fullmatch(r"\d+\.arrow\.(lock|partial-\d+)", path.name):
                path.unlink(missing_ok=True)
        return manifest, index

    def _checked(self, number: int) -> dict[str, np.ndarray] | None:
        """The arrays of a part, all of which is read; None if it was broken, and is set aside."""
        path = cache_files.part_path(self._folder, number)
        try:
            return read_arrays(cache_files.local_copy(path))
        except (BrokenFileError, FileNotFoundError):
            cache_files.forget_copy(path)
            with cache_files.locked(path, wait=True):
                if cache_files.read_facts(path) is None:  # Otherwise another process was faster.
                    cache_files.set_aside(path)
            return None

    def _build(self, builder: Builder, count: int) -> None:
        """Makes missing parts on all cores; those that another process makes are waited for."""
        names = {path.name for path in self._folder.iterdir()}
        missing = [
            k for k in range(count) if cache_files.part_path(self._folder, k).name not in names
        ]
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
                    for name in cache_key.OPTIONS
                    if before.get(name) != self._key["options"][name]
                ]
            cache_files.say(f"{self._split.name}: {' and '.join(changed)} changed; building anew")


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
        cache_files.say(
            f"{self._what}: {self._done:,} of {self._total:,} parts of {_ROWS:,} rows tokenized, "
            f"{left / 60:,.1f} min left"
        )


def _root(config: DataConfig) -> epath.Path:
    if config.cache in ("auto", "always"):
        return epath.Path(cache_dir() / "tokens")
    return epath.Path(config.cache).expanduser()
