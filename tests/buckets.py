"""Google Cloud Storage without a network: a local folder that epath opens in place of gcsfs."""

import contextlib
import importlib
import pathlib
from collections.abc import Iterator
from typing import Any

import pytest
from etils import epath
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem


@contextlib.contextmanager
def bucket(folder: pathlib.Path) -> Iterator[list[str]]:
    """Makes a folder gs://bucket, and yields the names of the files that are written there."""
    written: list[str] = []

    class Bucket(DirFileSystem):
        protocol = ("gs", "gcs")
        cachable = False

        def __init__(self, **_: Any) -> None:
            super().__init__(path=str(folder), fs=LocalFileSystem(auto_mkdir=True))

        def _join(self, path: Any) -> Any:
            if isinstance(path, str):
                path = path.removeprefix("gs://")
            return super()._join(path)

        def open(self, path: str, mode: str = "rb", *arguments: Any, **options: Any) -> Any:
            assert "a" not in mode, "an object cannot be appended to"
            if "w" in mode:
                written.append(path.rpartition("/")[2])
            return super().open(path, mode, *arguments, **options)

    known = importlib.import_module("fsspec.registry")._registry
    forget = epath.backend.fsspec_backend._get_filesystem.cache_clear
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(known, "gcs", Bucket)
        forget()
        yield written
    forget()
