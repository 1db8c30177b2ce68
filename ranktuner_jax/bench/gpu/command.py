"""Measure a GPU in ten minutes: whether everything is right on it, and how fast and large it is.

ranktuner bench gpu --output=results
ranktuner bench gpu --output=results --small

Each part runs in a process of its own and is written to the folder as it is measured. The same
command goes on where an interrupted one was, and tries once more what failed. In the end there is
results.json, of which `ranktuner bench tables` makes tables, and tables.md, which are printed too.

Exit codes: 0 all is right, 1 something failed, which one line on standard error names, 2 user error
or no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

from ranktuner_jax.bench.gpu.parts import MACHINE, PARTS, Part
from ranktuner_jax.bench.tables import describe, markdown
from ranktuner_jax.errors import RunError, UserError

__all__ = ["add_arguments", "run"]

# What must be the same for results to be of the same machine.
_SAME = ("name", "devices", "jax")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `ranktuner bench gpu`."""
    parser.add_argument("--output", required=True, metavar="FOLDER", help="where the results go")
    parser.add_argument(
        "--small", action="store_true", help="small shapes, to try the command without a GPU"
    )
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=list(PARTS), help="the parts to run [all]"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=10.0,
        help="when to stop; what is left is for the same command once more [%(default)s]",
    )


def run(args: argparse.Namespace) -> int:
    """Runs the parts that are not done, and prints the tables of all."""
    deadline = time.monotonic() + 60 * args.minutes
    output = pathlib.Path(args.output)
    machine = _claim(output, args.small)
    failed = []
    for name in args.parts:
        done = output / f"{name}.jsonl"
        if done.exists():
            print(f"{name}: measured before", file=sys.stderr, flush=True)
        elif (left := deadline - time.monotonic()) <= 0:
            failed.append(f"{name}: no time left; run the same command once more")
        elif failures := _run_part(name, done, machine, args.small, left):
            failed += failures
    found = [record for name in PARTS for record in _read(output / f"{name}.jsonl")]
    (output / "results.json").write_text(json.dumps(found, indent=1))
    (output / "tables.md").write_text(markdown(found) + "\n")
    print(markdown(found))
    for failure in failed:
        print(f"ranktuner bench gpu: {failure}", file=sys.stderr)
    return 1 if failed else 0


def _claim(output: pathlib.Path, small: bool) -> dict[str, Any]:
    """The machine, with the peak that it had when the folder was begun."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output: expected a folder that can be written: {error}") from None
    found = []
    with (output / "machine.log").open("w") as log, contextlib.suppress(RunError):
        found = list(_lines(MACHINE, small, log))
    if not found:
        reason = (output / "machine.log").read_text().strip().splitlines()[-1:]
        raise UserError(
            "bench gpu: expected a GPU that JAX finds, got none"
            + "".join(f" ({line})" for line in reason)
            + "; see ranktuner-jax[cuda], or try the command with --small"
        )
    about = {"small": small, "machine": found[0]}
    file = output / "about.json"
    if not file.exists():
        file.write_text(json.dumps(about, indent=1))
        return found[0]
    kept = json.loads(file.read_text())
    for what, one, other in [
        ("--small", kept["small"], small),
        *((key, kept["machine"][key], found[0][key]) for key in _SAME),
    ]:
        if one != other:
            raise UserError(
                f"--output: {output} holds results with another {what}: expected {one}, got "
                f"{other}; take another folder"
            )
    return kept["machine"]


def _run_part(
    name: str, done: pathlib.Path, machine: Mapping[str, Any], small: bool, left: float
) -> list[str]:
    """Runs a part, writes its records as they come, and says what failed."""
    print(f"{name} ...", file=sys.stderr, flush=True)
    log, partial = done.with_suffix(".log"), _partial(done)
    part = dataclasses.replace(PARTS[name], seconds=min(left, PARTS[name].seconds))
    failed, start = [], time.monotonic()
    with log.open("w") as errors, partial.open("w") as out:
        try:
            for record in _lines(part, small, errors):
                print(json.dumps({**record, "machine": machine}), file=out, flush=True)
                text = record["failed"] or describe(record["figures"])
                print(f"  {record['case']}: {text}", file=sys.stderr, flush=True)
                if record["failed"]:
                    failed.append(f"{name}: {record['case']}: {record['failed']}")
        except RunError as error:
            last = log.read_text().strip().splitlines()[-1:]
            failed.append(": ".join([name, str(error), *last]) + f"; see {log}")
    print(f"{name}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    if not failed:
        partial.rename(done)  # Only now is it not measured once more.
    return failed


def _partial(done: pathlib.Path) -> pathlib.Path:
    return done.with_suffix(".partial.jsonl")


def _read(done: pathlib.Path) -> list[dict[str, Any]]:
    """The records of a part; of one that failed, those that there are."""
    for file in (done, _partial(done)):
        if file.exists():
            return [json.loads(line) for line in file.read_text().splitlines()]
    return []


def _lines(part: Part, small: bool, log: TextIO) -> Iterator[dict[str, Any]]:
    """What a part's process writes.

    Raises:
      RunError: If it fails, or takes too long.
    """
    paths = os.pathsep.join(path for path in sys.path if path)
    job = json.dumps([part.module, small])
    process = subprocess.Popen(
        [sys.executable, "-m", "ranktuner_jax.bench.gpu.parts", job],
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
    )
    late = threading.Event()

    def stop() -> None:
        late.set()
        process.kill()

    timer = threading.Timer(part.seconds, stop)
    timer.start()
    try:
        assert process.stdout is not None
        # If this process ends, the next line ends that one.
        for line in process.stdout:
            yield json.loads(line)
        if code := process.wait():
            how = f"stopped after {part.seconds:.0f} s" if late.is_set() else f"code {code}"
            raise RunError(how)
    finally:
        timer.cancel()
        process.kill()
        process.wait()
