"""Writes a laboratory's folder."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flax import nnx

from ranktuner_jax import models
from ranktuner_jax.errors import UserError
from ranktuner_jax.files import whole_folder
from ranktuner_jax.lab import faults, problems
from ranktuner_jax.lab.phrasing import RARE_SHARE, explain
from ranktuner_jax.lab.problems import Move, Problem, Rules
from ranktuner_jax.lab.settings import LabSettings
from ranktuner_jax.lab.tokenizer import train_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["write_lab"]

# The kinds of problems in pretrain.jsonl. In half of those with rules, the rules are vague.
_PRETRAIN = {"sum": 0.3, "story": 0.2, "rule": 0.3, "rule_story": 0.2}
# Enough that every word occurs. The vocabulary does not depend on how many rows are asked for.
_VOCABULARY_ROWS = 2000
_SHAPE = models.DecoderConfig(
    hidden_size=128,
    intermediate_size=512,
    num_layers=4,
    num_heads=4,
    num_kv_heads=4,
    head_dim=32,
    max_positions=1024,
    initializer_range=0.05,
)


def write_lab(settings: LabSettings, folder: Path) -> None:
    """Writes initial/, the five JSONL files and lab.json; all of them or nothing.

    Args:
      settings: What to write; the same settings give the same bytes.
      folder: Must not exist yet.

    Raises:
      UserError: If the folder exists or cannot be written, or reasoning-gym is not installed.
    """
    if folder.exists():
        raise UserError(f"--output: expected a new folder, got {folder}, which exists")
    rules = problems.draw_rules(_rng(settings, "rules"))
    written = [*itertools.islice(_pretrain(settings, rules), _VOCABULARY_ROWS)]
    tokenizer = train_tokenizer(row[key] for row in written for key in ("prompt", "completion"))
    files = {
        "pretrain": itertools.islice(_pretrain(settings, rules), settings.pretrain_rows),
        "retention": _retention(settings),
        "train": _target(settings, "train", "rule", rules, tokenizer),
        "target": _target(settings, "target", "rule", rules, tokenizer),
        "ood": _target(settings, "ood", "rule_story", rules, tokenizer),
    }
    try:
        with whole_folder(folder) as scratch:
            for name, rows in files.items():
                text = "".join(json.dumps(row) + "\n" for row in rows)
                (scratch / f"{name}.jsonl").write_text(text, encoding="utf-8")
            _write_initial(scratch / "initial", tokenizer, settings.seed)
            described = json.dumps(dataclasses.asdict(settings), indent=2)
            (scratch / "lab.json").write_text(described + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output: {folder} cannot be written: {error}") from error


def _rng(settings: LabSettings, purpose: str) -> random.Random:
    """The draws for one purpose: they do not depend on those for others."""
    return random.Random(f"{settings.seed} {purpose}")


def _supply(
    kind: str, file: str, settings: LabSettings, rules: Mapping[str, Move] | Sequence[str] = ()
) -> Iterator[Problem]:
    """The problems of a kind that belong to a file, endlessly."""
    rng = _rng(settings, f"{file} {kind} {' '.join(rules)}")
    found = (
        problems.sums(settings.seed)
        if kind == "sum"
        else problems.stories(rng)
        if kind == "story"
        else problems.rule_problems(rng, rules, kind)
    )
    return problems.belonging(found, file, settings.seed)


def _pretrain(settings: LabSettings, rules: Rules) -> Iterator[dict[str, Any]]:
    """The base model's text, endlessly."""
    rng = _rng(settings, "pretrain")
    supplies = {
        (kind, vague): _supply(
            kind, "pretrain", settings, [*rules.vague] if vague else rules.learnt
        )
        for kind in _PRETRAIN
        for vague in (False, True)
    }
    while True:
        [kind] = rng.choices([*_PRETRAIN], [*_PRETRAIN.values()])
        yield _row(next(supplies[kind, rng.random() < 0.5]), rng)


def _retention(settings: LabSettings) -> Iterator[dict[str, Any]]:
    """Sums and stories in turn: what the target task says nothing about."""
    rng = _rng(settings, "retention")
    supplies = [_supply(kind, "retention", settings) for kind in ("sum", "story")]
    alternating = itertools.chain.from_iterable(zip(*supplies, strict=True))
    for problem in problems.different(alternating, settings.questions):
        yield _row(problem, rng)


def _row(problem: Problem, rng: random.Random) -> dict[str, Any]:
    rare = [rng.random() < RARE_SHARE for _ in problem.moves]
    return {
        "prompt": problem.question,
        "completion": explain(problem, rng, rare),
        "answer": str(problem.results[-1]),
        "kind": problem.kind,
    }


def _target(
    settings: LabSettings,
    file: str,
    kind: str,
    rules: Rules,
    tokenizer: PreTrainedTokenizerBase,
) -> list[dict[str, Any]]:
    """Rows of the target task; only those of train.jsonl have noise."""
    if file != "train":
        settings = dataclasses.replace(
            settings, rows=settings.questions, token_noise=0, answer_noise=0, paraphrase=0
        )
    vague, changed = (
        problems.different(_supply(kind, file, settings, meanings), settings.rows)
        for meanings in (rules.vague, rules.changed)
    )
    asked = faults.mixed(vague, changed, settings.contradict, _rng(settings, file))
    return faults.noisy_rows(asked, settings, tokenizer, f"{settings.seed} {file}")


def _write_initial(folder: Path, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
    """A decoder with random weights, and its tokenizer."""
    config = dataclasses.replace(
        _SHAPE,
        vocab_size=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with tempfile.TemporaryDirectory() as own:
        tokenizer.save_pretrained(own)
        model = models.Decoder(config, rngs=nnx.Rngs(seed))
        models.save_pretrained(model, folder, tokenizer_from=own)
