"""The command `ranktuner`: finds the subcommand, parses its flags and runs it."""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import sys
from collections.abc import Iterable, Sequence
from typing import NoReturn

from ranktuner_jax.errors import AlreadyReported, RunError, UserError

__all__ = ["main"]

# Command -> (module with add_arguments and run, what it does). A module is imported only when
# its command is run, so that `ranktuner --help` is fast.
COMMANDS = {
    "train": (
        "ranktuner_jax.train.commands.train",
        "fine-tune a model, and evaluate it before and after",
    ),
    "eval": ("ranktuner_jax.train.commands.eval", "evaluate a model on held-out conversations"),
    "audit": (
        "ranktuner_jax.train.commands.audit",
        "score a data set token by token, and show what each weighting does to it",
    ),
    "noise": (
        "ranktuner_jax.train.commands.noise",
        "measure how much injected noise the weights let through",
    ),
    "compare": (
        "ranktuner_jax.compare.command",
        "train with several methods over several seeds, and compare them",
    ),
    "lab": (
        "ranktuner_jax.lab.command",
        "write a small model, its text and a task, to compare methods on in minutes",
    ),
    "plan": (
        "ranktuner_jax.plan.command",
        "say whether a run fits on a TPU slice or a GPU, and how fast it is, without either",
    ),
    "export": (
        "ranktuner_jax.train.commands.export",
        "write a run's checkpoint as a Hugging Face folder",
    ),
    "data prepare": (
        "ranktuner_jax.train.commands.data_prepare",
        "tokenize data before training, or convert them to TFDS format",
    ),
    "data inspect": (
        "ranktuner_jax.train.commands.data_inspect",
        "show the text, supervision and lengths of a data set",
    ),
    "bench loss": ("ranktuner_jax.bench.loss", "measure time and memory of the losses"),
    "bench model": ("ranktuner_jax.bench.model", "measure time and memory of the model"),
    "bench train": ("ranktuner_jax.bench.train", "measure time and memory of a training step"),
    "bench data": ("ranktuner_jax.bench.data", "measure the speed of the input pipeline"),
    "bench audit": ("ranktuner_jax.bench.audit", "measure the speed of an audit"),
    "bench sample": ("ranktuner_jax.bench.sample", "measure the speed of the sampler"),
    "bench plan": ("ranktuner_jax.bench.plan", "measure steps beside the times that plans give"),
    "bench gpu": (
        "ranktuner_jax.bench.gpu.command",
        "measure a GPU in ten minutes: what is right on it, and how fast it is",
    ),
    "bench tables": ("ranktuner_jax.bench.tables", "make tables of what benchmarks measured"),
}

USER_ERROR = 2
RUN_FAILED = 1


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line.

    Args:
      argv: The arguments; `sys.argv[1:]` by default.

    Returns:
      The exit code: 0 finished, 2 user error, 1 a run that cannot continue (both are reported in
      one line on standard error), 3 a plan that does not fit, 75 preempted and saved. Any other
      exception is raised.

    Example:
      >>> main(["--help"])
      usage: ranktuner COMMAND [options]
      ...
      0
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    # Without PyTorch, which is not needed, transformers prints a warning when it is imported.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        code = _dispatch(argv)
        sys.stdout.flush()  # So that an error is caught below, not raised at exit.
        return code
    except UserError as error:
        if not isinstance(error, AlreadyReported):
            print(f"ranktuner: {error}", file=sys.stderr)
        return USER_ERROR
    except RunError as error:
        print(f"ranktuner: {error}", file=sys.stderr)
        return RUN_FAILED
    except BrokenPipeError:
        _discard_unwritten_output()  # The reader is gone, e.g. `| head`.
        return RUN_FAILED
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"ranktuner: {error}; free some space and run the command again", file=sys.stderr)
        _discard_unwritten_output()
        return RUN_FAILED


def _discard_unwritten_output() -> None:
    """Keeps Python from failing again at exit because standard output cannot be written."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _dispatch(argv: list[str]) -> int:
    name = next((n for n in (" ".join(argv[:2]), " ".join(argv[:1])) if n in COMMANDS), None)
    if name is None:
        if not argv or argv[0] in ("-h", "--help"):
            print(_usage())
            return 0
        group = [name for name in COMMANDS if name.split()[0] == argv[0]]
        if group and argv[1:] in (["-h"], ["--help"]):
            print(_usage(group))
            return 0
        raise UserError(
            f"expected a command ({', '.join(group or COMMANDS)}), got {' '.join(argv[:2])!r}; "
            "see ranktuner --help"
        )
    module = importlib.import_module(COMMANDS[name][0])
    parser = _Parser(
        prog=f"ranktuner {name}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    arguments = argv[len(name.split()) :]
    if {"-h", "--help"} & set(arguments):
        if describe := parser.get_default("describe_config"):
            parser.epilog = describe(arguments)
        print(parser.format_help())
        return 0
    args, rest = parser.parse_known_args(arguments)
    if rest and not hasattr(args, "overrides"):
        raise UserError(f"unknown argument {rest[0]!r}; see ranktuner {name} --help")
    args.overrides = rest  # "--config.key=value", for commands that take a config.
    return module.run(args)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def _usage(names: Iterable[str] = COMMANDS) -> str:
    lines = [f"  {name:<14}{COMMANDS[name][1]}" for name in names]
    return "\n".join(
        [
            "usage: ranktuner COMMAND [options]",
            "",
            *lines,
            "",
            "Run ranktuner COMMAND --help for the options of a command.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
