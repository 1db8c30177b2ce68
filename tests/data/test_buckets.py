"""Sources on an object store."""

import fcntl
import os
import pathlib
from collections.abc import Iterator

import pyarrow
import pyarrow.parquet
import pytest

from ranktuner_jax.data import read_source, sources, write_dataset
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
    end_process()


@pytest.fixture
def copies(tmp_path: pathlib.Path) -> pathlib.Path:
    """Where folders of gs:// are copied to."""
    return tmp_path / "cache" / "fetched"


def end_process() -> None:
    """What the end of the process does to its claims on copies."""
    while sources._HELD:
        os.close(sources._HELD.popitem()[1])


def write_sums(store: pathlib.Path, count: int) -> list[str]:
    """Writes gs://bucket/data/sums anew, and gives its prompts."""
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


def test_a_tfds_folder_that_changed_is_copied_anew(
    store: pathlib.Path, copies: pathlib.Path
) -> None:
    for count in (10, 4):
        expected = write_sums(store, count)
        assert prompts() == expected
    # The process may still read the first copy; the next one removes it.
    assert len(list(copies.iterdir())) == 2
    end_process()
    assert prompts() == expected
    assert len(list(copies.iterdir())) == 1


def test_files_of_the_same_size_written_later_are_copied_anew(
    store: pathlib.Path, copies: pathlib.Path
) -> None:
    write_sums(store, 10)
    prompts()
    [first] = copies.iterdir()
    os.utime(next((store / "sums").glob("*array_record*")), (1, 1))
    end_process()
    prompts()
    [second] = copies.iterdir()
    assert second.name != first.name


def test_a_copy_that_another_process_reads_is_kept(
    store: pathlib.Path, copies: pathlib.Path
) -> None:
    write_sums(store, 10)
    prompts()
    [first] = copies.iterdir()
    end_process()
    reader = os.open(first, os.O_RDONLY)
    fcntl.flock(reader, fcntl.LOCK_SH)
    expected = write_sums(store, 4)
    assert prompts() == expected
    assert first.is_dir()
    os.close(reader)
    prompts()
    assert not first.exists()


def test_a_copy_that_is_removed_just_before_it_is_read_is_made_again(
    store: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = write_sums(store, 10)
    flock, removed = fcntl.flock, []

    def remove_first(descriptor: int, operation: int) -> None:
        if not removed:  # As a process does that finds this copy outdated.
            removed.extend((store.parents[1] / "cache" / "fetched").iterdir())
            removed[0].rename(store / "removed")
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", remove_first)
    assert prompts() == expected
    assert removed


def test_of_two_processes_that_copy_at_once_the_first_wins(
    store: pathlib.Path, copies: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = write_sums(store, 10)
    copy = sources._copy

    def copy_twice(*arguments: object) -> None:
        copy(*arguments)
        [first] = copies.iterdir()
        (first / "mark").touch()
        copy(*arguments)

    monkeypatch.setattr(sources, "_copy", copy_twice)
    assert prompts() == expected
    [kept] = copies.iterdir()
    assert (kept / "mark").exists()


def test_a_copy_that_fails_leaves_nothing_behind(
    store: pathlib.Path, copies: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_sums(store, 10)

    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "write_bytes", fail)
        with pytest.raises(OSError, match="no space left"):
            prompts()
    assert list(copies.iterdir()) == []
    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "rename", fail)
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
