"""Measure the input pipeline: cold and warm starts, tokens per second by cores, memory, fill.

Each start is a process of its own: the first tokenizes all rows and keeps the tokens in a temporary
folder, the second reads them from there.

ranktuner bench data
ranktuner bench data --config=own_data --config.data.source=rows.jsonl --config.data.row_length=1024
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table

from ranktuner_jax import data, models
from ranktuner_jax.bench.records import Record, add_json, show
from ranktuner_jax.data.packing import fewest_rows
from ranktuner_jax.errors import RunError, UserError
from ranktuner_jax.train.commands import flags

__all__ = ["Measurement", "Start", "add_arguments", "measure", "measure_start", "run"]

_COMMAND = "from ranktuner_jax.bench.data import start; start()"


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Speed of the input pipeline.

    Attributes:
      conversations: Conversations read.
      tokens: Positions that hold a token.
      fill: Fraction of all positions that hold a token.
      most: What no packing of these conversations exceeds; None if each has a row of its own.
      prepare_seconds: Reading, rendering, tokenizing and packing, once before training.
      batch_seconds: Assembling all rows into batches, as training does each epoch.
    """

    conversations: int
    tokens: int
    fill: float
    most: float | None
    prepare_seconds: float
    batch_seconds: float


@dataclasses.dataclass(frozen=True)
class Start:
    """What it takes a process to get to its first batch.

    Attributes:
      seconds: From the tokenizer to the first batch, without imports.
      anonymous_gb: Memory at the first batch that is not a file's, without what imports take.
      tokens: Positions that hold a token.
    """

    seconds: float
    anonymous_gb: float
    tokens: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `ranktuner bench data`."""
    parser.add_argument(
        "--cores", type=int, nargs="+", help="numbers of cores to tokenize on [1 and all]"
    )
    flags.add_config(parser, default="smollm2_gsm_symbolic", groups=("model", "data"))
    add_json(parser)


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
    rows = data.load_rows(config, tokenizer, min_rows=batch_size)
    packed = time.perf_counter()
    iterator = data.BatchIterator(rows, batch_size=batch_size)
    for _ in range(-(-len(rows) // batch_size)):
        next(iterator)
    batched = time.perf_counter()
    most = None
    if config.packing and not rows.summary.unpacked:
        fewest = fewest_rows(rows.lengths, config.row_length)
        most = rows.summary.tokens / (fewest * config.row_length)
    return Measurement(
        conversations=rows.summary.read,
        tokens=rows.summary.tokens,
        fill=rows.summary.fill,
        most=most,
        prepare_seconds=packed - start,
        batch_seconds=batched - packed,
    )


def measure_start(config: data.DataConfig, model: str, batch_size: int, cores: int) -> Start:
    """Starts a process that reads its first batch.

    Args:
      config: The data set, its layout in rows, and where its tokens are kept.
      model: As in `measure`.
      batch_size: Rows of the batch.
      cores: On how many cores the process runs.

    Raises:
      RunError: If the process fails.
    """
    job = [dataclasses.asdict(config), str(models.resolve(model)), batch_size, cores]
    process = subprocess.run(
        [sys.executable, "-c", _COMMAND],
        input=json.dumps(job),
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    if process.returncode:
        raise RunError(f"bench data: a start ended with code {process.returncode}; see above")
    return Start(**json.loads(process.stdout.splitlines()[-1]))


def start() -> None:
    """What the process of `measure_start` does."""
    settings, model, batch_size, cores = json.load(sys.stdin)
    config = data.DataConfig(**settings)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    import pyarrow  # noqa: F401 (imports are not timed)
    import transformers.models.auto  # noqa: F401

    memory, begin = _anonymous_gb(), time.perf_counter()
    tokenizer = data.load_tokenizer(model, config.chat_template)
    rows = data.load_rows(config, tokenizer, min_rows=batch_size)
    next(data.BatchIterator(rows, batch_size=min(batch_size, len(rows))))
    seconds = time.perf_counter() - begin
    result = Start(seconds, _anonymous_gb() - memory, rows.summary.tokens)
    print(json.dumps(dataclasses.asdict(result)))


def _anonymous_gb() -> float:
    """Memory of this process that is not a file's; NaN where the system does not tell."""
    try:
        with open("/proc/self/status") as file:
            lines = dict(line.split(":", 1) for line in file)
    except OSError:
        return float("nan")
    return int(lines["RssAnon"].split()[0]) * 1024 / 1e9


def run(args: argparse.Namespace) -> int:
    """Prints the measurement."""
    config = flags.read_config(args)
    available = _cores()
    if args.cores and not all(1 <= cores <= available for cores in args.cores):
        raise UserError(f"--cores: expected numbers from 1 to {available}, got {args.cores}")
    size = config.train.batch_size
    with tempfile.TemporaryDirectory(prefix="ranktuner-bench-") as folder:
        kept = dataclasses.replace(config.data, cache=f"{folder}/all")
        result = measure(kept, config.model, size)
        starts = _starts(kept, config.model, size, args.cores or sorted({1, available}), folder)
    if args.json:
        show(_records(result, starts), as_json=True)
        return 0
    table = Table(box=None, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_row("cores", f"{available}")
    table.add_row("conversations", f"{result.conversations:,}")
    table.add_row("tokens", f"{result.tokens:,}")
    table.add_row("rows filled", f"{result.fill:.1%}")
    if result.most is not None:
        table.add_row("at most, as long as they are", f"{result.most:.1%}")
    table.add_row("tokenize and pack", f"{result.tokens / result.prepare_seconds:,.0f} tokens/s")
    table.add_row("assemble batches", f"{result.tokens / result.batch_seconds:,.0f} tokens/s")
    console = Console(highlight=False)
    console.print(table)
    console.print(_starts_table(starts))
    return 0


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _starts(
    config: data.DataConfig, model: str, batch_size: int, cores: Sequence[int], folder: str
) -> list[tuple[str, int, Start]]:
    """A cold and a warm start on each number of cores."""
    starts = []
    for count in cores:
        kept = dataclasses.replace(config, cache=f"{folder}/{count}")
        for name in ("cold", "warm"):
            starts.append((name, count, measure_start(kept, model, batch_size, count)))
    return starts


def _records(result: Measurement, starts: Sequence[tuple[str, int, Start]]) -> Iterator[Record]:
    figures: dict[str, dict[str, float | None]] = {
        "tokenize and pack": {
            "conversations": result.conversations,
            "tokens": result.tokens,
            "filled_share": result.fill,
            "filled_share_at_most": result.most,
            "tokens_per_s": result.tokens / result.prepare_seconds,
        },
        "assemble batches": {"tokens_per_s": result.tokens / result.batch_seconds},
    }
    for name, count, one in starts:
        figures[f"{name} start, {count} cores"] = {
            "to the first batch_s": one.seconds,
            "tokens_per_s": one.tokens / one.seconds,
            "anonymous_bytes": one.anonymous_gb * 1e9,
        }
    return (Record("data", "the input pipeline", name, each) for name, each in figures.items())


def _starts_table(starts: Sequence[tuple[str, int, Start]]) -> Table:
    table = Table(box=None)
    for name in ("start", "cores", "to the first batch", "tokens/s", "anonymous memory"):
        table.add_column(name, justify="left" if name == "start" else "right")
    for name, count, one in starts:
        table.add_row(
            name,
            f"{count}",
            f"{one.seconds:,.2f} s",
            f"{one.tokens / one.seconds:,.0f}",
            f"{one.anonymous_gb:.2f} GB",
        )
    return table
