"""Local copies of remote folders, up to date, each kept while a process reads it."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import tempfile
from pathlib import Path

from etils import epath

from ranktuner_jax.errors import UserError
from ranktuner_jax.files import cache_dir, whole_folder

__all__ = ["fetched"]

# The copies of remote folders that this process reads, each with the descriptor that holds its
# lock. Readers open files lazily, so the lock is held until the process ends.
_HELD: dict[Path, int] = {}


def fetched(source: str) -> Path:
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
