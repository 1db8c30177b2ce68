"""The folder of an audit: whose it is, and the parts that are scored so far."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ranktuner_jax import files
from ranktuner_jax.errors import UserError

__all__ = ["AuditFolder"]

AUDIT, PARTS, PLAN = "audit.json", ".parts", "plan.json"
_SECONDS = b"seconds"


class AuditFolder:
    """The folder that `ranktuner audit` writes.

    Until the audit is finished, its parts are in `.parts/`, each written whole or not at all,
    with `plan.json`, which says whose they are and where each begins.

    Args:
      path: The folder; it need not exist.
      identity: What the audit's numbers depend on, of JSON types, by name.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as parent:
      ...     folder = AuditFolder(pathlib.Path(parent, "x"), {"model": "a"})
      ...     stops = folder.claim([5, 9])
      ...     folder.write(1, pa.table({"nll": [0.5]}), seconds=2.0)
      ...     again = AuditFolder(pathlib.Path(parent, "x"), {"model": "a"})
      ...     stops, again.claim([9]), again.done(), again.read(1)["nll"].to_pylist()
      ([5, 9], [5, 9], [1], [0.5])
    """

    def __init__(self, path: str | os.PathLike[str], identity: Mapping[str, Any]) -> None:
        self.path = pathlib.Path(path)
        self._identity = json.loads(json.dumps(identity))
        self._parts = self.path / PARTS

    @property
    def finished(self) -> bool:
        """Whether the audit is complete."""
        return (self.path / AUDIT).exists()

    def claim(self, stops: Sequence[int]) -> list[int]:
        """Makes the folder this audit's, or goes on with what it holds of it.

        Args:
          stops: Where each part ends, for a new audit.

        Returns:
          Where each part ends.

        Raises:
          UserError: If the folder cannot be written, or holds another audit or anything else.
        """
        try:
            entries = {path.name for path in self.path.iterdir()} if self.path.exists() else set()
            plan = self._parts / PLAN
            if AUDIT in entries:
                self._check(_read_json(self.path / AUDIT))
            elif plan.exists():
                saved = _read_json(plan)
                self._check(saved)
                stops = saved["stops"]
            elif entries - {PARTS}:
                raise UserError(
                    f"--output: expected a new folder or one of an audit, got {self.path}, which "
                    "holds something else; choose another folder"
                )
            else:
                content = {"identity": self._identity, "stops": list(stops)}
                files.write_whole(plan, json.dumps(content))
        except OSError as error:
            raise UserError(
                f"--output: expected a folder that can be written, got {self.path}: "
                f"{error.strerror}"
            ) from error
        return list(stops)

    def _check(self, saved: Mapping[str, Any]) -> None:
        """Refuses what another audit left."""
        old = saved.get("identity", {})
        differing = [name for name in self._identity if old.get(name) != self._identity[name]]
        if differing:
            name = differing[0]
            raise UserError(
                f"--output: {self.path} holds an audit with {name} {_short(old.get(name))}, this "
                f"one has {_short(self._identity[name])}; choose another folder, or the same "
                "settings to go on"
            )

    def done(self) -> list[int]:
        """The numbers of the parts that are scored."""
        return sorted(int(path.stem) for path in self._parts.glob("*.parquet") if _is_part(path))

    def write(self, part: int, table: pa.Table, *, seconds: float) -> None:
        """Keeps a part, and how long it took."""
        sink = pa.BufferOutputStream()
        metadata = {_SECONDS: str(seconds).encode()}
        pq.write_table(table.replace_schema_metadata(metadata), sink, compression="zstd")
        files.write_whole(self._path(part), sink.getvalue().to_pybytes())

    def read(self, part: int, columns: Sequence[str] | None = None) -> pa.Table:
        """The columns of a part; all of them by default."""
        return pq.read_table(self._path(part), columns=columns)

    def seconds(self) -> float:
        """How long all parts took together."""
        schemas = (pq.read_schema(self._path(part)) for part in self.done())
        return sum(float(schema.metadata[_SECONDS]) for schema in schemas)

    def scratch(self, name: str) -> pathlib.Path:
        """Where a file of the result is written, until `publish` moves it to its place."""
        return self._parts / f"new-{name}"

    def publish(self, name: str) -> None:
        """Moves a file of the result to its place."""
        self.scratch(name).replace(self.path / name)

    def finish(self, audit: Mapping[str, Any]) -> None:
        """Writes `audit.json`, which marks the audit as finished, and deletes the parts."""
        content = {**audit, "identity": self._identity}
        self.scratch(AUDIT).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        self.publish(AUDIT)
        self.clean()

    def clean(self) -> None:
        """Deletes the parts."""
        shutil.rmtree(self._parts, ignore_errors=True)

    def result(self) -> dict[str, Any]:
        """What `audit.json` holds."""
        return _read_json(self.path / AUDIT)

    def _path(self, part: int) -> pathlib.Path:
        return self._parts / f"{part:06d}.parquet"


def _is_part(path: pathlib.Path) -> bool:
    return path.stem.isdigit()


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
        _ = content["identity"].items()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: expected what an audit wrote, got a broken file ({error}); choose another "
            "--output"
        ) from error
    return dict(content)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."
