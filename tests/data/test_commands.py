"""`ranktuner data prepare`, `data inspect` and `bench data`, as they are called."""

import argparse
import json
import os
import pathlib
import re
import types
from collections.abc import Callable
from typing import Any

import huggingface_hub
import pytest
from rich.console import Console

from ranktuner_jax.bench import data as bench
from ranktuner_jax.data import DataConfig, load_rows, read_source
from ranktuner_jax.data.inspect import show_rows
from ranktuner_jax.errors import UserError
from ranktuner_jax.train.commands import data_inspect as inspect
from ranktuner_jax.train.commands import data_prepare as prepare

GSM8K = [
    {"question": "Half of 48?", "answer": "It is 48/2 = <<48/2=24>>24.\n#### 24"},
    {"question": "24 + 24?", "answer": "It is 24+24 = <<24+24=48>>48.\n#### 48"},
]


def call(module: types.ModuleType, *arguments: str) -> int:
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    args, overrides = parser.parse_known_args(arguments)
    args.overrides = overrides
    code: int = module.run(args)
    return code


@pytest.fixture
def folder(tokenizer: Any, tmp_path: pathlib.Path) -> str:
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


# --- prepare ---


def test_prepare_writes_what_training_reads(
    write_jsonl: Callable[..., str],
    tmp_path: pathlib.Path,
    tokenizer: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = write_jsonl(*GSM8K * 10)
    output = str(tmp_path / "data sets" / "GSM-8K")
    splits = ("--split=train=train[2:]", "--split=test=train[:2]")
    code = call(
        prepare,
        f"--config.data.source={source}",
        f"--output={output}",
        *splits,
        "--config.data.strip_calculator_marks=true",
    )
    assert code == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[:2] == ["train: 18 of 18 conversations", "test: 2 of 2 conversations"]
    assert printed[2] == f"train on it with --config.data.source='{output}'"

    [first, _] = read_source(output, "test")
    assert first.fields["messages"][1]["content"] == "It is 48/2 = 24.\n#### 24"
    assert {key: first.fields[key] for key in GSM8K[0]} == GSM8K[0]
    config = DataConfig(source, "train[2:]", strip_calculator_marks=True, row_length=128)
    direct = load_rows(config, tokenizer)
    prepared = load_rows(DataConfig(output, row_length=128), tokenizer)
    assert prepared.fingerprint == direct.fingerprint


def test_prepare_keeps_weights(write_jsonl: Callable[..., str], tmp_path: pathlib.Path) -> None:
    turns = [{"role": "user", "content": "2 + 2"}, {"role": "assistant", "content": "4"}]
    source = write_jsonl({"messages": [*turns, turns[0], {**turns[1], "weight": 0.5}], "weight": 4})
    call(prepare, f"--config.data.source={source}", f"--output={tmp_path / 'out'}")
    [record] = read_source(str(tmp_path / "out"))
    assert [turn["weight"] for turn in record.fields["messages"]] == [0.0, 4.0, 0.0, 2.0]
    assert record.fields["weight"] == 1.0


CALLS: dict[str, Any] = {
    "messages": [
        {"role": "user", "content": "12 + 30?"},
        {
            "role": "assistant",
            "content": None,
            "reasoning": "I can add.",
            "tool_calls": [{"name": "add", "arguments": '{"a": 12, "b": 30}'}],
            "train": False,
        },
        {"role": "tool", "content": "42", "tool_call_id": "c1"},
        {"role": "assistant", "content": "It is 42.", "thinking": "Done."},
        {"role": "user", "content": "Half of 48?"},
        {"role": "assistant", "content": "24.", "tool_calls": []},
    ],
    "tools": '[{"name": "add", "parameters": {}}]',
    "train": True,
}


def test_prepare_keeps_tools_calls_and_reasoning(
    write_jsonl: Callable[..., str], tmp_path: pathlib.Path, shipped: Callable[[str], Any]
) -> None:
    source = write_jsonl(CALLS, *GSM8K)
    call(prepare, f"--config.data.source={source}", f"--output={tmp_path / 'out'}")
    direct, prepared = (
        load_rows(DataConfig(str(path), row_length=1024, packing=False), shipped("qwen3"))
        for path in (source, tmp_path / "out")
    )
    assert len(direct) == len(prepared) == 4
    assert prepared.fingerprint == direct.fingerprint


def test_prepare_counts_what_it_leaves_out(
    write_jsonl: Callable[..., str], tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_jsonl(*GSM8K, "{", {"question": "?", "answer": ""})
    arguments = (f"--config.data.source={source}", f"--output={tmp_path / 'out'}")
    with pytest.raises(UserError, match=f"{source}:3: broken JSON"):
        call(prepare, *arguments)
    assert not (tmp_path / "out").exists()
    call(prepare, *arguments, "--config.data.on_bad_row=skip")
    printed = capsys.readouterr().out
    assert "train: 2 of 4 conversations, 2 bad and skipped\n  1 × broken JSON" in printed


def test_prepare_overwrites_nothing(write_jsonl: Callable[..., str], tmp_path: Any) -> None:
    with pytest.raises(UserError, match="--output: expected a folder that does not exist, got"):
        call(prepare, f"--config.data.source={write_jsonl(*GSM8K)}", f"--output={tmp_path}")


def test_prepare_refuses_an_empty_split(write_jsonl: Callable[..., str], tmp_path: Any) -> None:
    with pytest.raises(UserError, match=r"nothing to write of .*, split train\[:0\]"):
        call(
            prepare,
            f"--config.data.source={write_jsonl(*GSM8K)}",
            f"--output={tmp_path / 'out'}",
            "--split=train=train[:0]",
        )
    assert not (tmp_path / "out").exists()


def test_prepare_asks_for_the_name_of_a_slice(
    write_jsonl: Callable[..., str], tmp_path: Any
) -> None:
    with pytest.raises(UserError, match=r"expected a name, or NAME=SLICE, got 'train\[:5\]'"):
        call(
            prepare,
            f"--config.data.source={write_jsonl(*GSM8K)}",
            f"--output={tmp_path / 'out'}",
            "--split=train[:5]",
        )


@pytest.mark.parametrize(
    ("output", "reason"),
    [("rows.jsonl/out", "File exists"), ("rows.jsonl/below/out", "Not a directory")],
)
def test_prepare_names_the_folder_that_it_cannot_write_to(
    write_jsonl: Callable[..., str], tmp_path: pathlib.Path, output: str, reason: str
) -> None:
    folder = re.escape(str((tmp_path / output).parent))
    with pytest.raises(UserError, match=f"--output: cannot write to {folder}: {reason}"):
        call(
            prepare, f"--config.data.source={write_jsonl(*GSM8K)}", f"--output={tmp_path / output}"
        )


def test_prepare_names_the_folder_that_it_may_not_write_to(
    write_jsonl: Callable[..., str], tmp_path: pathlib.Path
) -> None:
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o555)
    if os.access(folder, os.W_OK):
        pytest.skip("permissions do not bind this user")
    with pytest.raises(UserError, match=r"--output: cannot write to .*locked: Permission denied"):
        call(prepare, f"--config.data.source={write_jsonl(*GSM8K)}", f"--output={folder / 'out'}")


def test_prepare_without_an_output_keeps_the_tokens_that_training_reads(
    write_jsonl: Callable[..., str],
    folder: str,
    tokenizer: Any,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = write_jsonl(*GSM8K * 5, {"question": "1 + 1?", "answer": "2"})
    keys = (
        f"--config.model={folder}",
        f"--config.data.source={source}",
        "--config.data.row_length=128",
        "--config.data.holdout=0.4",
        "--config.data.too_long=drop",
    )
    assert call(prepare, *keys, f"--config.data.cache={tmp_path / 'kept'}") == 0
    printed = capsys.readouterr()
    shown = re.findall(r"^(\w+): ([\d,]+) conversations", printed.out, re.MULTILINE)
    assert [name for name, _ in shown] == ["train", "holdout"]
    assert sum(int(count) for _, count in shown) == 11
    assert "tokenized at each start" not in printed.out
    config = DataConfig(
        source, row_length=128, holdout=0.4, too_long="drop", cache=str(tmp_path / "kept")
    )
    for split in ("train", "holdout"):
        load_rows(config, tokenizer, split=split)
    assert capsys.readouterr().err == ""
    assert len(list(tmp_path.glob("kept/*/cache.json"))) == 2


def test_prepare_says_which_sources_are_too_small_to_be_kept(
    write_jsonl: Callable[..., str], folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_jsonl(*GSM8K)
    keys = (f"--config.model={folder}", f"--config.data.source={source}")
    assert call(prepare, *keys) == 0
    assert f"train: {source} is tokenized at each start" in capsys.readouterr().out
    with pytest.raises(UserError, match="--split: expected --output with it, got 'test' alone"):
        call(prepare, *keys, "--split=test")


# --- inspect ---


def test_inspect_marks_what_is_supervised(
    write_jsonl: Callable[..., str], folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_jsonl(
        *GSM8K, {"question": "?", "answer": ""}, {"question": "9" * 999, "answer": "1"}
    )
    code = call(
        inspect,
        f"--config.data.source={source}",
        f"--config.model={folder}",
        "--config.data.row_length=128",
        "--rows=1",
        "--config.data.on_bad_row=skip",
        "--config.data.too_long=drop",
        "--config.data.holdout=0",
        "--config.eval.split=test",
    )
    assert code == 0
    printed = capsys.readouterr().out
    assert "row 0, conversation 1" in printed
    assert "<|im_start|>assistant\n⟦It is 48/2 = <<48/2=24>>24.\n#### 24<|im_end|>⟧" in printed
    counts = {
        line.rsplit(maxsplit=1)[0].strip(): line.split()[-1]
        for line in printed.splitlines()
        if len(line.split()) > 1
    }
    assert counts["conversations read"] == "4"
    assert counts["samples kept"] == "2"
    assert counts["too long and dropped"] == "1"
    assert counts["bad and skipped"] == "1"
    assert counts["message 2: the assistant's answer is empty"] == "1"
    assert "█" in printed


def test_inspect_shows_tools_and_marks_reasoning_and_calls(
    write_jsonl: Callable[..., str],
    tmp_path: pathlib.Path,
    shipped: Callable[[str], Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    shipped("qwen3").save_pretrained(tmp_path / "qwen3")
    # A later question would hide what was thought before it.
    turns: list[dict[str, Any]] = [{**turn, "train": True} for turn in CALLS["messages"][:4]]
    code = call(
        inspect,
        f"--config.data.source={write_jsonl({**CALLS, 'messages': turns})}",
        f"--config.model={tmp_path / 'qwen3'}",
        "--config.data.row_length=2048",
        "--config.data.holdout=0",
        "--config.eval.split=test",
    )
    assert code == 0
    printed = capsys.readouterr().out
    assert '<tools>\n{"type": "function", "function": {"name": "add", "parameters": {}}}' in printed
    assert (
        "assistant\n⟦<think>\nI can add.\n</think>\n\n<tool_call>\n"
        '{"name": "add", "arguments": {"a": 12, "b": 30}}\n</tool_call><|im_end|>⟧\n'
        "<|im_start|>user\n<tool_response>\n42\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n⟦<think>\nDone.\n</think>\n\nIt is 42.<|im_end|>⟧"
    ) in printed


def test_inspect_colours_what_is_supervised(
    write_jsonl: Callable[..., str], tokenizer: Any
) -> None:
    rows = load_rows(DataConfig(write_jsonl(GSM8K[0]), row_length=128), tokenizer)
    console = Console(force_terminal=True, color_system="standard", width=100, record=True)
    with console.capture() as captured:
        show_rows(console, rows, tokenizer, 1)
    shown = captured.get()
    assert "\x1b[32mIt is 48/2" in shown
    assert "⟦" not in shown


def test_inspect_resolves_a_model_as_training_does(
    write_jsonl: Callable[..., str],
    cache: pathlib.Path,
    tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hub = tokenizer.save_pretrained(cache / "models" / "smollm2-135m")
    source = f"--config.data.source={write_jsonl(*GSM8K)}"
    assert call(inspect, source) == 0
    folder = str(pathlib.Path(hub[0]).parent)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **options: folder)
    assert call(inspect, source, "--config.model=owner/name") == 0
    with pytest.raises(UserError, match="model 'none': no such folder; give a Hugging Face folder"):
        call(inspect, source, "--config.model=none")


def test_inspect_shows_training_rows_and_counts_those_held_out(
    write_jsonl: Callable[..., str], folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = f"--config.data.source={write_jsonl(*GSM8K)}"
    assert call(inspect, source, f"--config.model={folder}", "--rows=9") == 0
    printed = capsys.readouterr().out
    assert ("Half of 48?" in printed) != ("24 + 24?" in printed)
    assert re.search(r"held out +1 *\n", printed)


def test_data_cannot_control_the_terminal(write_jsonl: Callable[..., str], tokenizer: Any) -> None:
    row = {"prompt": "\x1b[2J", "completion": "\x1b]0;title\x07"}
    rows = load_rows(DataConfig(write_jsonl(row), row_length=128), tokenizer)
    console = Console(force_terminal=True, color_system=None, width=100)
    with console.capture() as captured:
        show_rows(console, rows, tokenizer, 1)
    assert "\x1b" not in captured.get()
    assert "⟦\\x1b]0;title\\x07<|im_end|>⟧" in captured.get()


# --- bench ---


def test_bench_measures_the_pipeline(
    write_jsonl: Callable[..., str], folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_jsonl(*GSM8K * 20)
    assert (
        call(
            bench,
            f"--config.data.source={source}",
            f"--config.model={folder}",
            "--config.data.row_length=128",
            "--cores=1",
        )
        == 0
    )
    printed = capsys.readouterr().out
    assert json.dumps(40) in printed
    assert "tokenize and pack" in printed
    [cold, warm] = (
        re.search(rf"{name} +1 +([\d.]+) s +[\d,]+ +-?([\d.]+) GB", printed)
        for name in ("cold", "warm")
    )
    assert cold
    assert warm
    with pytest.raises(UserError, match=r"--cores: expected numbers from 1 to \d+, got \[0\]"):
        call(bench, f"--config.data.source={source}", "--cores", "0")
    result = bench.measure(DataConfig(source, row_length=128), folder, batch_size=4)
    assert result.conversations == 40
    assert 0 < result.fill <= 1
    assert result.prepare_seconds > 0
    assert result.batch_seconds > 0
