"""A plan as tables on a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from ranktuner_jax.plan.memory import HEADROOM
from ranktuner_jax.plan.plan import Plan
from ranktuner_jax.plan.search import Tried

__all__ = ["show_plan", "show_search"]


def show_plan(plan: Plan, console: Console) -> None:
    """Prints a plan."""
    axes = " × ".join(f"{name} {size}" for name, size in plan.mesh.items())
    console.print(f"{plan.topology}: {plan.devices} {plan.chip.kind}, mesh {axes}")
    console.print(", ".join(f"{key}={value}" for key, value in plan.settings.items()) + "\n")
    console.print(_memory(plan))
    if plan.collectives:
        console.print(_network(plan))
    console.print(_time(plan))
    console.print(_arrays(plan))
    total, limit = plan.memory_gb["total"], HEADROOM * plan.available_gb
    verdict = "fits" if plan.fits else "does not fit"
    console.print(
        f"{verdict}: {total:.1f} GB of {plan.available_gb:.1f} GB, of which a step may take "
        f"{HEADROOM:.0%}, {limit:.1f} GB (compiled in {plan.compile_seconds:.0f} s)"
    )
    if not plan.fits:
        console.print(f"{total - limit:.1f} GB too much. {_advice(plan)}")


def _memory(plan: Plan) -> Table:
    table = _table("memory of a device", "", "GB")
    for kind, size in plan.memory_gb.items():
        if kind == "total":
            table.add_section()
        name = "alive at once, by XLA" if kind == "peak" else kind
        table.add_row(name, f"{size:.2f}")
    return table


def _network(plan: Plan) -> Table:
    table = _table("sent by a device in a step", "", "axes", "dtype", "times", "GB")
    for one in plan.collectives:
        axes = ", ".join(one.axes) + " (dcn)" * one.dcn
        row = (one.kind, axes, ", ".join(one.dtypes), f"{one.count:,.0f}")
        table.add_row(*row, f"{one.num_bytes / 1e9:.2f}")
    return table


def _time(plan: Plan) -> Table:
    roof = plan.roofline
    low, high = roof.low, roof.high
    table = _table("time of a step", "", "fastest", "slowest")
    table.add_row("step, s", f"{low:.3g}", f"{high:.3g}")
    table.add_row("tokens/s", f"{plan.tokens / low:,.0f}", f"{plan.tokens / high:,.0f}")
    table.add_row("MFU", f"{plan.mfu(low):.0%}", f"{plan.mfu(high):.0%}")
    if plan.steps is not None:
        hours = plan.hours(low), plan.hours(high)
        table.add_row(f"{plan.steps} steps, h", *(f"{one:.3g}" for one in hours))
        table.add_row("device-hours", *(f"{plan.devices * one:.3g}" for one in hours))
    table.add_section()
    for name, seconds in (
        ("of it, matrix products, s", roof.compute_seconds),
        ("its memory traffic, s", roof.memory_seconds),
        ("its network, s", roof.network_seconds),
    ):
        table.add_row(name, f"{seconds:.3g}", "")
    if roof.dcn_seconds != 0.0:
        between = "unknown" if roof.dcn_seconds is None else f"{roof.dcn_seconds:.3g}"
        table.add_row("its network between slices, s", between, "")
    table.add_row("TFLOP", f"{roof.flops / 1e12:,.3g}", "")
    table.add_row("without recomputation", f"{roof.model_flops / 1e12:,.3g}", "")
    return table


def _arrays(plan: Plan) -> Table:
    table = _table("largest arrays", "", "from", "GB")
    for array in plan.arrays:
        table.add_row(array.type, array.source, f"{array.gb:.3f}")
    return table


def _advice(plan: Plan) -> str:
    """What would make it fit, by what takes most."""
    memory = plan.memory_gb
    kept = memory["parameters"] + memory["optimizer"] + memory["gradients"]
    if kept > HEADROOM * plan.available_gb or kept > memory["total"] / 2:
        return (
            "Most of it are parameters, moments and gradients: divide them further with "
            "mesh.fsdp or mesh.tensor, take optimizer.moment_dtype=bfloat16, or more devices."
        )
    if plan.settings["train.remat"] != "full":
        return "Most of it are activations: set train.remat=full, or raise train.accumulation."
    return (
        "Most of it are activations: raise train.accumulation, or mesh.tensor; --search tries "
        "them all."
    )


def show_search(tried: Sequence[Tried], console: Console) -> None:
    """Prints what a search found, the best first."""
    table = _table("tried", "mesh", "micro-batches", "remat", "moments", "GB", "s a step", "fits")
    for one in tried:
        settings = one.settings
        mesh = " × ".join(str(settings[f"mesh.{axis}"]) for axis in ("data", "fsdp", "tensor"))
        names = ("train.accumulation", "train.remat", "optimizer.moment_dtype")
        row = [mesh, *(str(settings[name]) for name in names)]
        if one.plan is None:
            table.add_row(*row, "", "", one.reason)
            continue
        low, high = one.plan["step_seconds"]
        total, fits = one.plan["memory_gb"]["total"], one.plan["fits"]
        table.add_row(*row, f"{total:.1f}", f"{low:.3g} to {high:.3g}", "yes" if fits else "no")
    console.print(table)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        text = index == 0 or column in ("axes", "dtype", "from", "remat", "moments", "fits")
        table.add_column(column, justify="left" if text else "right")
    return table
