"""Evaluate a model on held-out conversations, with the data and the task of a config.

ranktuner eval --model=runs/first/model --config=smollm2_chain_sum
ranktuner eval --model=smollm2-135m --config=my/config.py --config.eval.examples=512
"""

from __future__ import annotations

import argparse
import json
import sys

import jax
import jax.numpy as jnp

from ranktuner_jax import data, evals, models
from ranktuner_jax.train import distributed
from ranktuner_jax.train.compilation import keep_compiled
from ranktuner_jax.train.config import MeshConfig, config_names, load_config
from ranktuner_jax.train.sharding import make_mesh

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares what `ranktuner eval` takes."""
    parser.add_argument(
        "--model", help="a Hugging Face folder, a hub id or a name; the config's by default"
    )
    parser.add_argument(
        "--config",
        required=True,
        help=f"a config by name ({', '.join(config_names())}) or a Python file with get_config(); "
        "its keys can be overridden as in training (ranktuner train --help lists them)",
    )
    parser.add_argument("--json", action="store_true", help="print everything as one JSON object")
    distributed.add_arguments(parser)
    parser.set_defaults(overrides=[])


def run(args: argparse.Namespace) -> int:
    """Runs it, in the arithmetic of the config's training."""
    config = load_config(args.config, args.overrides)
    distributed.initialize(args)
    keep_compiled()
    folder = models.resolve(args.model or config.model)
    tokenizer = data.load_tokenizer(folder, config.data.chat_template)
    split = config.eval.split
    examples = (
        data.load_examples(config.data, tokenizer, split=split, limit=config.eval.examples)
        if config.eval.task
        else []
    )
    model = models.load_pretrained(
        folder,
        mesh=make_mesh(MeshConfig(data=1, fsdp=-1)),  # Whatever devices are here, not the run's.
        dtype=jnp.dtype(config.train.compute_dtype),
        param_dtype=jnp.dtype(config.train.param_dtype),
    )
    first = jax.process_index() == 0
    result, _ = evals.cached_evaluation(
        model,
        tokenizer,
        rows=data.load_rows(config.data, tokenizer, split=split, seed=config.seed),
        examples=examples,
        config=config.eval,
        model_folder=folder,
        cache_dir=models.default_cache_dir(),
        progress=_progress if first and sys.stderr.isatty() else None,
    )
    if first:
        print(json.dumps(result.to_json(), indent=2) if args.json else _describe(result))
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
