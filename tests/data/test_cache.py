"""Tokens that are kept: the same as without, however a cache was broken, killed or shared."""

import dataclasses
import fcntl
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import pytest
from etils import epath
from hypothesis import given
from hypothesis import strategies as st

from ranktuner_jax.data import (
    BatchIterator,
    ChatEncoder,
    DataConfig,
    Rows,
    load_examples,
    load_rows,
    workers,
)
from ranktuner_jax.data import cache as cached
from ranktuner_jax.data.arrays import read_arrays, write_arrays
from ranktuner_jax.data.cache_builder import Builder
from ranktuner_jax.data.cache_files import part_path
from ranktuner_jax.data.checksums import combine
from ranktuner_jax.data.encode import Split
from ranktuner_jax.errors import RunError, UserError
from tests.buckets import bucket
from tests.train import processes

WriteJsonl = Callable[..., str]
Sums = Callable[..., list[dict[str, Any]]]


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cached, "_ROWS", 8)
    # Parts are made in this process.
    monkeypatch.setattr(workers, "_PARTS_PER_PROCESS", 1000)


@pytest.fixture
def folder(cache: pathlib.Path) -> pathlib.Path:
    """Where tokens are kept."""
    return cache / "tokens"


def contents(rows: Rows) -> list[list[list[float]]]:
    """All that a row holds, of every row."""
    return [
        [np.asarray(leaf).tolist() for leaf in jax.tree.leaves(rows[i])] for i in range(len(rows))
    ]


def same(rows: Rows, expected: Rows) -> bool:
    counts = [dataclasses.asdict(one.summary) for one in (rows, expected)]
    lengths = [count.pop("lengths").tolist() for count in counts]
    return (
        (rows.fingerprint, rows.sources, rows.largest_id)
        == (expected.fingerprint, expected.sources, expected.largest_id)
        and contents(rows) == contents(expected)
        and counts[0] == counts[1]
        and lengths[0] == lengths[1]
    )


