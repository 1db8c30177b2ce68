"""Put noise into responses, and see which weights give it the most: Table 1 of the paper.

ranktuner noise --config=own_data --config.model=runs/mine/model \
  --config.data.source=rows.jsonl --limit=200 --output=noise/mine

One span of noise a sequence; a table for each of --kinds, --lengths and --rates. Run the same
command again to go on after an interruption, or to see the table again. Exit codes: 0 finished,
75 stopped with all draws so far saved, 2 user error, 1 other failure.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Callable
from typing import TypeVar

import jax
import rich.console
import rich.markup
import rich.table

from ranktuner_jax.diagnostics import TokenScorer, audit_methods, noise
from ranktuner_jax.errors import UserError
from ranktuner_jax.evals.sampler import divisible
from ranktuner_jax.train.commands import flags
from ranktuner_jax.train.commands.progress import token_progress
from ranktuner_jax.train.config import MeshConfig
from ranktuner_jax.train.run import Run
from ranktuner_jax.train.runtime import distributed
from ranktuner_jax.train.runtime.compilation import keep_compiled
from ranktuner_jax.train.runtime.preemption import PREEMPTED, StopNotice, Stopped
from ranktuner_jax.train.runtime.report_once import report_once

__all__ = ["add_arguments", "run"]

Number = TypeVar("Number", int, float)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `ranktuner noise`."""
    plan = noise.Plan()
    flags.add_config(parser, groups=("model", "data"))
    parser.add_argument("--output", help="folder for results.json and report.html")
    parser.add_argument("--limit", type=int, help="only the first so many conversations")
    parser.add_argument(
        "--kinds",
        default=",".join(plan.kinds),
        help="what noise is, separated by commas; default: %(default)s. "
        + "; ".join(
            f"{name}: {kind.meaning.format(length='so many')}" for name, kind in noise.KINDS.items()
        ),
    )
    parser.add_argument(
        "--lengths",
        default=",".join(map(str, plan.lengths)),
        help="tokens (or words) of a span, separated by commas; default: %(default)s",
    )
    parser.add_argument(
        "--rates",
        default=",".join(map(str, plan.rates)),
        help="shares of noise among the supervised tokens, separated by commas; default: "
        "%(default)s, the paper's",
    )
    parser.add_argument(
        "--seeds", type=int, default=plan.seeds, help="draws of the noise; default: %(default)s"
    )
    distributed.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Draws and scores the noise, writes the results and prints the tables."""
    with report_once(args):
        if not args.output:
            raise UserError("--output: expected a folder for the results, got none")
        if args.limit is not None and args.limit < 1:
            raise UserError(f"--limit: expected at least 1, got {args.limit}")
        plan = noise.Plan(
            kinds=tuple(filter(None, args.kinds.split(","))),
            lengths=_numbers("lengths", args.lengths, int),
            rates=_numbers("rates", args.rates, float),
            seeds=args.seeds,
        )
        config = flags.read_config_and_connect(args)
        keep_compiled()
        opened = Run.open(
            dataclasses.replace(
                config,
                mesh=MeshConfig(data=1, fsdp=-1),  # The devices of this machine.
                train=dataclasses.replace(config.train, remat="none"),
            )
        )
        sequences = noise.read_sequences(config.data, opened.tokenizer, args.limit)
        first = jax.process_index() == 0
        settings = {
            "model": config.model,
            "model_files": opened.model_stamp,
            "dtype": config.train.compute_dtype,
            "data": dataclasses.asdict(config.data),
            "limit": args.limit,
        }
        try:
            with token_progress("noise", show=first) as progress, StopNotice() as notice:
                result = noise.run_noise(
                    lambda: TokenScorer(opened.model),
                    sequences,
                    plan,
                    pathlib.Path(args.output),
                    methods=audit_methods(config.loss.make_weighting()),
                    settings=settings,
                    batch_size=divisible(config.eval.batch_size, opened.mesh),
                    progress=progress,
                    check=notice.check,
                )
        except Stopped:
            if first:
                print("stopped: run the same command to go on", file=sys.stderr)
            return PREEMPTED
    if first:
        # Altair takes a second to import, which what is refused should not wait for.
        from ranktuner_jax.diagnostics.noise.page import write_noise_report

        page = write_noise_report(args.output)
        _show(result)
        print(f"written: {page}")
    return 0


def _numbers(name: str, text: str, to: Callable[[str], Number]) -> tuple[Number, ...]:
    try:
        return tuple(to(number) for number in text.split(",") if number)
    except ValueError as error:
        raise UserError(f"--{name}: expected numbers separated by commas, got {text!r}") from error


def _show(result: noise.Result) -> None:
    """Prints each table, with the paper's numbers under ours."""
    console = rich.console.Console(file=sys.stdout)
    if not console.is_terminal:
        console.width = 128
    for table in result.tables:
        shown = rich.table.Table(
            title=noise.title(table),
            caption="in %, with 95 % intervals over sequences like these; \\[the paper's number]",
        )
        shown.add_column("tokens by", no_wrap=True)
        for heading, _ in noise.MEASURES.values():
            shown.add_column(heading, justify="right")
        for score, row in table.rows.items():
            cells = []
            for name, measure in row.items():
                lines = [f"{100 * measure.value:.2f}"]
                lines.append(f"{100 * measure.low:.1f}–{100 * measure.high:.1f}")
                paper = noise.PAPER.get(score, {}).get("hit" if name.startswith("hit") else name)
                if paper is not None:
                    lines.append(f"[{100 * paper:g}]")
                cells.append("\n".join(map(rich.markup.escape, lines)))
            shown.add_row(score, *cells)
        console.print(shown)
        for sentence in noise.compare(table):
            console.print(f"  {sentence}", highlight=False, markup=False)
    for heading, meaning in noise.MEASURES.values():
        console.print(f"{heading}: {meaning}", highlight=False, markup=False)
