"""The model card of an exported folder: its README.md."""

from __future__ import annotations

import os
import pathlib
import re
import shlex
import tempfile
from collections.abc import Mapping
from typing import Any

import ranktuner_jax
from ranktuner_jax import evals
from ranktuner_jax.train.config import TrainConfig, config_names, load_config, to_dict
from ranktuner_jax.train.config.load import CODE
from ranktuner_jax.train.config.show import flatten

__all__ = ["model_card"]

# Groups that say where a run computes and what it keeps, not what it computes.
_ELSEWHERE = ("mesh.", "checkpoint.", "telemetry.")


def model_card(
    config: TrainConfig,
    workdir: str | os.PathLike[str] = "",
    steps: int | None = None,
    results: Mapping[str, evals.EvalResult] | None = None,
) -> str:
    """The text of a model card, in Markdown with the metadata that the Hugging Face hub reads.

    Args:
      config: The config of the run.
      workdir: The folder of the run, as its command names it.
      steps: Steps after which the model was taken; None leaves the row out.
      results: Evaluations by the heading of their column, such as "before"; without any there is
        no table of results.

    Example:
      >>> from ranktuner_jax.train import load_config
      >>> config = load_config("smollm2_chain_sum", ["--config.loss.weighting=dft"])
      >>> card = model_card(config, "runs/dft", steps=150)
      >>> print(card[card.index("ranktuner train") :].split("```")[0])
      ranktuner train --config=smollm2_chain_sum --config.loss.weighting=dft --workdir=runs/dft
    """
    # Half a second of imports that only an export should wait for.
    from huggingface_hub import ModelCardData

    is_hub_id = re.fullmatch(r"[\w-]+/[\w.-]+", config.model) and not os.path.isdir(config.model)
    metadata = ModelCardData(
        base_model=config.model if is_hub_id else None,
        library_name="peft" if config.lora.is_on else "transformers",
        pipeline_tag="text-generation",
        tags=["ranktuner_jax", "sft"],
    )
    name = pathlib.PurePath(config.model).name
    parts = [
        f"---\n{metadata.to_yaml()}\n---\n",
        f"# {name}, fine-tuned with {_method(config)}\n",
        _table(["", ""], _settings(config, steps)),
        *(_results(results) if results else ()),
        "## Command\n",
        f"```bash\n{_command(config, os.fspath(workdir))}\n```\n",
        f"ranktuner_jax {ranktuner_jax.__version__} wrote this file.",
    ]
    return "\n".join(parts) + "\n"


def _method(config: TrainConfig) -> str:
    chosen = {key: value for key, value in config.loss.options.items() if value is not None}
    options = ", ".join(f"{key} {value}" for key, value in sorted(chosen.items()))
    return config.loss.weighting + (f" ({options})" if options else "")


def _settings(config: TrainConfig, steps: int | None) -> list[list[Any]]:
    data, optimizer, train = config.data, config.optimizer, config.train
    sources = data.mixture or data.source
    lora = config.lora
    adapters = f"LoRA of rank {lora.rank}" if lora.rank else f"LoRA, begun from `{lora.adapter}`"
    chosen = f"{optimizer.name}, learning rate {optimizer.learning_rate:g}, {optimizer.schedule}"
    rows: list[list[Any]] = [
        ["base model", f"`{config.model}`"],
        ["data", f"`{sources}`, split `{data.split}`"],
        ["token weights", _method(config)],
        ["adapters", adapters if lora.is_on else None],
        ["optimizer", chosen],
        ["batch", f"{train.batch_size} rows of {data.row_length} tokens"],
        ["steps", steps],
        ["seed", config.seed],
    ]
    return [row for row in rows if row[1] is not None]


def _results(results: Mapping[str, evals.EvalResult]) -> list[str]:
    last = list(results.values())[-1]
    counts = f"{last.tokens:,} supervised tokens"
    rows = [
        ["plain NLL, nats a token", *(f"{result.nll:.3f}" for result in results.values())],
        ["token accuracy", *(f"{result.token_accuracy:.1%}" for result in results.values())],
    ]
    if last.questions:
        counts += f" and {last.questions:,} questions; 95 % intervals in brackets"
        rows.append(["answers right", *map(_share, results.values())])
    return [
        "## Results\n",
        f"On held-out rows: {counts}.\n",
        _table(["", *results], rows),
    ]


def _share(result: evals.EvalResult) -> str:
    assert result.accuracy_interval is not None
    low, high = result.accuracy_interval
    return f"{result.accuracy:.1%} ({100 * low:.1f} to {100 * high:.1f})"


def _table(head: list[str], rows: list[list[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines) + "\n"


def _command(config: TrainConfig, workdir: str) -> str:
    """The command that trains this: a config, and the keys that differ from it."""
    if config.code:
        with tempfile.TemporaryDirectory() as folder:
            file = pathlib.Path(folder, CODE)
            file.write_text(config.code, encoding="utf-8")
            base, changed = CODE, _changed(load_config(str(file)), config)
    else:
        # A flag cannot take a value back to None.
        each = {name: _changed(load_config(name), config) for name in config_names()}
        base, changed = min(
            each.items(), key=lambda item: ([*item[1].values()].count(None), len(item[1]))
        )
    flags = [f"--config.{key}={value}" for key, value in changed.items() if value is not None]
    return shlex.join(["ranktuner", "train", f"--config={base}", *flags, f"--workdir={workdir}"])


def _changed(base: TrainConfig, config: TrainConfig) -> dict[str, Any]:
    """The keys in which a config differs from another, with their values."""
    before, after = dict(flatten(to_dict(base))), dict(flatten(to_dict(config)))
    absent = object()
    return {
        key: value
        for key, value in after.items()
        if before.get(key, absent) != value and not key.startswith(_ELSEWHERE)
    }
