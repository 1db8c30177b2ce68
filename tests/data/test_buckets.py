"""Sources on an object store."""

import contextlib
import fcntl
import json
import os
import pathlib
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator

import pyarrow
import pyarrow.parquet
import pytest

from ranktuner_jax.data import read_source, write_dataset
from ranktuner_jax.data.storage import to_record
from ranktuner_jax.errors import UserError
from tests.buckets import bucket

ROWS = [{"prompt": f"{i} + {i}", "completion": str(2 * i)} for i in range(10)]

SUMS = "gs://bucket/data/sums"


def prompts(source: str = SUMS, split: str = "train") -> list[str]:
    return [record.fields["prompt"] for record in read_source(source, split)]


@pytest.fixture
def store(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pathlib.Path]:
    """The folder that is gs://bucket/data."""
    monkeypatch.setenv("RANKTUNER_CACHE", str(tmp_path / "cache"))
    (tmp_path / "bucket" / "data").mkdir(parents=True)
    with bucket(tmp_path):
        yield tmp_path / "bucket" / "data"


@pytest.fixture
def copies(tmp_path: pathlib.Path) -> pathlib.Path:
    """Where folders of gs:// are copied to."""
    return tmp_path / "cache" / "fetched"


Reader = contextlib.AbstractContextManager[Callable[[], list[str]]]


@pytest.fixture
def other_process(store: pathlib.Path) -> Callable[[], Reader]:
    """Starts a process in which calls of `prompts` run until the context ends."""
    code = f"""
import json, pathlib, sys
from tests.buckets import bucket
from tests.data.test_buckets import prompts
with bucket(pathlib.Path({str(store.parents[1])!r})):
    for _ in sys.stdin:
        print(json.dumps(prompts()), flush=True)
"""

    @contextlib.contextmanager
    def start() -> Iterator[Callable[[], list[str]]]:
        with subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=pathlib.Path(__file__).parents[2],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            calls, results = process.stdin, process.stdout
            assert calls
            assert results

            def call() -> list[str]:
                print(file=calls, flush=True)
                read: list[str] = json.loads(results.readline())
                return read

            yield call

    return start


def write_sums(store: pathlib.Path, count: int) -> list[str]:
    """Writes gs://bucket/data/sums again, and returns its prompts."""
    for path in (store / "sums").glob("*"):
        path.unlink()
    if (store / "sums").exists():
        (store / "sums").rmdir()
    records = [to_record([{"role": "user", "content": "?"}], row) for row in ROWS[:count]]
    write_dataset(store / "sums", {"train": records}, name="sums")
    return [row["prompt"] for row in ROWS[:count]]


def test_files_are_read_where_they_are(store: pathlib.Path) -> None:
    for number in (0, 5):
        rows = pyarrow.Table.from_pylist(ROWS[number : number + 5])
        pyarrow.parquet.write_table(rows, store / f"{number}.parquet")
        lines = [f'{{"prompt": "{row["prompt"]}"}}\n' for row in ROWS[number : number + 5]]
        (store / f"train-{number}.jsonl").write_text("".join(lines))
    expected = [row["prompt"] for row in ROWS]
    assert prompts("gs://bucket/data/*.parquet") == expected
    assert prompts("gs://bucket/data/{split}-*.jsonl", "train[3:]") == expected[3:]
    assert prompts("gs://bucket/data/5.parquet") == expected[5:]
    [first, *_] = read_source("gs://bucket/data/5.parquet")
    assert first.where == "gs://bucket/data/5.parquet:1"
    with pytest.raises(UserError, match=r"expected a file, got gs://bucket/data/none\.jsonl"):
        prompts("gs://bucket/data/none.jsonl")


def test_a_tfds_folder_is_copied_once(store: pathlib.Path, copies: pathlib.Path) -> None:
    expected = write_sums(store, 10)
    inodes = set()
    for _ in range(2):
        assert prompts() == expected
        [copy] = copies.iterdir()
        inodes.add(copy.stat().st_ino)
    assert len(inodes) == 1
    with pytest.raises(UserError, match="gs://bucket/data/none, which holds no dataset_info"):
        prompts("gs://bucket/data/none")


def test_a_tfds_folder_that_changed_is_copied_again(
    store: pathlib.Path, copies: pathlib.Path, other_process: Callable[[], Reader]
) -> None:
    with other_process() as read:
        for count in (10, 4):
            expected = write_sums(store, count)
            assert read() == expected
        # The process may still read the first copy; the next one removes it.
        assert len(list(copies.iterdir())) == 2
    assert prompts() == expected
    assert len(list(copies.iterdir())) == 1


def test_files_of_the_same_size_written_later_are_copied_again(
    store: pathlib.Path, copies: pathlib.Path, other_process: Callable[[], Reader]
) -> None:
    write_sums(store, 10)
    with other_process() as read:
        read()
    [first] = copies.iterdir()
    os.utime(next((store / "sums").glob("*array_record*")), (1, 1))
    prompts()
    [second] = copies.iterdir()
    assert second.name != first.name


def test_a_copy_that_another_process_reads_is_kept(
    store: pathlib.Path, copies: pathlib.Path, other_process: Callable[[], Reader]
) -> None:
    write_sums(store, 10)
    with other_process() as read:
        read()
        [first] = copies.iterdir()
        expected = write_sums(store, 4)
        assert prompts() == expected
        assert first.is_dir()
    prompts()
    assert not first.exists()


def test_a_copy_that_is_removed_just_before_it_is_read_is_made_again(
    store: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = write_sums(store, 10)
    flock = fcntl.flock
    removed: list[pathlib.Path] = []

    def remove_first(descriptor: int, operation: int) -> None:
        if not removed:  # As a process would that finds this copy outdated.
            removed.extend((store.parents[1] / "cache" / "fetched").iterdir())
            removed[0].rename(store / "removed")
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", remove_first)
    assert prompts() == expected
    assert removed


def test_of_two_processes_that_copy_at_once_the_first_to_finish_wins(
    store: pathlib.Path,
    copies: pathlib.Path,
    other_process: Callable[[], Reader],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = write_sums(store, 10)
    write_bytes = pathlib.Path.write_bytes

    def overtaken(path: pathlib.Path, content: bytes) -> int:
        if not list(copies.glob("*/mark")):
            with other_process() as read:
                assert read() == expected
            [first] = copies.glob("[!.]*")
            (first / "mark").touch()
        return write_bytes(path, content)

    monkeypatch.setattr(pathlib.Path, "write_bytes", overtaken)
    assert prompts() == expected
    [kept] = copies.iterdir()
    assert (kept / "mark").exists()


def test_a_copy_that_fails_leaves_nothing_behind(
    store: pathlib.Path, copies: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_sums(store, 10)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, unlimited[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            prompts()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert list(copies.iterdir()) == []

    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(pathlib.Path, "rename", fail)
    with pytest.raises(OSError, match="no space left"):
        prompts()
    assert list(copies.iterdir()) == []


def test_a_folder_that_changes_while_it_is_copied_is_refused(
    store: pathlib.Path, copies: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_sums(store, 10)
    write_bytes = pathlib.Path.write_bytes

    def change(path: pathlib.Path, content: bytes) -> int:
        (store / "sums" / "more").touch()
        return write_bytes(path, content)

    monkeypatch.setattr(pathlib.Path, "write_bytes", change)
    with pytest.raises(UserError, match=f"{SUMS} changed while it was copied; run again"):
        prompts()
    assert list(copies.iterdir()) == []
