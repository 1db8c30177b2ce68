"""The flags that choose benchmarks, and how answers to them are drawn."""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Callable, Sequence

from ranktuner_jax import evals
from ranktuner_jax.errors import UserError
from ranktuner_jax.evals import benchmarks, engines

__all__ = [
    "Tasks",
    "add_arguments",
    "ks",
    "read_tasks",
    "refuse_without_tasks",
    "sampling",
]

Tasks = Sequence[tuple[benchmarks.Benchmark, Sequence[benchmarks.Question]]]


def add_arguments(group: argparse._ActionsContainer) -> None:
    """Adds the flags."""
    defaults = engines.Sampling()
    group.add_argument(
        "--tasks",
        metavar="NAMES",
        help=f"benchmarks, separated by commas: {', '.join(evals.BENCHMARKS)}; or a .jsonl or "
        ".parquet file of your own with a column answer",
    )
    group.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="FOLDER|NAME=SOURCE",
        help="a folder with the files of the benchmarks, or the rows of one: a .jsonl or .parquet "
        "file, hub:owner/name or a TFDS name; default: the hub",
    )
    group.add_argument(
        "--grader",
        default="",
        help="how a file of your own is graded: number, "
        "math, choice, exact, python, or a task that the config file registers",
    )
    group.add_argument("--system", default="", help="the system prompt for a file of your own")
    group.add_argument("--limit", type=int, help="only the first so many questions of each")
    group.add_argument("--samples", type=int, default=defaults.samples, help="answers a question")
    group.add_argument(
        "--temperature", type=float, default=defaults.temperature, help="0 is greedy (default)"
    )
    group.add_argument("--top_p", type=float, default=defaults.top_p)
    group.add_argument("--top_k", type=int, default=defaults.top_k, help="0 for all tokens")
    group.add_argument(
        "--max_new_tokens", type=int, default=defaults.max_new_tokens, help="default: 1024"
    )
    group.add_argument("--seed", type=int, default=defaults.seed, help="of the sampling")
    group.add_argument(
        "--k", default="", help="values of k of pass@k; default: 1,2,4,... up to the samples"
    )
    group.add_argument(
        "--cache_gb", type=float, default=1.0, help="memory for keys and values of all devices"
    )


def refuse_without_tasks(
    args: argparse.Namespace, add: Callable[[argparse.ArgumentParser], None] = add_arguments
) -> None:
    """Refuses flags that do nothing without `--tasks`, unless they are at their defaults.

    Args:
      args: The arguments of a command.
      add: Adds these flags, `--tasks` among them.

    Raises:
      UserError: If there is one, and no `--tasks`.
    """
    if args.tasks:
        return
    parser = argparse.ArgumentParser()
    add(parser)
    for name, default in vars(parser.parse_args([])).items():
        if getattr(args, name) != default:
            raise UserError(
                f"--{name}: expected --tasks beside it, got none; name benchmarks, or leave it out"
            )


def sampling(args: argparse.Namespace) -> engines.Sampling:
    """How answers are drawn."""
    return engines.Sampling(
        samples=args.samples,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        max_new_tokens=args.max_new_tokens,
        seed=args.seed,
    )


def ks(args: argparse.Namespace) -> list[int]:
    """The values of k that the user asks for."""
    try:
        return [int(number) for number in args.k.split(",")] if args.k else []
    except ValueError as error:
        raise UserError(f"--k: expected numbers separated by commas, got {args.k!r}") from error


def read_tasks(args: argparse.Namespace) -> Tasks:
    """The benchmarks with their questions.

    Raises:
      UserError: If one is unknown or its questions cannot be read, or a flag does nothing.
    """
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit: expected at least 1, got {args.limit}")
    sources = _sources(args.data)
    names = [name.strip() for name in args.tasks.split(",")]
    if (args.grader or args.system) and all(name in evals.BENCHMARKS for name in names):
        raise UserError(
            "--grader, --system: expected a file of your own in --tasks, got benchmarks, which "
            "have theirs; leave them out"
        )
    if unknown := sorted(set(sources) - {"", *names}):
        raise UserError(f"--data: expected a name in --tasks={args.tasks}, got {unknown[0]!r}")
    tasks = []
    for name in names:
        benchmark = evals.find_benchmark(name, grader=args.grader, system=args.system)
        tasks.append((benchmark, evals.read_questions(benchmark, sources, args.limit)))
    return tasks


def _sources(given: Sequence[str]) -> dict[str, str]:
    """`--data` as `read_questions` takes it."""
    sources = {}
    for text in given:
        name, equals, source = text.partition("=")
        folder = pathlib.Path(text).expanduser()
        if folder.is_dir():
            sources[""] = str(folder)
        elif equals:
            sources[name] = source
        else:
            raise UserError(f"--data: expected a folder or NAME=SOURCE, got {text!r}")
    return sources
