"""Score a data set token by token, without training: what each weighting would do to it.

ranktuner audit --config.data.source=rows.jsonl --output=audits/first
ranktuner audit --config=gsm8k --config.model=Qwen/Qwen3-0.6B --limit=1000 --output=audits/qwen
ranktuner audit --config=own_data --config.model=runs/mine/model --config.data.source=rows.jsonl \
  --split=holdout --output=audits/after --against=audits/before

The folder gets tokens.parquet, one row for each supervised token with its statistics and its weight
under every method; conversations.jsonl, 20 conversations whole; audit.json; and report.html. With
--against, moved.html shows which tokens were learnt and lost since another audit. Run the same
command again to go on after an interruption. Exit codes: 0 finished, 75 stopped with all parts so
far saved, 2 user error, 1 other failure.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import jax
import rich.console
import rich.table

import ranktuner_jax
from ranktuner_jax import data, models
from ranktuner_jax.diagnostics import audit_methods
from ranktuner_jax.diagnostics.audit import Audit
from ranktuner_jax.errors import UserError
from ranktuner_jax.evals.processes import on_first_process
from ranktuner_jax.train.commands import flags
from ranktuner_jax.train.commands.progress import token_progress
from ranktuner_jax.train.config import TrainConfig, to_dict
from ranktuner_jax.train.run import Run, with_adapter
from ranktuner_jax.train.runtime import distributed
from ranktuner_jax.train.runtime.compilation import keep_compiled
from ranktuner_jax.train.runtime.preemption import PREEMPTED, StopNotice, Stopped
from ranktuner_jax.train.runtime.report_once import report_once

__all__ = ["add_arguments", "open_audit", "run"]

LEFT_OUT = ("truncated", "dropped", "skipped")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `ranktuner audit`."""
    flags.add_config(parser, default="own_data", groups=("model", "data", "loss", "eval", "mesh"))
    flags.add_adapter(parser)
    parser.add_argument("--output", required=True, help="folder for the result")
    parser.add_argument("--split", help="split to audit; default: data.split, the training split")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N conversations")
    parser.add_argument(
        "--against",
        metavar="FOLDER",
        help="a finished audit of the same tokens, such as that of the model before training, to "
        "show what moved since",
    )
    distributed.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Audits the data, in the compute_dtype of the config."""
    with report_once(args), distributed.exit_without_waiting():
        if args.limit is not None and args.limit < 1:
            raise UserError(f"--limit: expected at least 1, got {args.limit}")
        opened = Run.open(_for_audit(flags.read_config_and_connect(args), args.adapter))
        if args.against is not None:  # Refused now, not after the work.
            from ranktuner_jax.diagnostics.report import audited

            on_first_process(lambda: audited.open_audit(args.against).rows)
        keep_compiled()
        first = jax.process_index() == 0
        with token_progress("audit", show=first) as progress, StopNotice() as stop:
            try:
                audit = open_audit(
                    opened,
                    args.output,
                    split=args.split,
                    limit=args.limit,
                    progress=progress,
                    check_stop=stop.check,
                )
                if not audit.claim():
                    audit.run(opened.model)
            except Stopped:
                print("stopped: run the same command to go on", file=sys.stderr)
                return PREEMPTED
        if first:
            # Altair takes a second to import, which an audit that is refused should not wait for.
            from ranktuner_jax.diagnostics.report import write_audit_report, write_moved_report

            report = write_audit_report(pathlib.Path(args.output))
            _show(audit.result())
            print(f"report: {report}")
            if args.against is not None:
                moved = pathlib.Path(args.output, "moved.html")
                print(f"what moved: {write_moved_report(args.against, args.output, moved)}")
    return 0


def _for_audit(config: TrainConfig, adapter: str | None) -> TrainConfig:
    """The config without what is for training alone, and with these adapters."""
    config = with_adapter(config, adapter or config.lora.adapter)
    return dataclasses.replace(config, train=dataclasses.replace(config.train, remat="none"))


def open_audit(
    opened: Run,
    output: str,
    *,
    split: str | None = None,
    limit: int | None = None,
    **options: Any,
) -> Audit:
    """The audit of a run's initial model on its data; the model is not loaded yet.

    Args:
      opened: The run.
      output: The folder of the audit.
      split: The split; that of the config's training data by default.
      limit: Only the first so many conversations.
      **options: Further arguments of `Audit`.

    Raises:
      UserError: If the data cannot be read, or the model and the data do not fit.
    """
    config = opened.config
    # The audit packs by itself, so that it can write in the order of the data.
    unpacked = dataclasses.replace(config.data, packing=False)
    rows = data.load_rows(unpacked, opened.tokenizer, split=split, limit=limit)
    sources = [source for source, _ in config.data.mixture] or [config.data.source]
    everything = to_dict(config)
    read = ("model", "data", "loss", *(["lora"] if config.lora.is_on else []))
    return Audit(
        rows,
        opened.tokenizer,
        output,
        decoder=models.read_config(opened.folder),
        methods=audit_methods(opened.weighting),
        about={
            "model": config.model + f" with {config.lora.adapter}" * bool(config.lora.adapter),
            "source": ", ".join(sources),
            "split": split or config.data.split,
            "config": {name: everything[name] for name in read}
            | {"compute_dtype": config.train.compute_dtype},
        },
        identity={"files": opened.model_stamp, "version": ranktuner_jax.__version__},
        batch_size=config.eval.batch_size,
        packing=config.data.packing,
        **options,
    )


def _show(audit: Mapping[str, Any]) -> None:
    print(
        f"{audit['tokens']:,} supervised tokens in {audit['conversations']:,} conversations, "
        f"{audit['tokens_per_second']:,.0f} tokens/s"
        + "".join(f", {audit[what]:,} {what}" for what in LEFT_OUT if audit[what])
    )
    table = rich.table.Table(
        caption="effective tokens: (sum of weights)² / (number × sum of squares)"
    )
    table.add_column("method")
    for column in ("mean weight", "effective tokens", "correlation with ranktuner"):
        table.add_column(column, justify="right")
    for name, of_method in audit["weights"].items():
        correlation = of_method["correlation"]
        table.add_row(
            name,
            f"{of_method['mean']:.3f}",
            f"{of_method['effective_share']:.1%}",
            "constant" if correlation is None else f"{correlation:.2f}",
        )
    rich.console.Console(file=sys.stdout).print(table)
