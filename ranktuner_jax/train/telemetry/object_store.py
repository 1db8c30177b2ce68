"""Growing files on object stores, which do not support appending."""

from __future__ import annotations

import pathlib
import tempfile
import time

from etils import epath

__all__ = ["LocalCopy"]

_SECONDS_BETWEEN_COPIES = 60.0


class LocalCopy:
    """A local folder whose files are copied to an object store as they change."""

    def __init__(self, remote: epath.Path) -> None:
        self._remote = remote
        self._folder = tempfile.TemporaryDirectory(prefix="ranktuner-")
        self.local = pathlib.Path(self._folder.name)
        self._copied: dict[pathlib.Path, tuple[int, int]] = {}
        self._last = time.monotonic()

    def update(self, force: bool) -> None:
        """Copies the changed files, at most once a minute unless `force` is set."""
        if not force and time.monotonic() - self._last < _SECONDS_BETWEEN_COPIES:
            return
        for path in sorted(self.local.rglob("*")):
            state = path.stat().st_size, path.stat().st_mtime_ns
            if path.is_file() and self._copied.get(path) != state:
                target = self._remote / path.relative_to(self.local).as_posix()
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())
                self._copied[path] = state
        self._last = time.monotonic()
