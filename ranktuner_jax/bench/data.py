"""Measure the input pipeline: tokens per second, and how full the rows are.

ranktuner bench data
ranktuner bench data --config=own_data --config.data.source=rows.jsonl --config.data.row_length=1024
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import time

from rich.console import Console
from rich.table import Table

from ranktuner_jax import data, models
from ranktuner_jax.train.commands import flags

__all__ = ["Measurement", "add_arguments", "measure", "run"]


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Speed of the input pipeline.

    Attributes:
      conversations: Conversations read.
      tokens: Positions that hold a token.
      fill: Fraction of all positions that hold a token.
      prepare_seconds: Reading, rendering, tokenizing and packing, once before training.
      batch_seconds: Assembling all rows into batches, as training does each epoch.
    """

    conversations: int
    tokens: int
    fill: float
    prepare_seconds: float
    batch_seconds: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `ranktuner bench data`."""
    flags.add_config(parser, default="smollm2_gsm_symbolic", groups=("model", "data"))


def measure(config: data.DataConfig, model: str, batch_size: int) -> Measurement:
    """Times one pass over a data set that is already on disk.

    Args:
      config: The data set and its layout in rows.
      model: The model whose tokenizer to use: a Hugging Face folder or a name.
      batch_size: Rows per batch.

    Raises:
      UserError: If the model or the data set does not exist.
    """
    tokenizer = data.load_tokenizer(models.resolve(model), config.chat_template)
    # A built-in source is generated on first use, which should not be timed.
    next(data.read_source(config.source, config.split), None)
    start = time.perf_counter()
    rows = data.load_rows(config, tokenizer)
    packed = time.perf_counter()
    iterator = data.BatchIterator(rows, batch_size=batch_size)
    for _ in range(-(-len(rows) // batch_size)):
        next(iterator)
    batched = time.perf_counter()
    return Measurement(
        conversations=rows.summary.read,
        tokens=rows.summary.tokens,
        fill=rows.summary.fill,
        prepare_seconds=packed - start,
        batch_seconds=batched - packed,
    )


def run(args: argparse.Namespace) -> int:
    """Prints the measurement."""
    config = flags.read_config(args)
    result = measure(config.data, config.model, config.train.batch_size)
    table = Table(box=None, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    table.add_row("cores", f"{cores}")
    table.add_row("conversations", f"{result.conversations:,}")
    table.add_row("tokens", f"{result.tokens:,}")
    table.add_row("rows filled", f"{result.fill:.1%}")
    table.add_row("tokenize and pack", f"{result.tokens / result.prepare_seconds:,.0f} tokens/s")
    table.add_row("assemble batches", f"{result.tokens / result.batch_seconds:,.0f} tokens/s")
    Console(highlight=False).print(table)
    return 0
