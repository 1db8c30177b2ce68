"""Plan a run: compile its step for devices that need not be there, and say what it needs.

ranktuner plan --config=numina_math --topology=v5e:8x8
ranktuner plan --config=numina_math --topology=v5p:4x4x4 --config.mesh.tensor=1 --json
ranktuner plan --config=numina_math --topology=v5e:8x8 --search

The real step is compiled, for one device of the topology, without a weight: of the model, its
config.json is enough. A TPU's needs libtpu (pip install 'ranktuner-jax[tpu]'), a GPU's the CUDA
plugin (ranktuner-jax[cuda]); neither needs the device. It takes minutes for a large model.

Memory is XLA's: arguments, outputs and the sum of the temporary arrays, which decides whether the
step fits. Times are a roofline: what the program computes, reads and sends, loops counted as often
as they run, at the peak of the device; every position counts as supervised. --search tries meshes,
micro-batches, remat policies and dtypes of the first moment.

Exit codes: 0 it fits, 3 nothing fits, 2 user error or no plan can be made.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ranktuner_jax.errors import UserError
from ranktuner_jax.plan import search, tables, topologies
from ranktuner_jax.plan.chips import chip_of
from ranktuner_jax.plan.memory import HEADROOM, available_gb
from ranktuner_jax.plan.plan import make_plan
from ranktuner_jax.plan.program import TooLargeError, read_model
from ranktuner_jax.train.commands import flags
from ranktuner_jax.train.config import TrainConfig

__all__ = ["NOTHING_FITS", "add_arguments", "run"]

NOTHING_FITS = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `ranktuner plan`."""
    groups = ("model", "data", "loss", "optimizer", "train", "mesh")
    flags.add_config(parser, default="smollm2_chain_sum", groups=groups)
    parser.add_argument("--topology", required=True, help=topologies.TOPOLOGIES)
    parser.add_argument(
        "--search",
        nargs="?",
        type=int,
        const=8,
        metavar="N",
        help="compile other settings too, the N most promising ones (8 if N is left out)",
    )
    parser.add_argument("--json", action="store_true", help="print the plan as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Prints the plan."""
    config = flags.read_config(args)
    if args.search is not None:
        if args.search < 1:
            raise UserError(f"--search: expected at least 1, got {args.search}")
        return _search(config, args)
    try:
        plan = make_plan(config, args.topology)
    except TooLargeError as error:
        if args.json:
            print(json.dumps({"fits": False, "reason": str(error)}))
        print(f"ranktuner: {error}", file=sys.stderr)
        return NOTHING_FITS
    if args.json:
        print(json.dumps(plan.to_json()))
    else:
        tables.show_plan(plan, Console(highlight=False))
    return 0 if plan.fits else NOTHING_FITS


def _search(config: TrainConfig, args: argparse.Namespace) -> int:
    devices = topologies.devices(args.topology)
    chip = chip_of(devices[0], config.train.compute_dtype)
    available = HEADROOM * available_gb(chip, len(devices))
    found = search.candidates(config, read_model(config), len(devices), available)
    if not found:
        raise UserError(
            f"--search: the parameters, moments and gradients of {config.model} alone take more "
            f"than {available:.1f} GB on each of {len(devices)} devices, or no mesh divides a "
            f"batch of {config.train.batch_size} rows; take more devices, or another batch size"
        )
    command = ["plan", f"--config={args.config}", f"--topology={args.topology}", "--json"]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task("compiling", total=min(args.search, len(found)))
        tried = search.rank(
            search.try_all(
                found,
                config,
                [*command, *args.overrides],
                args.search,
                lambda count, _: progress.update(task, completed=count),
            )
        )
    fits = bool(tried[0].plan and tried[0].plan["fits"])
    if args.json:
        print(json.dumps(_to_json(tried)))
    else:
        console = Console(highlight=False)
        tables.show_search(tried, console)
        if fits:
            keys = " ".join(f"--config.{k}={v}" for k, v in tried[0].settings.items())
            console.print(f"the fastest that fits: {keys}", soft_wrap=True)
        elif len(tried) < len(found):
            console.print(f"none fits; {len(found) - len(tried)} more to try: raise --search")
        else:
            console.print("none fits: take more devices, or shorter rows")
    if not any(one.plan for one in tried):
        print(f"ranktuner: {tried[0].reason}", file=sys.stderr)
        return 2
    return 0 if fits else NOTHING_FITS


def _to_json(tried: list[search.Tried]) -> dict[str, Any]:
    """The best plan, and what was tried."""
    rows = [
        {
            "settings": dict(one.settings),
            "fits": bool(one.plan and one.plan["fits"]),
            "total_gb": one.plan and one.plan["memory_gb"]["total"],
            "step_seconds": one.plan and one.plan["step_seconds"],
            "reason": one.reason,
        }
        for one in tried
    ]
    return {**(tried[0].plan or {"fits": False}), "tried": rows}