def parts(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(folder.glob("*/0*.arrow"))


CONFIGS: dict[str, dict[str, Any]] = {
    "packed": {},
    "padded": {"packing": False},
    "cut off": {"row_length": 40, "too_long": "truncate"},
    "dropped": {"row_length": 40, "too_long": "drop"},
    "held out": {"holdout": 0.2},
    "a slice of the rows": {"split": "train[7:31]"},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_rows_from_a_cache_are_those_of_the_source(
    folder: pathlib.Path, write_jsonl: WriteJsonl, sums: Sums, tokenizer: Any, name: str
) -> None:
    path = write_jsonl(*sums(20), "{", "", *sums(17, seed=1), '{"prompt": ""}')
    options = {"row_length": 256, "on_bad_row": "skip", **CONFIGS[name]}
    expected = load_rows(DataConfig(path, **options, cache="never"), tokenizer)
    assert not folder.exists()
    config = DataConfig(path, **options, cache="always")
    assert same(load_rows(config, tokenizer), expected)
    written = {file: file.stat().st_mtime_ns for file in folder.glob("*/*")}
    assert len(parts(folder)) == (3 if "split" in options else 5)
    assert same(load_rows(config, tokenizer), expected)
    assert {file: file.stat().st_mtime_ns for file in folder.glob("*/*")} == written


def test_the_held_out_rows_have_a_cache_of_their_own(
    folder: pathlib.Path, path: str, tokenizer: Any
) -> None:
    config = DataConfig(path, row_length=256, holdout=0.2, cache="always")
    rows, held_out = (load_rows(config, tokenizer, split=name) for name in ("train", "holdout"))
    plain = dataclasses.replace(config, cache="never")
    assert same(rows, load_rows(plain, tokenizer))
    assert same(held_out, load_rows(plain, tokenizer, split="holdout"))
    assert len(list(folder.glob("*/cache.json"))) == 2


def test_which_rows_are_held_out_is_kept(folder: pathlib.Path, path: str, tokenizer: Any) -> None:
    config = DataConfig(path, row_length=256, holdout=0.2, cache="always")
    expected = load_examples(dataclasses.replace(config, cache="never"), tokenizer, split="holdout")
    load_rows(config, tokenizer)
    [kept] = folder.glob("held-out-*.arrow")
    rows = read_arrays(kept)["rows"]
    assert [example.row["id"] for example in expected] == rows.tolist()
    assert load_examples(config, tokenizer, split="holdout") == expected
    write_arrays(kept, {"rows": rows[:3]})  # It is what is read.
    assert load_examples(config, tokenizer, split="holdout") == expected[:3]
    kept.write_bytes(b"")
    assert load_examples(config, tokenizer, split="holdout") == expected


def test_a_warm_start_does_not_read_the_source(
    folder: pathlib.Path, path: str, tokenizer: Any
) -> None:
    config = DataConfig(path, row_length=256, cache="always")
    expected = load_rows(config, tokenizer)
    before = os.stat(path)
    pathlib.Path(path).write_bytes(b"x" * before.st_size)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert same(load_rows(config, tokenizer), expected)


def test_small_sources_and_limited_ones_are_not_kept(
    folder: pathlib.Path, path: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_rows(DataConfig(path, row_length=256), tokenizer)
    load_rows(DataConfig(path, row_length=256, cache="always"), tokenizer, limit=10)
    assert not folder.exists()
    monkeypatch.setattr(cached, "_LARGE", os.path.getsize(path))
    load_rows(DataConfig(path, row_length=256), tokenizer)
    assert parts(folder)


def test_a_cache_is_kept_in_the_folder_that_the_config_names(
    folder: pathlib.Path, path: str, tokenizer: Any, tmp_path: pathlib.Path
) -> None:
    load_rows(DataConfig(path, row_length=256, cache=str(tmp_path / "here")), tokenizer)
    assert parts(tmp_path / "here")
    assert not folder.exists()


def test_a_mixture_names_the_source_of_each_row(
    folder: pathlib.Path, write_jsonl: WriteJsonl, sums: Sums, tokenizer: Any
) -> None:
    small = write_jsonl(*sums(10), name="small.jsonl")
    large = write_jsonl(*sums(30, seed=1), name="large.jsonl")
    config = DataConfig(mixture=((small, 3.0), (large, 1.0)), row_length=256, cache="always")
    expected = load_rows(dataclasses.replace(config, cache="never"), tokenizer)
    for _ in range(2):
        rows = load_rows(config, tokenizer)
        assert same(rows, expected)
        alone = load_rows(DataConfig(small, row_length=256, cache="always"), tokenizer)
        assert [rows.source(i) for i in range(len(rows))] == [small] * len(alone) + [large] * (
            len(rows) - len(alone)
        )
        batches = BatchIterator(rows, batch_size=4)
        names = [rows.source(int(i)) for _ in range(10) for i in next(batches).row_index]
        assert names.count(small) == 30
    assert len(list(folder.iterdir())) == 2


# --- what decides the tokens ---


def change(name: str, config: DataConfig, tokenizer: Any, make: Any, templates: Any) -> Any:
    """The config and the tokenizer after a change."""
    if name == "source":
        with open(config.source, "a") as file:
            file.write('{"prompt": "2", "completion": "4"}\n')
    elif name == "tokenizer":
        tokenizer = make("qwen", tokenizer.chat_template)
    elif name == "chat template":
        tokenizer = make("smollm2", templates["qwen25"])
    else:
        config = dataclasses.replace(config, row_length=300, system="Add.")
    return config, tokenizer


@pytest.mark.parametrize(
    ("what", "line"),
    [
        ("source", "source"),
        ("tokenizer", "tokenizer"),
        ("chat template", "chat template"),
        ("options", "data.system and data.row_length"),
    ],
)
def test_a_change_makes_a_new_cache_and_is_named(
    folder: pathlib.Path,
    path: str,
    tokenizer: Any,
    make_tokenizer: Any,
    templates: Any,
    capsys: pytest.CaptureFixture[str],
    what: str,
    line: str,
) -> None:
    config = DataConfig(path, row_length=256, cache="always")
    load_rows(config, tokenizer)
    assert "changed" not in capsys.readouterr().err
    config, tokenizer = change(what, config, tokenizer, make_tokenizer, templates)
    rows = load_rows(config, tokenizer)
    assert f"data cache: {path}: {line} changed; building anew\n" in capsys.readouterr().err
    assert same(rows, load_rows(dataclasses.replace(config, cache="never"), tokenizer))
    assert len(list(folder.iterdir())) == 2


def test_a_file_with_the_same_bytes_is_not_tokenized_again(
    folder: pathlib.Path, path: str, tokenizer: Any, tmp_path: pathlib.Path
) -> None:
    config = DataConfig(path, row_length=256, cache="always")
    load_rows(config, tokenizer)
    os.utime(path)
    load_rows(config, tokenizer)
    moved = shutil.copy(path, tmp_path / "moved.jsonl")
    load_rows(dataclasses.replace(config, source=str(moved)), tokenizer)
    assert len(list(folder.iterdir())) == 1


def test_a_source_that_changes_while_it_is_tokenized_is_refused(
    folder: pathlib.Path, path: str, tokenizer: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    split = Split(DataConfig(path, row_length=256, cache="always"), path, "train")
    cache = cached._Cache(split, ChatEncoder(tokenizer), tokenizer)
    with open(path, "a") as file:
        file.write('{"prompt": "2", "completion": "4"}\n')
    with pytest.raises(UserError, match="changed while it was tokenized; run again"):
        cache.load()
    assert not list(folder.glob("*/cache.json"))


# --- broken files ---


def flip(path: pathlib.Path, at: float) -> None:
    """Changes a bit of a file, at a fraction of its size."""
    content = bytearray(path.read_bytes())
    content[int(at * (len(content) - 1))] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("at", [0.0, 0.01, 0.2, 0.35, 0.5, 0.7, 0.8, 0.9, 0.97, 1.0])
@pytest.mark.parametrize(
    "name", ["000002.arrow", "index.arrow", "cache.json", "rows-subset_sum-0.arrow"]
)
def test_a_wrong_bit_is_never_trained_on(
    folder: pathlib.Path, path: str, tokenizer: Any, name: str, at: float
) -> None:
    config = DataConfig(path, row_length=256, cache="always")
    expected = load_rows(config, tokenizer)
    wanted = contents(expected)
    [file] = folder.glob(f"*/{name}")
    flip(file, at)
    rows = load_rows(config, tokenizer)
    assert contents(rows) == wanted
    assert rows.fingerprint == expected.fingerprint


@pytest.mark.parametrize("kept", [0, 1, 100, 0.5, -1])
def test_a_part_that_is_cut_short_is_set_aside_and_made_anew(
    folder: pathlib.Path,
    path: str,
    tokenizer: Any,
    kept: float,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = DataConfig(path, row_length=256, cache="always")
    expected = load_rows(config, tokenizer)
    part = parts(folder)[2]
    good = part.read_bytes()
    for unfinished in (False, True):
        size = len(good)
        cut = int(kept * size) if isinstance(kept, float) else kept % size if kept < 0 else kept
        # As a new file: the old one is mapped.
        part.unlink()
        part.write_bytes(good[:cut])
        if unfinished:  # As a disk may be after a power cut.
            (part.parent / "cache.json").unlink()
        capsys.readouterr()
        assert same(load_rows(config, tokenizer), expected)
        assert part.read_bytes() == good
        aside = f"data cache: {part} is broken; set aside as 000002.arrow.broken, and made anew\n"
        assert capsys.readouterr().err.count(aside) == 1
        assert part.with_name("000002.arrow.broken").stat().st_size == cut


def test_a_missing_part_is_made_again(folder: pathlib.Path, path: str, tokenizer: Any) -> None:
    config = DataConfig(path, row_length=256, cache="always")
    expected = load_rows(config, tokenizer)
    parts(folder)[1].unlink()
    assert same(load_rows(config, tokenizer), expected)


def test_a_broken_part_of_a_source_that_changed_since_stops_the_run(
    folder: pathlib.Path, path: str, tokenizer: Any
) -> None:
    config = DataConfig(path, row_length=256, cache="always")
    load_rows(config, tokenizer)
    rows = load_rows(config, tokenizer)
    part = parts(folder)[0]
    part.write_bytes(b"")
    pathlib.Path(path).write_text('{"prompt": "2", "completion": "4"}\n' * 40)
    with pytest.raises(RunError, match="the source has changed since it was written"):
        rows.take(range(len(rows)))


# --- several processes ---


def test_a_part_is_written_by_one_process_and_waited_for_by_others(
    path: str, tokenizer: Any, tmp_path: pathlib.Path
) -> None:
    split = Split(DataConfig(path, row_length=256), path, "train")
    builder = Builder(split, ChatEncoder(tokenizer), epath.Path(tmp_path / "new"), 8)
    part = tmp_path / "new" / "000001.arrow"
    part.parent.mkdir()
    with open(f"{part}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert not builder.build(1, wait=False)
        assert not part.exists()
        assert builder.build(2, wait=False)
    assert builder.build(1, wait=True)
    written = part.stat().st_mtime_ns
    assert builder.build(1, wait=False)
    assert part.stat().st_mtime_ns == written


def test_processes_make_what_one_makes_and_name_the_first_bad_row(
    folder: pathlib.Path,
    write_jsonl: WriteJsonl,
    sums: Sums,
    tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(workers, "_PARTS_PER_PROCESS", 1)
    monkeypatch.setattr(workers, "_cores", lambda: 2)
    special = {"prompt": "<|im_end|>", "completion": "4"}
    path = write_jsonl(*sums(35), special, *sums(35, seed=1), special)
    config = DataConfig(path, row_length=256, cache="always", holdout=0.1)
    with pytest.raises(UserError, match=f"^{path}:36: .* special token"):
        load_rows(config, tokenizer)
    made = parts(folder)
    assert [part.name for part in made[:4]] == [f"{k:06d}.arrow" for k in range(4)]
    split = Split(config, path, "train")
    alone = epath.Path(folder / "alone")
    builder = Builder(split, ChatEncoder(tokenizer), alone, 8)
    for number, part in enumerate(made[:4]):
        assert builder.build(number, wait=True)
        assert part_path(alone, number).read_bytes() == part.read_bytes()


DRILL = """
import glob, os, signal, sys, time
from ranktuner_jax.data import DataConfig, cache, load_rows, load_tokenizer, workers
cache._ROWS, workers._PARTS_PER_PROCESS = 4, 1000
_, model, path, folder = sys.argv
tokenizer = load_tokenizer(model)

def start(name):
    child = os.fork()
    if not child:
        config = DataConfig(path, row_length=256, cache=f"{folder}/{name}")
        rows = load_rows(config, tokenizer)
        rows.take(range(len(rows)))
        os.write(1, f"{name} {rows.fingerprint}\\n".encode())  # In one piece.
        os._exit(0)
    return child

os.waitpid(start("unbroken"), 0)
for i in range(8):
    child = start("killed")
    while len(glob.glob(f"{folder}/killed/*/0*.arrow")) < 200 * (i + 1) / 9:
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    finished = glob.glob(f"{folder}/killed/*/cache.json")
    print("killed", "finished" if finished else "early", flush=True)
    if finished:
        break
os.waitpid(start("killed"), 0)
for child in [start("together"), start("together"), start("together")]:
    os.waitpid(child, 0)
"""


def test_killed_builders_and_those_that_build_together_leave_the_same_bits(
    write_jsonl: WriteJsonl, sums: Sums, tokenizer: Any, tmp_path: pathlib.Path
) -> None:
    path = write_jsonl(*sums(800))
    tokenizer.save_pretrained(tmp_path / "model")
    result = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            "-c",
            DRILL,
            *map(str, (tmp_path / "model", path, tmp_path)),
        ],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"TOKENIZERS_PARALLELISM": "false"},
    )
    lines = [line.split() for line in result.stdout.splitlines()]
    done = [line for line in lines if line[1].isdigit()]
    assert sum(line == ["killed", "early"] for line in lines) >= 3
    assert len({fingerprint for _, fingerprint in done}) == 1
    assert {name for name, _ in done} == {"unbroken", "killed", "together"}
    whole = [file.read_bytes() for file in parts(tmp_path / "unbroken")]
    assert len(whole) == 200
    for name in ("killed", "together"):
        assert [file.read_bytes() for file in parts(tmp_path / name)] == whole
        [left] = (tmp_path / name).iterdir()
        others = {file.name for file in left.iterdir()} - {file.name for file in parts(left.parent)}
        assert others == {"cache.json", "index.arrow", "rows-subset_sum-0.arrow"}


RUN = """
import os, signal, sys, time
from pathlib import Path
import jax
_, address, process = sys.argv
jax.distributed.initialize(address, 2, int(process))
from ranktuner_jax.data import DataConfig, cache as cached, load_rows, load_tokenizer, workers
from ranktuner_jax.data.cache_builder import Builder
cached._ROWS, workers._PARTS_PER_PROCESS = 8, 1000
write, made, beside = Builder._write, [], Path(cache)

def note(builder, part, number):
    if process == "1" and len(made) == 3:  # In the middle of its fourth part.
        part.with_name(f"{part.name}.partial-1").write_bytes(b"half")
        (beside / "killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    while process == "0" and len(made) == 3 and not (beside / "killed").exists():
        time.sleep(0.01)
    write(builder, part, number)
    made.append(number)

Builder._write = note
rows = load_rows(DataConfig(path, row_length=256, cache=cache), load_tokenizer(model))
rows.take(range(len(rows)))
print(*made, rows.fingerprint, flush=True)
os._exit(0)  # Not waiting for the other process.
"""


def test_of_two_processes_of_a_run_each_makes_its_share_and_one_goes_on_when_the_other_dies(
    write_jsonl: WriteJsonl, sums: Sums, tokenizer: Any, tmp_path: pathlib.Path
) -> None:
    path = write_jsonl(*sums(80))
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "cache").mkdir()
    names = (
        f"model, path, cache = {str(tmp_path / 'model')!r}, {path!r}, {str(tmp_path / 'cache')!r}"
    )
    started = processes.start_script(names + RUN)
    output = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [0, -signal.SIGKILL]
    *made, fingerprint = map(int, output[0].split())
    # Its own five parts, and then those that the other has not made.
    assert (made[:5], sorted(made[5:])) == ([0, 2, 4, 6, 8], [7, 9])
    config = DataConfig(path, row_length=256, cache=str(tmp_path / "cache"))
    expected = load_rows(dataclasses.replace(config, cache="never"), tokenizer)
    assert fingerprint == expected.fingerprint
    written = [part.stat().st_mtime_ns for part in parts(tmp_path / "cache")]
    assert same(load_rows(config, tokenizer), expected)
    assert [part.stat().st_mtime_ns for part in parts(tmp_path / "cache")] == written
    assert not list((tmp_path / "cache").glob("*/*partial*"))


# --- on an object store ---


@pytest.fixture
def written(tmp_path: pathlib.Path) -> Iterator[list[str]]:
    (tmp_path / "bucket").mkdir()
    with bucket(tmp_path) as names:
        yield names


def test_a_cache_on_an_object_store_is_read_through_copies(
    cache: pathlib.Path, path: str, tokenizer: Any, written: list[str], tmp_path: pathlib.Path
) -> None:
    config = DataConfig(path, row_length=256, cache="gs://bucket/tokens")
    expected = load_rows(dataclasses.replace(config, cache="never"), tokenizer)
    assert same(load_rows(config, tokenizer), expected)
    assert len(written) == len(set(written)) == 8
    assert not list(cache.glob("tokens"))
    # Another machine has no copies yet, and fetches what it reads.
    shutil.rmtree(cache)
    rows = load_rows(config, tokenizer)
    copies = cache / "fetched"
    assert {file.name for file in copies.glob("*/*")} == {"index.arrow", "rows-subset_sum-0.arrow"}
    rows.conversation(10)
    assert {file.name for file in copies.glob("*/0*")} == {"000001.arrow"}
    assert same(rows, expected)
    assert len(written) == 8


@pytest.mark.parametrize("name", ["000003.arrow", "index.arrow", "rows-subset_sum-0.arrow"])
@pytest.mark.parametrize("where", ["copy", "object"])
def test_a_broken_copy_is_fetched_and_a_broken_object_made_again(
    cache: pathlib.Path,
    path: str,
    tokenizer: Any,
    written: list[str],
    tmp_path: pathlib.Path,
    where: str,
    name: str,
) -> None:
    config = DataConfig(path, row_length=256, cache="gs://bucket/tokens")
    expected = load_rows(config, tokenizer)
    wanted = contents(expected)
    load_rows(config, tokenizer)  # Which copies all that it reads.
    [copy] = cache.glob(f"fetched/*/{name}")
    [file] = tmp_path.glob(f"bucket/tokens/*/{name}")
    good = file.read_bytes()
    if where == "copy":
        flip(copy, 0.5)
    else:
        flip(file, 0.5)
        copy.unlink()
    assert contents(load_rows(config, tokenizer)) == wanted
    assert (len(written) == 8) == (where == "copy")
    assert file.read_bytes() == good
    assert len(list(file.parent.glob("*.broken"))) == (where == "object")
    load_rows(config, tokenizer).take([0])
    assert not copy.exists() or copy.read_bytes() == good


# --- checksums ---


@given(st.binary(), st.binary())
def test_the_checksum_of_two_texts_follows_from_that_of_each(first: bytes, second: bytes) -> None:
    expected = zlib.crc32(first + second)
    assert combine(zlib.crc32(first), zlib.crc32(second), len(second)) == expected


def test_the_fingerprint_is_that_of_all_bytes(
    folder: pathlib.Path, path: str, tokenizer: Any
) -> None:
    rows = load_rows(DataConfig(path, row_length=256, packing=False, cache="always"), tokenizer)
    chats = [rows.conversation(i) for i in range(40)]
    content = b"".join(chat.tokens.tobytes() for chat in chats)
    content += b"".join(chat.weights.tobytes() for chat in chats)
    content += np.arange(40, dtype=np.int64).tobytes()
    assert rows.fingerprint == zlib.crc32(content + repr((256, [(40, 1.0)])).encode())
