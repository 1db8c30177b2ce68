"""Measure an audit beside a plain likelihood evaluation of the same rows, every token supervised.

ranktuner bench audit
ranktuner bench audit --rows=64 --batch_size=8 --dtype=bfloat16 --json

Conversations are random tokens. The repeats of both are interleaved, and a ratio is that of the
medians. "scoring" is the time in which an audit scores its rows and keeps them, "whole" also that
in which it looks at 20 conversations once more and writes its files.
"""

from __future__ import annotations

import argparse
import functools
import pathlib
import statistics
import sys
import tempfile
import time
from typing import Any

import jax
import numpy as np
from flax import nnx

from ranktuner_jax import data, models
from ranktuner_jax.bench.records import Record, add_json, show
from ranktuner_jax.diagnostics import audit_methods
from ranktuner_jax.diagnostics.audit import Audit
from ranktuner_jax.diagnostics.layout import batches, pack
from ranktuner_jax.errors import UserError
from ranktuner_jax.evals.evaluation import score_rows
from ranktuner_jax.train.commands import flags

__all__ = ["add_arguments", "run"]

PLAIN, SCORING, WHOLE = "likelihood", "audit, scoring", "audit, whole"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `ranktuner bench audit`."""
    flags.add_config(parser, default="smollm2_chain_sum", groups=("model",))
    number = functools.partial(parser.add_argument, type=int, metavar="N")
    number("--rows", default=64, help="rows that are scored [%(default)s]")
    number("--row_length", default=512, help="tokens of a row [%(default)s]")
    number("--conversations", default=8, help="conversations of a row [%(default)s]")
    number("--batch_size", default=8, help="rows scored together [%(default)s]")
    number("--repeats", default=3, help="timed runs of each [%(default)s]")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Prints the speeds and their ratios."""
    for name in ("rows", "row_length", "conversations", "batch_size", "repeats"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name}: expected at least 1, got {getattr(args, name)}")
    folder = models.resolve(flags.read_config(args).model)
    tokenizer = data.load_tokenizer(folder)
    model = models.load_pretrained(folder, dtype=args.dtype, param_dtype=args.dtype)
    rows = _random_rows(model.vocab_size, args)
    speeds: dict[str, list[float]] = {PLAIN: [], SCORING: [], WHOLE: []}
    for repeat in range(args.repeats + 1):
        found = {PLAIN: _likelihood(model, rows, args.batch_size)}
        found |= _audit(model, tokenizer, rows, args.batch_size)
        if repeat:  # The first compiles.
            for name, seconds in found.items():
                speeds[name].append(rows.summary.supervised / seconds)
        text = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in found.items())
        print(f"{repeat}/{args.repeats}  {text}", file=sys.stderr, flush=True)
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    records = [
        Record(
            "audit",
            f"{args.rows} rows of {args.row_length} tokens, {args.dtype}",
            name,
            {"tokens_per_s": median, f"÷ {PLAIN}": median / medians[PLAIN]},
            args.dtype,
        )
        for name, median in medians.items()
    ]
    show(records, as_json=args.json)
    return 0


def _random_rows(vocab_size: int, args: argparse.Namespace) -> data.Rows:
    """Rows that are full of conversations, all of whose tokens are supervised."""
    rng = np.random.default_rng(0)
    length, count = args.row_length // args.conversations, args.rows * args.conversations
    if length < 1:
        raise UserError(
            f"--conversations: expected at most --row_length ({args.row_length}), got "
            f"{args.conversations}"
        )
    chats = [
        data.TokenizedChat(
            rng.integers(0, vocab_size, length + 1).astype(np.int32),
            np.ones(length + 1, np.float32),
        )
        for _ in range(count)
    ]
    summary = data.Summary(args.row_length, kept=count, supervised=count * length)
    layout = [[number] for number in range(count)]
    return data.Rows(chats, layout, row_length=args.row_length, summary=summary)


def _likelihood(model: models.Decoder, rows: data.Rows, batch_size: int) -> float:
    """The seconds of a plain likelihood evaluation."""
    graphdef, params = nnx.split(model)
    groups = pack(range(len(rows.lengths)), rows.lengths, rows.row_length)
    start = time.perf_counter()
    for _, batch in batches(rows, groups, batch_size):
        jax.device_get(score_rows(graphdef, params, batch))
    return time.perf_counter() - start


def _audit(
    model: models.Decoder, tokenizer: Any, rows: data.Rows, batch_size: int
) -> dict[str, float]:
    """The seconds of an audit: of its scoring, and of all of it."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        audit = Audit(
            rows,
            tokenizer,
            pathlib.Path(folder, "audit"),
            decoder=model.config,
            methods=audit_methods(),
            about={"model": "", "source": "random", "split": "", "config": {}},
            batch_size=batch_size,
        )
        audit.claim()
        audit.run(model)
        whole = time.perf_counter() - start
        return {SCORING: audit.result()["seconds"], WHOLE: whole}
