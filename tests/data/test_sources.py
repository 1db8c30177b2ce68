"""Every kind of source gives the same rows in the same order, with the origin of each."""

import json
import multiprocessing
import pathlib
import subprocess
import sys
import types
from collections.abc import Callable
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from ranktuner_jax.data import builtin, read_source, write_dataset
from ranktuner_jax.data.storage import to_record
from ranktuner_jax.errors import UserError
from ranktuner_jax.files import cache_dir

ROWS = [{"prompt": f"{i} + {i}", "completion": str(2 * i)} for i in range(10)]


def prompts(source: str, split: str = "train", **options: Any) -> list[str]:
    return [record.fields["prompt"] for record in read_source(source, split, **options)]


@pytest.fixture
def parquet(tmp_path: pathlib.Path) -> str:
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    return str(path)


@pytest.fixture
def prepared(tmp_path: pathlib.Path) -> str:
    records = [
        to_record(
            [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["completion"], "weight": 0.5},
            ],
            row,
            weight=2.0,
        )
        for row in ROWS
    ]
    return str(
        write_dataset(tmp_path / "sums", {"train": records, "test": records[:3]}, name="sums")
    )


def test_every_kind_of_source_reads_the_same(
    write_jsonl: Callable[..., str], parquet: str, prepared: str
) -> None:
    expected = [row["prompt"] for row in ROWS]
    for source in (write_jsonl(*ROWS), parquet, prepared):
        assert prompts(source) == expected
        assert prompts(source, "train[:3]") == expected[:3]
        assert prompts(source, "train[-20%:]") == expected[8:]
        assert prompts(source, "train[8:]+train[:1]") == [*expected[8:], expected[0]]


def test_a_tfds_name_is_found_in_its_data_dir(prepared: str, tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "tfds" / "sums" / "1.0.0"
    folder.parent.mkdir(parents=True)
    pathlib.Path(prepared).rename(folder)
    for source in ("sums", "sums:1.0.0"):
        assert len(prompts(source, data_dir=str(tmp_path / "tfds"))) == 10
    assert len(prompts(str(folder.parent), "test")) == 3


def test_rows_name_their_origin(
    write_jsonl: Callable[..., str], parquet: str, prepared: str
) -> None:
    path = write_jsonl(ROWS[0], "", ROWS[1])
    assert [record.where for record in read_source(path)] == [f"{path}:1", f"{path}:3"]
    assert next(iter(read_source(parquet, "train[4:]"))).where == f"{parquet}:5"
    assert next(iter(read_source(prepared, "train[4:]"))).where == f"{prepared}[train]:5"


def test_a_prepared_row_keeps_messages_weights_and_its_own_columns(prepared: str) -> None:
    [record] = read_source(prepared, "test[1:2]")
    assert record.fields == {
        "prompt": "1 + 1",
        "completion": "2",
        "weight": 2.0,
        "messages": [
            {"role": "user", "content": "1 + 1", "weight": 1.0},
            {"role": "assistant", "content": "2", "weight": 0.5},
        ],
    }


def test_splits_in_files_of_their_own(write_jsonl: Callable[..., str], tmp_path: Any) -> None:
    write_jsonl(*ROWS[:2], name="sums_train.jsonl")
    write_jsonl(*ROWS[2:5], name="sums_test.jsonl")
    source = str(tmp_path / "sums_{split}.jsonl")
    assert prompts(source) == ["0 + 0", "1 + 1"]
    assert prompts(source, "test[1:]") == ["3 + 3", "4 + 4"]


def test_a_pattern_reads_its_files_in_order(write_jsonl: Callable[..., str], tmp_path: Any) -> None:
    for i in range(3):
        write_jsonl(ROWS[i], name=f"part-{i}.jsonl")
    assert prompts(str(tmp_path / "part-*.jsonl"), "train[1:]") == ["1 + 1", "2 + 2"]


def test_broken_lines_are_named_and_reading_continues(write_jsonl: Callable[..., str]) -> None:
    path = write_jsonl('{"prompt": ', ROWS[0], "[1]", b'{"prompt": "\xff"}', "[" * 100_000)
    errors = [(record.where, record.error) for record in read_source(path)]
    assert errors[0][0] == f"{path}:1"
    assert errors[0][1].startswith("broken JSON: Expecting value")
    assert errors[1] == (f"{path}:2", "")
    assert errors[2] == (f"{path}:3", "expected a JSON object, got list")
    assert errors[3][1].startswith("broken JSON: 'utf-8' codec")
    assert errors[4][1].startswith("broken JSON: maximum recursion")


def test_invalid_utf8_in_a_tfds_row_survives_until_it_is_reported(
    tmp_path: pathlib.Path,
) -> None:
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": b"\xff"},
        {"role": "assistant", "content": "4"},
    ]
    path = write_dataset(tmp_path / "bytes", {"train": [to_record(turns, {})]}, name="bytes")
    [record] = read_source(str(path))
    assert record.fields["messages"][0]["content"] == "\udcff"


