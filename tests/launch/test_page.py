"""The commands of the pages on clusters that need no cloud are commands that exist."""

import argparse
import importlib
import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

from ranktuner_jax import cli
from ranktuner_jax.train import load_config

ROOT = pathlib.Path(__file__).parents[2]
PAGE = (ROOT / "launch" / "README.md").read_text()
PAGES = PAGE + (ROOT / "docs" / "reproduce.md").read_text()
BLOCKS = "".join(re.findall(r"```bash\n(.*?)```", PAGES, re.DOTALL)).replace("\\\n", " ")
LINES = [line.split(" # ")[0].strip() for line in BLOCKS.splitlines() if "☁" not in line]
SCRIPTS = [shlex.split(line) for line in LINES if "launch/" in line]
RUNS = [shlex.split(line) for line in LINES if line.startswith("ranktuner ")]


def test_every_line_is_tested_or_needs_the_cloud() -> None:
    exports = [line for line in LINES if line.startswith("export ")]
    assert len(SCRIPTS) + len(RUNS) + len(exports) == len([line for line in LINES if line])
    assert SCRIPTS
    assert RUNS


@pytest.mark.parametrize("words", SCRIPTS, ids=" ".join)
def test_a_script_takes_what_the_page_gives_it(words: list[str]) -> None:
    at = next(i for i, word in enumerate(words) if "launch/" in word) + 1
    dry = words if "--dry-run" in words else [*words[:at], "--dry-run", *words[at:]]
    pod = {"ZONE": "us-west4-a", "TYPE": "v5litepod-16", "RUNTIME": "v2-alpha-tpuv5-lite"}
    env = os.environ | pod | {"PYTHON": sys.executable}
    ran = subprocess.run(dry, cwd=ROOT, env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    given = [word for word in words[at:] if word.startswith("--") and word != "--dry-run"]
    assert all(shlex.quote(word) in ran.stdout.replace("\\", "") for word in given)


@pytest.mark.parametrize("words", RUNS, ids=" ".join)
def test_a_run_takes_the_flags_that_the_page_gives_it(words: list[str]) -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    importlib.import_module(cli.COMMANDS[words[1]][0]).add_arguments(parser)
    _, overrides = parser.parse_known_args(words[2:])
    load_config("smollm2_chain_sum", overrides)


def test_every_link_points_to_a_file() -> None:
    for path in re.findall(r"\]\((?!http)([^)]+)\)", PAGE):
        assert (ROOT / "launch" / path).exists(), path
