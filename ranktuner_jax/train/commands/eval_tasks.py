"""Benchmarks from the command line: `ranktuner eval --tasks=...`."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterator, Mapping

import jax
import rich.console
import rich.progress
import rich.table

from ranktuner_jax import data, evals
from ranktuner_jax.data.encode import conversations
from ranktuner_jax.errors import UserError
from ranktuner_jax.evals import benchmarks, engines
from ranktuner_jax.train.commands import benchmark_flags
from ranktuner_jax.train.config import TrainConfig
from ranktuner_jax.train.run import Run
from ranktuner_jax.train.runtime.preemption import PREEMPTED, StopNotice, Stopped

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that go with `--tasks`."""
    group = parser.add_argument_group("benchmarks")
    group.add_argument("--output", help="folder for result.json and samples.jsonl")
    benchmark_flags.add_arguments(group)
    group.add_argument("--regrade", action="store_true", help="grade the answers of --output again")
    group.add_argument(
        "--against",
        metavar="FOLDER",
        help="another evaluation of the same questions, to show the differences",
    )
    group.add_argument(
        "--overlap",
        metavar="SOURCE",
        help="training data: count the questions that share 13 words in a row with it",
    )
    group.add_argument(
        "--engine", choices=("local", "openai"), default="local", help="what writes the answers"
    )
    group.add_argument("--base_url", help="of an OpenAI-compatible server, with --engine=openai")


def run(args: argparse.Namespace, config: TrainConfig) -> int:
    """Evaluates the benchmarks, and prints a table."""
    if not args.output:
        raise UserError("--output: expected a folder for the answers, got none")
    sampling = benchmark_flags.sampling(args)
    tasks = benchmark_flags.read_tasks(args)
    against = _read_against(args.against, tasks) if args.against else {}
    first = jax.process_index() == 0
    with _progress(first) as report:
        suite = evals.Suite(
            tasks, sampling, args.output, ks=benchmark_flags.ks(args), report=report
        )
        if args.regrade:
            scores = suite.grade() if first else {}
        else:
            engine = _engine(args, config)
            try:
                with StopNotice():
                    scores = suite.run(engine)
            except Stopped:
                report.close()
                print("stopped: run the same command to go on", file=sys.stderr)
                return PREEMPTED
    if first and args.json:
        print(json.dumps({name: of_task.to_json() for name, of_task in scores.items()}, indent=1))
    elif first:
        _show(scores, against)
        if args.overlap:
            _show_overlap(args.overlap, tasks, config.data)
    return 0


def _engine(args: argparse.Namespace, config: TrainConfig) -> engines.Engine:
    if args.engine == "openai":
        if not args.base_url or not args.model:
            raise UserError(
                "--engine=openai: expected --base_url, such as http://localhost:8000/v1, and "
                "--model, the name that the server gives the model"
            )
        return engines.OpenAIEngine(args.base_url, args.model)
    opened = Run.open(config)
    return engines.LocalEngine(
        opened.model,
        opened.tokenizer,
        name=opened.model_name,
        enable_thinking=config.data.enable_thinking,
        cache_gb=args.cache_gb,
    )


class _Report:
    """Shows how many answers there are and how fast they come: a bar on a terminal, else lines."""

    def __init__(self, bar: rich.progress.Progress | None, silent: bool) -> None:
        self._bar, self._silent = bar, silent
        self._tasks: dict[tuple[str, str], rich.progress.TaskID] = {}
        self._start: dict[tuple[str, str], tuple[float, int]] = {}

    def __call__(self, name: str, what: str, done: int, total: int, tokens: int) -> None:
        start, before = self._start.setdefault((name, what), (time.monotonic(), done))
        seconds = max(time.monotonic() - start, 1e-3)
        status = f"{tokens / seconds:,.0f} tokens/s" if tokens else ""
        if self._bar is None:
            # Ten lines.
            if done > before and not self._silent and done * 10 // total > (done - 1) * 10 // total:
                left = (total - done) * seconds / (done - before)
                status = f"  {status}" * bool(status)
                print(
                    f"{name}: {done:,} of {total:,} {what}{status}  {left / 60:,.0f} min left",
                    file=sys.stderr,
                    flush=True,
                )
            return
        if (name, what) not in self._tasks:
            self._tasks[name, what] = self._bar.add_task(f"{name} {what}", status="")
        self._bar.update(self._tasks[name, what], completed=done, total=total, status=status)

    def close(self) -> None:
        """Ends the bar."""
        if self._bar is not None:
            self._bar.stop()


@contextlib.contextmanager
def _progress(first: bool) -> Iterator[_Report]:
    bar = None
    if first and sys.stderr.isatty():
        bar = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TextColumn("{task.fields[status]}"),
            rich.progress.TimeRemainingColumn(),
            console=rich.console.Console(file=sys.stderr),
        )
        bar.start()
    report = _Report(bar, silent=not first)
    try:
        yield report
    finally:
        report.close()


def _read_against(folder: str, tasks: benchmark_flags.Tasks) -> dict[str, evals.Scores]:
    """The scores of another evaluation of the same questions, by benchmark."""
    found = evals.read_scores(folder)
    for benchmark, questions in tasks:
        other, _ = found.get(benchmark.name, ("", None))
        if other != benchmarks.digest(questions):
            raise UserError(
                f"--against: expected the same {len(questions)} questions of {benchmark.name} in "
                f"{folder}, got {'others' if other else 'none'}; evaluate both with the same flags"
            )
    return {benchmark.name: found[benchmark.name][1] for benchmark, _ in tasks}


def _show(scores: Mapping[str, evals.Scores], against: Mapping[str, evals.Scores]) -> None:
    table = rich.table.Table(caption="95 % intervals are over questions like these")
    for column in ("benchmark", "score", "share", "95 % interval"):
        table.add_column(column, no_wrap=True)
    for name, of_task in scores.items():
        for row, (score, share) in enumerate(of_task.shares.items()):
            interval = f"{share.low:.1%} to {share.high:.1%}"
            table.add_row("" if row else name, _words(score), f"{share.value:.1%}", interval)
    rich.console.Console(file=sys.stdout).print(table)
    for name, of_task in scores.items():
        facts = [f"{of_task.questions:,} questions", f"{of_task.seconds:,.0f} s"]
        if of_task.mean_tokens:
            facts[1:1] = [
                f"{of_task.samples} answer{'s' * (of_task.samples > 1)} each",
                f"{of_task.finished:.1%} finished",
                f"{of_task.mean_tokens:,.0f} tokens on average",
            ]
        print(f"{name}: {', '.join(facts)}")
    for name, other in against.items():
        for share_name, change in evals.compare_scores(scores[name], other).items():
            print(
                f"{name}, {_words(share_name)}: {100 * change.value:+.1f} points "
                f"({100 * change.low:+.1f} to {100 * change.high:+.1f}) against the other"
            )


def _words(name: str) -> str:
    return name.replace("_", " ")


def _show_overlap(source: str, tasks: benchmark_flags.Tasks, settings: data.DataConfig) -> None:
    """Prints how many questions of each benchmark share words with training data."""
    for benchmark, questions in tasks:
        summary = data.Summary(settings.row_length)
        texts = (
            message["content"]
            for conversation in conversations(settings, source, settings.split, summary)
            for message in conversation.messages
        )
        found = evals.overlapping([question.text for question in questions], texts)
        print(
            f"{benchmark.name}: {len(found)} of {len(questions)} questions share 13 words in a row "
            f"with {source}"
        )
