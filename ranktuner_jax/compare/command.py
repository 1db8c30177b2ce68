"""Compare methods: train each from the same model over several seeds, and show the differences.

ranktuner compare --methods=sft,dft,ranktuner,ranktuner:base=one --output=compared/first
ranktuner compare --config=own_data --config.data.source=rows.jsonl --seeds=5 --output=compared/mine
ranktuner compare --config=lab_cell --tasks=lab/ood.jsonl --grader=number \
  --retain=lab/retention.jsonl --output=compared/lab

First every method is trained at every learning rate of --rates, on seeds of their own, and the rate
with the best primary score is chosen; where it lies at an end of the grid, the grid is widened for
all methods. Then each is trained once a seed, in the same order of the data for all methods. The
primary score is pass@1 of the config's own held-out questions, or of the task that --primary names.

The folder gets results.json and report.html; runs/ holds each run's folder. Run the same command
again to go on after an interruption; --seeds, --methods and --rates may grow. With --part=K/N, one
of N processes does every N-th run, and part 0 writes the result: see launch/slurm.sbatch. Exit
codes: 0 finished, 75 stopped, or waiting for the runs of other parts, 2 user error, 1 other
failure.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import pathlib
import sys
from collections.abc import Sequence

import rich.console

from ranktuner_jax.compare.comparison import Comparison
from ranktuner_jax.compare.measure import OWN, Measurements
from ranktuner_jax.compare.progress import run_progress
from ranktuner_jax.compare.search import default_rates
from ranktuner_jax.compare.tables import show
from ranktuner_jax.compare.variants import read_variants
from ranktuner_jax.errors import UserError
from ranktuner_jax.train import Run, Stopped, TrainConfig, load_config
from ranktuner_jax.train.commands import benchmark_flags, flags
from ranktuner_jax.train.runtime.compilation import keep_compiled
from ranktuner_jax.train.runtime.preemption import PREEMPTED, StopNotice

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `ranktuner compare`."""
    flags.add_config(parser, default="smollm2_chain_sum")
    flags.add_adapter(parser)
    parser.add_argument("--output", required=True, help="folder for the runs and the result")
    parser.add_argument(
        "--methods",
        default="sft,dft,ranktuner,ranktuner:base=one",
        help="methods separated by commas, each with options, such as ranktuner:base=one:clip=3 "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--baseline",
        default="sft",
        help="the method that the others are compared with (default: %(default)s)",
    )
    parser.add_argument(
        "--primary",
        default="",
        metavar="TASK",
        help=f"the task whose score decides: {OWN}, the config's own questions, or one of --tasks "
        "(default: the first of these that there is)",
    )
    parser.add_argument(
        "--seeds", type=int, default=5, help="runs of each method (default: %(default)s)"
    )
    parser.add_argument(
        "--rates",
        help="learning rates to search, separated by commas; one alone is taken as it is "
        "(default: a third of the config's, itself, and three times as much)",
    )
    parser.add_argument(
        "--search_seeds",
        type=int,
        default=2,
        help="runs of each method at each learning rate (default: %(default)s)",
    )
    parser.add_argument(
        "--normalize",
        default="tokens",
        help="tokens, or tokens,weights for a second analysis in which the loss is divided by the "
        "sum of the weights (default: %(default)s)",
    )
    parser.add_argument(
        "--retain",
        default="",
        metavar="FILE",
        help="rows that the model knew before; their plain NLL shows what is forgotten",
    )
    parser.add_argument(
        "--keep_models", action="store_true", help="keep the checkpoints and models of all runs"
    )
    parser.add_argument(
        "--part", default="0/1", metavar="K/N", help="do every N-th run, beginning with the K-th"
    )
    benchmark_flags.add_arguments(parser.add_argument_group("benchmarks"))


def run(args: argparse.Namespace) -> int:
    """Does the runs that are missing, and shows the result."""
    for name in ("seeds", "search_seeds"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name}: expected at least 1, got {getattr(args, name)}")
    benchmark_flags.refuse_without_tasks(args)
    variants = read_variants(
        args.methods, args.normalize, lambda more: _load(args, more), args.baseline
    )
    config = variants[0].config
    measurements = _measurements(args)
    rates, part = _rates(args.rates, config), _part(args.part)
    opened = Run.open(config)
    primary = measurements.primary(opened.held_out.questions, args.primary)
    measurements.check(opened)
    keep_compiled()
    with run_progress() as progress:
        try:
            with StopNotice():
                comparison = Comparison(
                    pathlib.Path(args.output),
                    variants,
                    primary=primary,
                    rates=rates,
                    seeds=args.seeds,
                    search_seeds=args.search_seeds,
                    measurements=measurements,
                    part=part,
                    started=progress,
                )
                finished = comparison.run()
        except Stopped:
            print("stopped: run the same command to go on", file=sys.stderr)
            return PREEMPTED
    if not finished:
        print(
            f"waiting for {comparison.missing()} runs of other parts: run the same command again "
            "when they are done",
            file=sys.stderr,
        )
        return PREEMPTED
    if part[0]:
        print(f"the runs of part {args.part} are done; part 0 writes the result")
        return 0
    show(comparison.write_results(args.baseline), rich.console.Console(file=sys.stdout))
    # Altair takes a second to import, which a comparison that is refused should not wait for.
    from ranktuner_jax.compare.page import write_compare_report

    print(f"report: {write_compare_report(args.output)}")
    return 0


def _load(args: argparse.Namespace, more: Sequence[str]) -> TrainConfig:
    """The config with the flags and further overrides; its runs show no progress of their own."""
    adapter = [f"--config.lora.adapter={args.adapter}"] if args.adapter else []
    config = load_config(args.config, [*args.overrides, *adapter, *more])
    quiet = dataclasses.replace(config.telemetry, progress=False)
    return dataclasses.replace(config, telemetry=quiet)


def _measurements(args: argparse.Namespace) -> Measurements:
    return Measurements(
        tasks=benchmark_flags.read_tasks(args) if args.tasks else (),
        sampling=benchmark_flags.sampling(args),
        ks=benchmark_flags.ks(args),
        cache_gb=args.cache_gb,
        retain=args.retain,
        keep_models=args.keep_models,
    )


def _rates(text: str | None, config: TrainConfig) -> list[float]:
    if text is None:
        name, given = "optimizer.learning_rate", [config.optimizer.learning_rate]
    else:
        name = "--rates"
        try:
            given = sorted({float(rate) for rate in text.split(",")})
        except ValueError as error:
            raise UserError(
                f"--rates: expected numbers separated by commas, got {text!r}"
            ) from error
    if wrong := [rate for rate in given if not 0 < rate < math.inf]:
        raise UserError(f"{name}: expected numbers above 0, got {wrong[0]}")
    return default_rates(given[0]) if text is None else given


def _part(text: str) -> tuple[int, int]:
    k, slash, n = text.partition("/")
    if not (slash and k.isdigit() and n.isdigit() and int(k) < int(n)):
        raise UserError(f"--part: expected K/N with K from 0 to N - 1, such as 0/4, got {text!r}")
    return int(k), int(n)
