r"""Write a small model, text to pre-train it on, and a task with known faults to fine-tune it on.

Everything follows from the flags, byte for byte. The base model does not depend on the faults: to
change them, write another folder with the same --seed and train the same base on its rows.

  ranktuner lab --output=lab
  ranktuner lab --output=lab_noisy --token_noise=0.2 --contradict=0.5
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
from pathlib import Path

from ranktuner_jax.lab.settings import LabSettings
from ranktuner_jax.lab.write import write_lab

__all__ = ["add_arguments", "run"]

_HELP = {
    "seed": "determines everything that is drawn",
    "rows": "conversations to fine-tune on",
    "contradict": "share of them, and of the questions, that contradict what the base has learnt",
    "token_noise": "share of them with a span of random tokens",
    "answer_noise": "share of them whose last result and answer are wrong",
    "paraphrase": "share of their steps that are said in a valid but rare way",
    "questions": "questions in each of target.jsonl, ood.jsonl and retention.jsonl",
    "pretrain_rows": "conversations to pre-train on",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `ranktuner lab`."""
    parser.add_argument("--output", required=True, help="folder to write; must not exist yet")
    for field in dataclasses.fields(LabSettings):
        parser.add_argument(
            f"--{field.name}",
            type=type(field.default),
            default=field.default,
            metavar="SHARE" if isinstance(field.default, float) else "N",
            help=f"{_HELP[field.name]} [{field.default}]",
        )


def run(args: argparse.Namespace) -> int:
    """Writes the folder and prints the commands that use it."""
    settings = LabSettings(
        **{field.name: getattr(args, field.name) for field in dataclasses.fields(LabSettings)}
    )
    folder = Path(args.output).expanduser()
    write_lab(settings, folder)
    data = shlex.quote(f"{folder}/{{split}}.jsonl")
    initial, base, cell = (shlex.quote(f"{folder}/{name}") for name in ("initial", "base", "cell"))
    print(f"{folder}: {settings.rows:,} conversations and {settings.questions:,} questions. Next:")
    print(
        f"ranktuner train --config=lab_base --config.model={initial} --config.data.source={data} "
        f"--workdir={base}"
    )
    print(
        f"ranktuner train --config=lab_cell --config.model={base}/model "
        f"--config.data.source={data} --workdir={cell}"
    )
    return 0
