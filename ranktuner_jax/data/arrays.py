"""Named arrays in one file, which is read by mapping it into memory."""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from ranktuner_jax.files import write_whole

if TYPE_CHECKING:
    import pyarrow

__all__ = ["BrokenFileError", "read_arrays", "write_arrays"]

_CHECKSUM = b"crc32"


class BrokenFileError(Exception):
    """A file is not what `write_arrays` wrote."""


def write_arrays(path: os.PathLike[str], arrays: Mapping[str, np.ndarray]) -> int:
    """Writes arrays [n] of any lengths as an Arrow file, whole or not at all.

    Args:
      path: A `pathlib` or `etils.epath` path.
      arrays: Numbers by name.

    Returns:
      The size of the file in bytes.

    Example:
      >>> import pathlib, tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = pathlib.Path(folder, "a.arrow")
      ...     _ = write_arrays(path, {"a": np.arange(3), "b": np.ones(1, np.float32)})
      ...     read = read_arrays(path)
      >>> read["a"].tolist(), read["b"].dtype, read["a"].flags.writeable
      ([0, 1, 2], dtype('float32'), False)
    """
    import pyarrow

    # One row, in which each array is a list: columns of a table would have to be of one length.
    batch = pyarrow.record_batch(
        {
            name: pyarrow.LargeListArray.from_arrays(
                pyarrow.array([0, len(array)], pyarrow.int64()), pyarrow.array(array)
            )
            for name, array in arrays.items()
        }
    ).replace_schema_metadata({_CHECKSUM: str(_checksum(arrays))})
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    content = sink.getvalue()
    write_whole(path, content)
    return int(content.size)


def read_arrays(path: os.PathLike[str], *, check: bool = True) -> dict[str, np.ndarray]:
    """The arrays of a local file, read-only. Their pages are read when they are first used.

    Args:
      path: The file.
      check: Whether to read all of it and compare the checksum.

    Raises:
      BrokenFileError: If the file is cut short or otherwise broken.
      FileNotFoundError: If there is none.
    """
    import pyarrow

    try:
        with pyarrow.memory_map(os.fspath(path)) as file:
            batch = pyarrow.ipc.open_file(file).get_batch(0)
        batch.validate(full=True)
        arrays = {name: _array(batch[name]) for name in batch.schema.names}
        checksum = int(batch.schema.metadata[_CHECKSUM])
    except FileNotFoundError:
        raise
    # What is read where bytes are wrong may be anything, also a text that is not UTF-8.
    except (pyarrow.ArrowException, OSError, LookupError, ValueError, TypeError) as error:
        raise BrokenFileError(f"{path} is broken: {error}") from error
    if check and checksum != _checksum(arrays):
        raise BrokenFileError(f"{path} is broken: its checksum is another")
    return arrays


def _array(column: pyarrow.Array) -> np.ndarray:
    array: np.ndarray = column.flatten().to_numpy(zero_copy_only=True)
    return array


def _checksum(arrays: Mapping[str, np.ndarray]) -> int:
    checksum = zlib.crc32(repr([(n, len(a), a.dtype.str) for n, a in arrays.items()]).encode())
    for array in arrays.values():
        checksum = zlib.crc32(np.ascontiguousarray(array).data, checksum)
    return checksum
