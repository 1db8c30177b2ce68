"""Atomic writes of files and folders, and the path of the user's cache."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["cache_dir", "stamp", "whole_folder", "write_whole"]


def cache_dir() -> Path:
    """The user's cache: `RANKTUNER_CACHE`, or `~/.cache/ranktuner_jax`.

    Example:
      >>> cache_dir().is_absolute()
      True
    """
    folder = os.environ.get("RANKTUNER_CACHE") or "~/.cache/ranktuner_jax"
    return Path(folder).expanduser().resolve()


def stamp(folder: Path) -> str:
    """16 hexadecimal digits that change when a file of a folder does, by size or time of writing.

    Example:
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     empty = stamp(Path(folder))
      ...     write_whole(Path(folder, "config.json"), "{}")
      ...     stamp(Path(folder)) == empty
      False
    """
    stats = [(path.name, path.stat()) for path in sorted(folder.iterdir()) if path.is_file()]
    text = repr([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_whole(path: os.PathLike[str], content: str | bytes) -> None:
    """Writes a file atomically: a reader sees either the old content or all of the new.

    The content goes to a temporary file beside it, which is then renamed. Writes to an object store
    (`gs://`) are atomic already.

    Args:
      path: A `pathlib` or `etils.epath` path. Missing parent folders are created.
      content: Text (written as UTF-8) or bytes.

    Raises:
      OSError: If it cannot be written; the old content stays.

    Example:
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = Path(folder, "result.json")
      ...     write_whole(path, "{}")
      ...     path.read_text(), os.listdir(folder)
      ('{}', ['result.json'])
    """
    data = content.encode() if isinstance(content, str) else content
    target: Any = path if hasattr(path, "write_bytes") else Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    if "://" in os.fspath(path):
        target.write_bytes(data)
        return
    # Named by process: several may write the same file.
    partial = target.with_name(f"{target.name}.partial-{os.getpid()}")
    try:
        partial.write_bytes(data)
        partial.replace(target)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def whole_folder(folder: Path, inside: str = "") -> Iterator[Path]:
    """Creates a folder atomically: yields a temporary one, which is renamed at the end.

    An exception in the block leaves nothing behind; a process that is killed leaves a folder whose
    name begins with a dot. If two processes create the same folder, the first to finish wins and
    the other's is deleted.

    Args:
      folder: The final path; must not exist yet.
      inside: A subfolder of the temporary folder to rename instead of the whole.

    Yields:
      The temporary folder, on the same file system.

    Raises:
      OSError: If it cannot be created or renamed.

    Example:
      >>> with tempfile.TemporaryDirectory() as parent:
      ...     with whole_folder(Path(parent, "model")) as scratch:
      ...         _ = Path(scratch, "config.json").write_text("{}")
      ...         before = Path(parent, "model").exists()
      ...     before, os.listdir(f"{parent}/model")
      (False, ['config.json'])
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        scratch.chmod(0o755)  # mkdtemp gives access to the owner alone.
        yield scratch
        try:
            Path(scratch, inside).rename(folder)
        except OSError:
            if not folder.is_dir():  # Otherwise another process was faster.
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
