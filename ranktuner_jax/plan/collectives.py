"""What a program sends over the network: by kind, by axis of the mesh, and how much."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterable, Mapping

import numpy as np
from jax.sharding import Mesh

from ranktuner_jax.plan.hlo import Instruction, Program

__all__ = ["Collective", "collectives", "total_gb"]

_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collectives of one kind over the same axes.

    Attributes:
      kind: Such as "all-gather".
      axes: The axes of the mesh whose devices take part.
      dtypes: What is sent.
      count: How many there are in a step.
      num_bytes: What a device sends in a step, by the algorithm that sends least.
    """

    kind: str
    axes: tuple[str, ...]
    dtypes: tuple[str, ...]
    count: float
    num_bytes: float


def collectives(program: Program, mesh: Mesh) -> list[Collective]:
    """The collectives of a step, those that send most first."""
    # A collective that runs beside computation stands in the program several times, once for each
    # of these, with one channel.
    seen: dict[str, tuple[str, tuple[str, ...], str, float, float]] = {}
    for computation, one, times in program.located():
        kind = one.opcode.removesuffix("-start")
        if kind not in _KINDS or one.opcode.endswith("-done"):
            continue
        channel = re.search(r"channel_id=(\d+)", one.attributes)
        axes, group = _axes(one, mesh)
        inputs = computation.inputs(one)
        sent = sum(array.num_bytes for x in inputs for array in x.arrays)
        if computation.name.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"
        share = (group - 1) / group
        if kind == "all-gather":
            # A device passes on the parts of all others but one: what comes in goes out.
            received = max(array.num_bytes for array in one.arrays)
            num_bytes = share * received
        elif kind == "all-reduce":
            # The result says what is sent: TPUs round to its type on the way.
            num_bytes = 2 * share * sum(array.num_bytes for array in one.arrays)
        elif kind == "collective-permute":
            num_bytes = float(sent)
        else:
            num_bytes = share * sent
        key = f"{channel[1] if channel else one.name} {kind}"
        if key not in seen or seen[key][3] < times:
            dtype = one.arrays[0].dtype
            seen[key] = (kind, axes, dtype, times, num_bytes)
    found: dict[tuple[str, tuple[str, ...]], Collective] = {}
    for kind, axes, dtype, times, num_bytes in seen.values():
        old = found.get((kind, axes), Collective(kind, axes, (), 0.0, 0.0))
        found[kind, axes] = Collective(
            kind,
            axes,
            tuple(sorted({*old.dtypes, dtype})),
            old.count + times,
            old.num_bytes + times * num_bytes,
        )
    return sorted(found.values(), key=lambda one: -one.num_bytes)


def total_gb(found: Iterable[Collective]) -> Mapping[str, float]:
    """GB that a device sends in a step, by kind.

    Example:
      >>> dict(total_gb([Collective("all-gather", ("fsdp",), ("bf16",), 2.0, 3e9)]))
      {'all-gather': 3.0}
    """
    totals: dict[str, float] = {}
    for one in found:
        totals[one.kind] = totals.get(one.kind, 0.0) + one.num_bytes / 1e9
    return totals


def _axes(one: Instruction, mesh: Mesh) -> tuple[tuple[str, ...], int]:
    """The axes of the mesh whose devices are one group, and how many devices a group has."""
    groups = _groups(one.attributes, mesh.size)
    first = {int(device) for device in groups[0]}
    places = np.arange(mesh.size).reshape(mesh.devices.shape)
    names = [name for name in mesh.axis_names if mesh.shape[name] > 1]
    for count in range(1, len(names) + 1):
        for chosen in itertools.combinations(names, count):
            index = tuple(slice(None) if name in chosen else 0 for name in mesh.axis_names)
            if set(places[index].ravel().tolist()) == first:
                return chosen, len(first)
    if one.opcode.startswith("collective-permute"):
        return ("neighbors",), 2
    return ("other",), len(first)


def _groups(attributes: str, devices: int) -> np.ndarray:
    """The groups [groups, devices] in any of the forms in which XLA writes them."""
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        chosen = re.findall(r"'(\w+)'", match[2])
        names = list(sizes)
        places = np.arange(devices).reshape([int(size) for size in sizes.values()])
        order = [names.index(n) for n in names if n not in chosen]
        order += [names.index(n) for n in chosen]
        width = int(np.prod([int(sizes[n]) for n in chosen]))
        return places.transpose(order).reshape(-1, width)
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if iota:
        shape, over = ([int(n) for n in iota[i].split(",")] for i in (1, 2))
        places = np.arange(np.prod(over)).reshape(over)
        if iota[3]:
            places = places.transpose([int(n) for n in iota[3].split(",")])
        return places.reshape(shape)
    listed = re.search(r"replica_groups=\{(\{[\d,{}\s]*\})\}", attributes)
    if listed:
        groups = re.findall(r"\{([\d,\s]+)\}", listed[1])
        return np.array([[int(n) for n in group.split(",")] for group in groups])
    return np.arange(devices)[None]
