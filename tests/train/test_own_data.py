"""The commands of docs/start.md for training on your own rows, run as written."""

import json
import os
import pathlib
import re
import subprocess
import sys
from typing import Any

import pytest

from ranktuner_jax import cli

ROOT = pathlib.Path(__file__).parents[2]
[COMMANDS] = [
    block
    for block in re.findall(r"```bash\n(.*?)```", (ROOT / "docs/start.md").read_text(), re.DOTALL)
    if "path/to/rows.jsonl" in block
]

ROWS: dict[str, list[dict[str, Any]]] = {
    # Chats without reference answers; two rows with each prompt.
    "turns": [
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": f"Name thing {i // 2}."},
                {"role": "assistant", "content": f"Thing {i}." * (1 + 99 * (i == 5))},
                {"role": "user", "content": "Thanks."},
                {"role": "assistant", "content": "Any time."},
            ]
        }
        for i in range(60)
    ],
    # So few and short that packed rows would not fill a batch.
    "answers": [
        {"question": f"Which colour has {i}?", "answer": ("red", "blue")[i % 2], "id": i}
        for i in range(20)
    ],
}


def run(commands: str, folder: pathlib.Path) -> subprocess.CompletedProcess[str]:
    launcher = folder / ".venv" / "bin" / "ranktuner"
    launcher.parent.mkdir(parents=True)
    launcher.write_text(f'#!/bin/sh\nexec {sys.executable} -m ranktuner_jax.cli "$@"\n')
    launcher.chmod(0o755)
    env = os.environ | {"RANKTUNER_CACHE": str(folder / "cache")}
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("kind", ["answers", pytest.param("turns", marks=pytest.mark.drill)])
def test_the_pages_commands_train_on_any_rows(
    kind: str, tiny_model: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    folder = tmp_path / "path" / "to"
    folder.mkdir(parents=True)
    (folder / "checkpoint").symlink_to(tiny_model)
    rows = ROWS[kind]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert COMMANDS.count("ranktuner ") == 3
    ran = run(COMMANDS, tmp_path)
    assert ran.returncode == 0, ran.stderr

    result = json.loads((tmp_path / "runs/mine/result.json").read_text())
    assert result["after"]["nll"] < result["before"]["nll"] + 1e-3
    assert result["after"]["nll"] != result["before"]["nll"]
    assert all(not pathlib.Path(path).is_absolute() for path in result["paths"].values())
    assert all((tmp_path / path).exists() for path in result["paths"].values())
    if kind == "turns":  # Rows with the same prompt stay together.
        assert "56 conversations and 4 held out" in ran.stderr
        assert "1 truncated" in ran.stderr
        assert "not packed" not in ran.stderr
        assert "no questions are asked" in ran.stderr
        assert result["after"]["questions"] == 0
    else:
        assert "19 conversations and 1 held out" in ran.stderr
        assert "not packed" in ran.stderr
        assert result["after"]["questions"] == 1
    # The last command evaluates the same rows.
    assert f"{result['after']['nll']:.2f}" in ran.stdout
    assert f"({result['after']['tokens']} supervised tokens)" in ran.stdout


def test_an_unreadable_row_is_reported_with_its_line(
    tiny_model: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text('{"prompt": "2 + 2", "completion": "4"}\n{"text": "2 + 2 = 4"}\n')
    arguments = [f"--config.model={tiny_model}", f"--config.data.source={source}"]
    assert cli.main(["train", "--config=own_data", *arguments, f"--workdir={tmp_path}/x"]) == 2
    shown = capsys.readouterr().err
    assert f"{source}:2: expected a column 'messages'" in shown
    assert shown.count("\n") == 1
