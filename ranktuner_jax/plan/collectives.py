"""What a program sends over the network: by kind, by axis of the mesh, and how much."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping

import numpy as np
from jax.sharding import Mesh

from ranktuner_jax.plan.hlo import Program
from ranktuner_jax.plan.instructions import Computation, Instruction

__all__ = ["Collective", "collectives", "total_gb"]

_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# How XLA:TPU names what it sends between slices, where that differs.
_BETWEEN_SLICES = {"one-to-one": "collective-permute"}


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collectives of one kind over the same axes.

    Attributes:
      kind: Such as "all-gather".
      axes: The axes of the mesh along which the devices of a group lie.
      dtypes: What is sent.
      count: How many there are in a step.
      num_bytes: What a device sends in a step, by the algorithm that sends least.
      dcn: Whether it goes over the data center's network, from slice to slice.
    """

    kind: str
    axes: tuple[str, ...]
    dtypes: tuple[str, ...]
    count: float
    num_bytes: float
    dcn: bool = False


def collectives(program: Program, mesh: Mesh) -> list[Collective]:
    """The collectives of a step, those that send most first."""
    # A collective that runs beside several computations stands in each of them, with the number of
    # its chain. Some of them may lie in a loop: it begins and ends outside of that.
    seen: dict[str, tuple[Collective, float]] = {}
    for computation, one, times in program.located():
        found = _between_slices(one, mesh) or _within_a_slice(computation, one, mesh)
        if found is not None:
            channel = re.search(r"channel_id=(\d+)", one.attributes)
            chain = re.search(r'chain_id="(\d+)"', one.attributes)
            key = f"{channel and channel[1]} {chain[1]}" if chain else one.name
            if key not in seen or seen[key][1] > times:
                seen[key] = found, times
    totals: dict[tuple[str, tuple[str, ...], bool], Collective] = {}
    for run, times in seen.values():
        group = run.kind, run.axes, run.dcn
        old = totals.get(group, dataclasses.replace(run, dtypes=(), count=0.0, num_bytes=0.0))
        totals[group] = dataclasses.replace(
            old,
            dtypes=tuple(sorted({*old.dtypes, *run.dtypes})),
            count=old.count + times,
            num_bytes=old.num_bytes + times * run.num_bytes,
        )
    return sorted(totals.values(), key=lambda one: -one.num_bytes)


def _within_a_slice(computation: Computation, one: Instruction, mesh: Mesh) -> Collective | None:
    """One run of a collective whose groups lie in a slice; all devices do if there is one."""
    kind = one.opcode.removesuffix("-start")
    if kind not in _KINDS:
        return None
    if computation.name.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"
    # Slices run one program, which numbers the devices of its own slice.
    slices = _slices(mesh)
    own = np.flatnonzero(slices == slices[0])
    groups = own[_groups(one.attributes, own.size)]
    # The result of a sum says what is sent: TPUs round to its type on the way.
    inputs = [one] if kind == "all-reduce" else computation.inputs(one)
    size = sum(array.num_bytes for x in inputs for array in x.arrays)
    return _collective(kind, groups, mesh, one.arrays[0].dtype, size)


def _between_slices(one: Instruction, mesh: Mesh) -> Collective | None:
    """One run of a collective over slices, which a TPU leaves to its host."""
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', one.attributes)
    target = re.search(r'_xla_megascale_target=("[^"]*"|\{\{.*?\}\})', one.attributes)
    if one.opcode != "send" or not kind or not target:
        return None
    if product := re.match(r'"\{([\d,]+)\}x', target[1]):
        # The devices at the same place of each of these slices, counted from 1.
        slices = _slices(mesh)
        groups = [[int(np.flatnonzero(slices == int(n) - 1)[0]) for n in product[1].split(",")]]
    else:
        place = {device.id: index for index, device in enumerate(mesh.devices.flat)}
        lists = re.findall(r"\{([\d,>\-]+)\}", target[1])
        groups = [[place[int(n)] for n in re.findall(r"\d+", text)] for text in lists]
    name = kind[1].lower().replace("_", "-")
    name = _BETWEEN_SLICES.get(name, name)
    sent = one.arrays[0]
    found = _collective(name, np.array(groups), mesh, sent.dtype, sent.num_bytes)
    return dataclasses.replace(found, dcn=True)


def _collective(kind: str, groups: np.ndarray, mesh: Mesh, dtype: str, size: int) -> Collective:
    """One run of a collective.

    Args:
      kind: Its kind.
      groups: Places in the mesh [groups, devices of a group].
      mesh: The mesh.
      dtype: What is sent.
      size: Bytes that a device brings in.
    """
    places = np.unravel_index(groups, mesh.devices.shape)
    axes = tuple(
        name
        for name, along in zip(mesh.axis_names, places, strict=True)
        if (along != along[:, :1]).any()
    )
    others = groups.shape[1] - 1
    share = others / groups.shape[1]
    # In a gather a device passes on the parts of all others but one: what comes in goes out.
    factors = {"all-gather": others, "all-reduce": 2 * share, "collective-permute": 1}
    return Collective(kind, axes, (dtype,), 1.0, size * factors.get(kind, share))


def _slices(mesh: Mesh) -> np.ndarray:
    """The slice of each place in the mesh."""
    return np.array([getattr(device, "slice_index", 0) for device in mesh.devices.flat])


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


def _groups(attributes: str, devices: int) -> np.ndarray:
    """The groups [groups, devices] in any of the forms in which XLA writes them."""
    if match := re.search(r"source_target_pairs=\{(\{[\d,{}\s]*\})\}", attributes):
        return _listed(match[1])
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
    if match := re.search(r"replica_groups=\{(\{[\d,{}\s]*\})\}", attributes):
        return _listed(match[1])
    return np.arange(devices)[None]


def _listed(text: str) -> np.ndarray:
    groups = re.findall(r"\{([\d,\s]+)\}", text)
    return np.array([[int(n) for n in group.split(",")] for group in groups])
