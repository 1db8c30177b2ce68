"""Fine-tune a model: evaluate, train, evaluate again, export, and show the difference.

  ranktuner train --workdir=runs/first
  ranktuner train --config=own_data --config.data.source=rows.jsonl --workdir=runs/mine
  ranktuner train --config=my/config.py --config.loss.weighting=sft --workdir=runs/sft

Run the same command again to resume an interrupted run, or to see the results of a finished one.
Exit codes: 0 finished, 75 stopped and saved, 2 user error (flags, config or data), 1 other failure.
"""

from __future__ import annotations

import argparse
import sys

import jax
import rich.console
import rich.table

from ranktuner_jax.train.commands import flags
from ranktuner_jax.train.recipe import RunResult, train_and_evaluate
from ranktuner_jax.train.runtime import distributed
from ranktuner_jax.train.runtime.compilation import keep_compiled
from ranktuner_jax.train.runtime.preemption import PREEMPTED, Stopped
from ranktuner_jax.train.runtime.report_once import report_once

__all__ = ["FINISHED", "add_arguments", "run"]

FINISHED = 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `ranktuner train`."""
    flags.add_config(parser, default="smollm2_chain_sum")
    parser.add_argument(
        "--workdir", required=True, help="output folder: checkpoints, metrics, exported model"
    )
    distributed.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the training and prints the evaluation before and after."""
    first = True
    try:
        with report_once(args):
            config = flags.read_config_and_connect(args)
            keep_compiled()
            first = jax.process_index() == 0
            with distributed.exit_without_waiting():
                result = train_and_evaluate(config, args.workdir)
    except Stopped as stopped:
        if first:
            reason = str(stopped) or "stopped with every step saved"
            print(f"{reason}: run the same command to resume", file=sys.stderr)
        return PREEMPTED
    if first:
        _show(result)
        _write_report(args.workdir)
    return FINISHED


def _write_report(workdir: str) -> None:
    """Writes report.html; a run that has finished does not fail for want of a page."""
    try:
        # Altair takes a second to import, which a run that is refused should not wait for.
        from ranktuner_jax.diagnostics.report import write_training_report

        print(f"{'report:':<13}{write_training_report(workdir)}")
    except Exception as error:
        print(f"report.html was not written: {type(error).__name__}: {error}", file=sys.stderr)


def _show(result: RunResult) -> None:
    """Prints the evaluation before and after, and the paths of the outputs."""
    before, after = result.before, result.after
    table = rich.table.Table(title=f"held-out, before and after {result.steps} steps")
    for column in ("", "before", "after"):
        table.add_column(column, justify="right" if column else "left")
    table.add_row("plain NLL", f"{before.nll:.3f}", f"{after.nll:.3f}")
    table.add_row("token accuracy", f"{before.token_accuracy:.1%}", f"{after.token_accuracy:.1%}")
    if after.questions:
        cells = []
        for one in (before, after):
            low, high = one.accuracy_interval or (0.0, 0.0)
            cells.append(f"{one.accuracy:.1%} ({low:.1%} to {high:.1%})")
        table.add_row("answers right", *cells)
        table.caption = f"{after.questions} questions; 95 % interval in brackets"
    rich.console.Console(file=sys.stdout).print(table)
    lines = {"stopped early": result.stopped} if result.stopped else {}
    for then, now in zip(before.previews[:1], after.previews[:1], strict=True):
        lines |= {
            "question": then.question,
            "expected": then.expected,
            "before": then.completion,
            "after": now.completion,
        }
    for name, text in (lines | result.paths).items():
        print(f"{name + ':':<13}{text}")
