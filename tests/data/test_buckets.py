"""Sources on an object store."""

import pathlib
from collections.abc import Iterator

import pyarrow
import pyarrow.parquet
import pytest

from ranktuner_jax.data import read_source, write_dataset
from ranktuner_jax.data.storage import to_record
from ranktuner_jax.errors import UserError
from tests.buckets import bucket

ROWS = [{"prompt": f"{i} + {i}", "completion": str(2 * i)} for i in range(10)]


def prompts(source: str, split: str = "train") -> list[str]:
    return [record.fields["prompt"] for record in read_source(source, split)]


@pytest.fixture
def store(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pathlib.Path]:
    """The folder that is gs://bucket/data."""
    monkeypatch.setenv("RANKTUNER_CACHE", str(tmp_path / "cache"))
    (tmp_path / "bucket" / "data").mkdir(parents=True)
    with bucket(tmp_path):
        yield tmp_path / "bucket" / "data"


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


def test_a_tfds_folder_is_copied_once(store: pathlib.Path, tmp_path: pathlib.Path) -> None:
    records = [to_record([{"role": "user", "content": "?"}], row) for row in ROWS]
    write_dataset(store / "sums", {"train": records}, name="sums")
    for _ in range(2):
        assert prompts("gs://bucket/data/sums") == [row["prompt"] for row in ROWS]
        for path in (store / "sums").iterdir():
            path.unlink()
    assert len(list((tmp_path / "cache" / "fetched").iterdir())) == 1
    with pytest.raises(UserError, match="gs://bucket/data/none, which holds no dataset_info"):
        prompts("gs://bucket/data/none")