# --- the hub ---


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The package `datasets`, reduced to the one call that is made."""
    calls: list[tuple[Any, ...]] = []

    def load_dataset(name: str, subset: str | None, split: str) -> list[dict[str, str]]:
        calls.append((name, subset, split))
        if name == "no/such":
            raise RuntimeError("Dataset 'no/such' doesn't exist on the Hub\nand more")
        return ROWS

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return calls


def test_a_hub_data_set_is_read_through_datasets(hub: list[tuple[Any, ...]]) -> None:
    assert prompts("hub:AI-MO/NuminaMath-CoT", "train[:10]") == [row["prompt"] for row in ROWS]
    assert prompts("hub:openai/gsm8k", subset="main")
    assert hub == [("AI-MO/NuminaMath-CoT", None, "train[:10]"), ("openai/gsm8k", "main", "train")]


def test_a_hub_data_set_that_does_not_load_is_named(hub: list[tuple[Any, ...]]) -> None:
    with pytest.raises(UserError, match=r"hub:no/such: could not load split 'train': .* the Hub$"):
        read_source("hub:no/such")


def test_without_datasets_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="expected the package datasets"):
        read_source("hub:a/b")


# --- built in ---


def test_no_held_out_sum_is_trained_on(cache: pathlib.Path) -> None:
    train = {record.fields["question"] for record in read_source("chain_sum", "train")}
    test = {record.fields["question"] for record in read_source("chain_sum", "test")}
    assert len(train) == 3871
    assert len(test) == 512
    assert not train & test
    assert cache.is_dir()


def test_no_template_of_the_held_out_word_problems_is_trained_on(cache: pathlib.Path) -> None:
    templates = {}
    for split in ("train", "test"):
        rows = [record.fields for record in read_source("gsm_symbolic", split)]
        templates[split] = {row["metadata"]["template"] for row in rows}
        assert len({row["question"] for row in rows}) == len(rows) > 900
        # The chain of thought, which says the answer.
        assert all(row["answer"] in row["messages"][-1]["content"] for row in rows)
    assert len(templates["train"]) > 60
    assert len(templates["test"]) > 15
    assert not templates["train"] & templates["test"]


def test_a_built_in_data_set_is_generated_once(
    cache: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = builtin.prepare_builtin("chain_sum")
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)  # To generate again would need it.
    assert builtin.prepare_builtin("chain_sum") == first


def test_without_reasoning_gym_the_package_is_named(
    cache: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(UserError, match="expected the package reasoning-gym"):
        read_source("chain_sum")


# --- writing ---


def test_a_write_that_fails_leaves_nothing(tmp_path: pathlib.Path) -> None:
    def records() -> Any:
        yield to_record([{"role": "user", "content": "hi"}], {})
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        write_dataset(tmp_path / "out" / "sums", {"train": records()}, name="sums")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_write_that_is_killed_leaves_no_data_set(tmp_path: pathlib.Path) -> None:
    code = f"""
import os, signal
from ranktuner_jax.data.storage import to_record, write_dataset
def records():
    yield to_record([{{"role": "user", "content": "hi"}}], {{}})
    os.kill(os.getpid(), signal.SIGKILL)
write_dataset({str(tmp_path / "sums")!r}, {{"train": records()}}, name="sums")
"""
    root = pathlib.Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == -9
    assert not (tmp_path / "sums").exists()
    record = to_record([{"role": "user", "content": "hi"}], {})
    write_dataset(tmp_path / "sums", {"train": [record]}, name="sums")
    assert len(list(read_source(str(tmp_path / "sums")))) == 1


def _write_slowly(path: str, barrier: Any) -> None:
    def records() -> Any:
        barrier.wait()  # both are in the middle of writing
        yield to_record([{"role": "user", "content": "hi"}], {})

    write_dataset(path, {"train": records()}, name="sums")


def test_two_processes_that_write_at_once_leave_one_whole_data_set(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(pathlib.Path(__file__).parents[2])  # For `_write_slowly` there.
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2, timeout=60)
    path = tmp_path / "sums"
    processes = [context.Process(target=_write_slowly, args=(str(path), barrier)) for _ in "ab"]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert len(list(read_source(str(path)))) == 1
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_replaced_is_an_error(tmp_path: pathlib.Path) -> None:
    (tmp_path / "sums").write_text("a file")
    record = to_record([{"role": "user", "content": "hi"}], {})
    with pytest.raises(OSError, match="sums"):
        write_dataset(tmp_path / "sums", {"train": [record]}, name="sums")


def test_the_cache_is_where_the_user_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("RANKTUNER_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.delenv("RANKTUNER_CACHE")
    assert cache_dir() == pathlib.Path.home() / ".cache" / "ranktuner_jax"


# --- mistakes ---


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "data.source: expected a name or a path, got nothing"),
        ("chain_some", "expected chain_sum, gsm_symbolic, .* got 'chain_some'; check the spelling"),
        ("no/such/rows.jsonl", "expected a file, got no/such/rows.jsonl, which does not exist"),
    ],
)
def test_a_source_that_is_not_there_is_the_users_mistake(source: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_source(source)


def test_a_split_that_is_not_there_lists_those_that_are(
    write_jsonl: Callable[..., str], prepared: str
) -> None:
    for split in ("validation", "train[", "train[x:]", "all[:3]"):
        with pytest.raises(UserError, match=r"expected one of \['test', 'train'\]"):
            read_source(prepared, split)
    with pytest.raises(UserError, match="is one file and has the one split 'train', got 'test'"):
        read_source(write_jsonl(*ROWS), "test")


def test_a_folder_without_a_data_set_is_the_users_mistake(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match=r"one dataset_info.json\), got .*, which holds 0"):
        read_source(str(tmp_path))


def test_a_file_that_is_no_parquet_is_the_users_mistake(tmp_path: pathlib.Path) -> None:
    (tmp_path / "rows.parquet").write_text("no")
    with pytest.raises(UserError, match="is not a Parquet file"):
        read_source(str(tmp_path / "rows.parquet"))


def test_a_data_set_without_random_access_says_how_to_get_it(prepared: str) -> None:
    info = pathlib.Path(prepared, "dataset_info.json")
    info.write_text(json.dumps({**json.loads(info.read_text()), "fileFormat": "tfrecord"}))
    with pytest.raises(UserError, match="has no random access"):
        read_source(prepared)
