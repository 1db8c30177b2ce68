"""Evaluate a model on the held-out conversations of a config, or on benchmarks.

ranktuner eval --workdir=runs/first
ranktuner eval --model=runs/first/model --config=smollm2_chain_sum
ranktuner eval --model=runs/mine/model --config=own_data --config.data.source=rows.jsonl
ranktuner eval --adapter=runs/lora/model --config=smollm2_chain_sum
ranktuner eval --model=runs/first/model --tasks=math500,gsm8k --samples=16 --temperature=1 \
  --max_new_tokens=4096 --output=evals/first

With --tasks, run the same command again to go on after an interruption. Exit codes: 0 finished,
75 stopped with all answers so far saved, 2 user error, 1 other failure.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys

import jax

from ranktuner_jax import evals
from ranktuner_jax.errors import UserError
from ranktuner_jax.train.commands import benchmark_flags, eval_tasks, flags
from ranktuner_jax.train.config import MeshConfig, TrainConfig
from ranktuner_jax.train.run import Run, with_adapter, with_trained
from ranktuner_jax.train.runtime import distributed
from ranktuner_jax.train.runtime.compilation import keep_compiled
from ranktuner_jax.train.runtime.report_once import report_once

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `ranktuner eval`."""
    parser.add_argument(
        "--model",
        help="a Hugging Face folder, a hub id or a name; default: that of the run or config",
    )
    flags.add_adapter(parser)
    flags.add_config(
        parser,
        groups=("model", "seed", "data", "eval"),
        workdir="folder of a finished run, whose exported model and config to use",
        needed=False,
    )
    eval_tasks.add_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the full result as JSON")
    distributed.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Evaluates the model, in the compute_dtype of the config."""
    with report_once(args):
        if not (args.config or args.workdir or args.tasks):
            raise UserError(
                "expected --workdir or --config, whose held-out data to use, or --tasks, got none; "
                "see ranktuner eval --help"
            )
        benchmark_flags.refuse_without_tasks(args, eval_tasks.add_arguments)
        config = flags.read_config_and_connect(args)
        keep_compiled()
        config = dataclasses.replace(
            _chosen_model(config, args),
            mesh=MeshConfig(data=1, fsdp=-1),  # The devices of this machine.
            train=dataclasses.replace(config.train, remat="none"),
        )
        if args.tasks:
            return eval_tasks.run(args, config)
        opened = Run.open(config)
        held_out = opened.held_out
        first = jax.process_index() == 0
        progress = _progress if first and sys.stderr.isatty() else None
        result = held_out.cached(opened.model, progress)
    if first:
        print(json.dumps(result.to_json(), indent=2) if args.json else _describe(result))
        if held_out.note:
            print(held_out.note, file=sys.stderr)
    return 0


def _chosen_model(config: TrainConfig, args: argparse.Namespace) -> TrainConfig:
    """The config with the model and the adapters to evaluate."""
    if args.workdir is not None and not args.model and not args.adapter:
        folder = os.path.join(args.workdir, "model")
        if not os.path.isdir(folder):
            raise UserError(
                f"--workdir: expected a finished run, found no {folder}; finish it first"
            )
        return with_trained(config, folder)
    adapter = args.adapter or config.lora.adapter
    return with_adapter(dataclasses.replace(config, model=args.model or config.model), adapter)


def _progress(done: int, total: int) -> None:
    end = "\n" if done >= total else ""
    print(f"\rrows and questions: {done} of {total}", end=end, file=sys.stderr, flush=True)


def _describe(result: evals.EvalResult) -> str:
    lines = [
        f"plain NLL       {result.nll:.4f} nats per token ({result.tokens} supervised tokens)",
        f"token accuracy  {result.token_accuracy:.1%}",
    ]
    if result.accuracy is not None and result.accuracy_interval is not None:
        low, high = result.accuracy_interval
        lines.append(
            f"answers right   {result.accuracy:.1%} of {result.questions} "
            f"(95 % interval {low:.1%} to {high:.1%})"
        )
    for preview in result.previews:
        lines += [
            "",
            f"  question  {preview.question}",
            f"  expected  {preview.expected}",
            f"  {'right' if preview.correct else 'wrong'}     {preview.completion}",
        ]
    return "\n".join(lines)
