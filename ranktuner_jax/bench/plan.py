"""Measure training steps beside the times that `ranktuner plan` gives for them.

ranktuner bench plan
ranktuner bench plan --config=own_data --config.model=path/to/folder --repeats=10 --json

Three shapes of the config's step are planned for the devices of this machine, and then taken, with
a model of random weights and random tokens, all of them supervised: of the model, its config.json
is enough. A CPU's peak and bandwidth are measured first, so that the machine has to be idle.

Exit codes: 0 all steps take between the shortest and the longest time of their plans, 1 not all.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Iterator, Sequence

import jax

from ranktuner_jax.bench.gpu.shapes import random_batch
from ranktuner_jax.bench.records import Record, add_json, show
from ranktuner_jax.errors import UserError
from ranktuner_jax.plan.plan import plan_for
from ranktuner_jax.plan.program import read_model
from ranktuner_jax.train import Run, TrainConfig, load_config, make_mesh
from ranktuner_jax.train.commands import flags
from ranktuner_jax.train.random_model import random_model

__all__ = ["add_arguments", "run"]

# Keys of a config: its own step, and two that differ from the default config's in all that decides
# what a step computes and reads. Those that are given come after them.
_SHAPES: tuple[tuple[str, ...], ...] = (
    (),
    (
        "--config.train.compute_dtype=float32",
        "--config.train.batch_size=4",
        "--config.data.row_length=256",
        "--config.train.remat=none",
    ),
    (
        "--config.train.compute_dtype=float32",
        "--config.train.batch_size=2",
        "--config.train.accumulation=2",
        "--config.data.row_length=512",
        "--config.train.remat=dots",
    ),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `ranktuner bench plan`."""
    groups = ("model", "data", "loss", "optimizer", "train", "mesh")
    flags.add_config(parser, default="smollm2_chain_sum", groups=groups)
    parser.add_argument(
        "--repeats", type=int, default=5, help="timed steps per shape [%(default)s]"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Prints what each step took beside its plan."""
    if args.repeats < 1:
        raise UserError(f"--repeats: expected at least 1, got {args.repeats}")
    configs = [load_config(args.config, [*keys, *args.overrides]) for keys in _SHAPES]
    records = [_record(config, args.repeats) for config in configs]
    show(records, as_json=args.json)
    return int(any(record.failed for record in records))


def _record(config: TrainConfig, repeats: int) -> Record:
    """The time of a step of the config, and the range that its plan gives."""
    devices = jax.devices()
    if devices[0].platform == "cpu":
        devices = devices[:1]  # What is measured of a CPU, one device has to itself.
    train, length = config.train, config.data.row_length
    case = (
        f"{train.batch_size} rows of {length}, {train.compute_dtype}, remat {train.remat}, "
        f"{train.accumulation} micro-batch{'es' * (train.accumulation > 1)}"
    )
    plan = plan_for(config, devices, f"{devices[0].platform}:{len(devices)}")
    low, high = plan.roofline.low, plan.roofline.high
    seconds = []
    for took in _steps(config, devices, repeats):
        seconds.append(took)
        print(f"{len(seconds)}/{repeats}  {case}: {took:.3g} s", file=sys.stderr, flush=True)
    median = statistics.median(seconds)
    figures = {
        "shortest_s": low,
        "median_s": median,
        "longest_s": high,
        "longest ÷ shortest": high / low,
        "flops_per_s": plan.roofline.flops * len(devices) / median,
    }
    inside = low <= median <= high
    failed = "" if inside else "the median is not between the shortest and the longest time"
    return Record("plan", config.model, case, figures, train.compute_dtype, failed)


def _steps(config: TrainConfig, devices: Sequence[jax.Device], repeats: int) -> Iterator[float]:
    """The seconds of each step of a trainer, after one that compiles."""
    # The length of the run is part of the schedule only, and must not depend on data.
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, epochs=None))
    opened = Run.open(config)
    opened.mesh = make_mesh(config.mesh, devices)
    shape = dataclasses.replace(read_model(config), vocab_multiple=opened.mesh.shape["tensor"])
    opened.model = random_model(config, shape, opened.mesh)
    trainer = opened.trainer()
    batch = random_batch(shape, config.train.batch_size, config.data.row_length)
    for repeat in range(repeats + 1):
        start = time.perf_counter()
        jax.block_until_ready((trainer.step(batch), trainer.state))
        if repeat:
            yield time.perf_counter() - start
