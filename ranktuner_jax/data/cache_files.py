"""The files of a cache: their names, locks, local copies, and what happens to broken ones."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from ranktuner_jax.data.arrays import BrokenFileError, read_arrays
from ranktuner_jax.data.cache_key import digest
from ranktuner_jax.data.chats import Facts
from ranktuner_jax.files import cache_dir, write_whole

__all__ = [
    "facts_of",
    "forget_copy",
    "local_copy",
    "locked",
    "manifests",
    "part_path",
    "read_facts",
    "read_kept",
    "read_manifest",
    "say",
    "set_aside",
]


def part_path(folder: epath.Path, number: int) -> epath.Path:
    """The file of a part."""
    return folder / f"{number:06d}.arrow"


def read_facts(path: epath.Path) -> Facts | None:
    """The facts of a part that is not broken, all of which is read; None if it is."""
    try:
        return facts_of(read_arrays(local_copy(path)))
    except (FileNotFoundError, BrokenFileError):
        return None


def facts_of(arrays: dict[str, np.ndarray]) -> Facts:
    """The facts of the arrays of a part."""
    return Facts.of(len(arrays["lengths"]), arrays["tokens"], arrays["weights"])


def set_aside(path: epath.Path) -> None:
    """Renames a broken file, which is kept for whoever wants to know what broke it."""
    forget_copy(path)
    with contextlib.suppress(FileNotFoundError):
        path.replace(path.parent / f"{path.name}.broken")
        say(f"{path} is broken; set aside as {path.name}.broken, and made anew")


@contextlib.contextmanager
def locked(path: epath.Path, wait: bool) -> Iterator[bool]:
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


def local_copy(path: epath.Path) -> Path:
    """The path, or that of a local copy of an object, which is made when it is first read."""
    if "://" not in os.fspath(path):
        return Path(path)
    copy = _copy_of(path)
    if not copy.exists():
        write_whole(copy, path.read_bytes())
    return copy


def forget_copy(path: epath.Path) -> None:
    """Removes the local copy of an object, which may be broken where the object is not."""
    if "://" in os.fspath(path):
        _copy_of(path).unlink(missing_ok=True)


def read_kept(path: epath.Path) -> dict[str, np.ndarray] | None:
    """The arrays of a file; None if there is none, or it is broken, and is set aside."""
    for attempt in range(2):
        try:
            return read_arrays(local_copy(path))
        except FileNotFoundError:
            return None
        except BrokenFileError:
            forget_copy(path) if attempt == 0 else set_aside(path)
    return None


def _copy_of(path: epath.Path) -> Path:
    name = digest(os.fspath(path.parent))[:16]
    return cache_dir() / "fetched" / f"tokens-{name}" / path.name


def manifests(root: epath.Path) -> Iterator[dict[str, Any]]:
    """What the caches of a folder say of themselves, the oldest first."""
    with contextlib.suppress(FileNotFoundError):
        folders = sorted(root.iterdir(), key=lambda path: path.stat().mtime)
        yield from filter(None, map(read_manifest, folders))


def read_manifest(folder: epath.Path) -> dict[str, Any] | None:
    """What a finished cache says of itself; None if there is none, or it is broken."""
    try:
        checksum, _, text = (folder / "cache.json").read_text().partition("\n")
    except (FileNotFoundError, NotADirectoryError, UnicodeDecodeError):
        return None
    if checksum != digest(text.removesuffix("\n")):
        return None
    manifest: dict[str, Any] = json.loads(text)
    return manifest


def say(line: str) -> None:
    """Prints a line about a cache on standard error."""
    print(f"data cache: {line}", file=sys.stderr, flush=True)
