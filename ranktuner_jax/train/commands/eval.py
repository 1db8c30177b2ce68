"""Evaluate a model on held-out conversations, with the data and the task of a config.

ranktuner eval --model=runs/first/model --config=smollm2_chain_sum
ranktuner eval --model=runs/mine/model --config=own_data --config.data.source=rows.jsonl
"""

from __future__ import annotations

import argparse
import json
import sys

import jax
import jax.numpy as jnp

from ranktuner_jax import data, evals, models
from ranktuner_jax.train import distributed
from ranktuner_jax.train.commands import flags
from ranktuner_jax.train.compilation import keep_compiled
from ranktuner_jax.train.config import MeshConfig
from ranktuner_jax.train.held_out import HeldOut
from ranktuner_jax.train.one_voice import one_voice
from ranktuner_jax.train.sharding import make_mesh

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares what `ranktuner eval` takes."""
    parser.add_argument(
        "--model", help="a Hugging Face folder, a hub id or a name; the config's by default"
    )
    flags.add_config(parser, groups=("model", "seed", "data", "eval"))
    parser.add_argument("--json", action="store_true", help="print everything as one JSON object")
    distributed.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Runs it, in the arithmetic of the config's training."""
    with one_voice(args):
        config = flags.read_config_and_meet(args)
        keep_compiled()
        folder = models.resolve(args.model or config.model)
        tokenizer = data.load_tokenizer(folder, config.data.chat_template)
        held_out = HeldOut(config, folder, tokenizer)
        model = models.load_pretrained(
            folder,
            mesh=make_mesh(MeshConfig(data=1, fsdp=-1)),  # Whatever devices are here.
            dtype=jnp.dtype(config.train.compute_dtype),
            param_dtype=jnp.dtype(config.train.param_dtype),
        )
        first = jax.process_index() == 0
        result = held_out.cached(model, _progress if first and sys.stderr.isatty() else None)
    if first:
        print(json.dumps(result.to_json(), indent=2) if args.json else _describe(result))
        if held_out.note:
            print(held_out.note, file=sys.stderr)
    return 0


def _progress(done: int, total: int) -> None:
    end = "\n" if done >= total else ""
    print(f"\rrows and questions done: {done} of {total}", end=end, file=sys.stderr, flush=True)


def _describe(result: evals.EvalResult) -> str:
    lines = [
        f"plain NLL       {result.nll:.4f} nats a token ({result.tokens} supervised tokens)",
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
