"""Reads a compiled program: its loops, collectives, matrix products, memory traffic and arrays.

XLA's own cost analysis counts the body of a loop once, so that the text of the optimized program is
read here, and what lies in a loop counts as often as the loop runs.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator

__all__ = ["Array", "Computation", "Instruction", "Program"]

_BITS = {"pred": 8, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=\s]*)\](\{[^}]*\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"([a-z][\w\-]*)\(")
# Nothing is computed or moved by these.
_FREE = frozenset(
    (
        *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"),
        *("while", "conditional", "call", "partition-id", "replica-id", "optimization-barrier"),
    )
)


@dataclasses.dataclass(frozen=True)
class Array:
    """The type of an array.

    Attributes:
      dtype: As XLA names it, such as "bf16".
      shape: Its sizes, on one device.
      in_hbm: Whether it lies in the device's main memory, not in a memory on the chip.
    """

    dtype: str
    shape: tuple[int, ...]
    in_hbm: bool = True

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Its size without the padding of its layout."""
        match = re.search(r"\d+", self.dtype)
        return self.size * _BITS.get(self.dtype, int(match[0]) if match else 0) // 8

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One operation of a computation.

    Attributes:
      name: Unique in the program.
      opcode: Such as "dot", "fusion" or "all-gather".
      arrays: What it returns, all leaves of a tuple.
      operands: Names of other instructions of its computation.
      attributes: The rest of its text.
      is_root: Whether it is what the computation returns.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    @property
    def num_bytes(self) -> int:
        """Bytes that it returns in main memory."""
        return sum(array.num_bytes for array in self.arrays if array.in_hbm)

    @property
    def op_name(self) -> str:
        """The path of the JAX primitive that it comes from."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match[1] if match else ""

    @functools.cached_property
    def called(self) -> tuple[str, ...]:
        """The computations that it runs, each once per run of its own (a loop: per iteration)."""
        names = re.findall(
            r"(?:calls|body|to_apply|true_computation|false_computation)=%?([\w.\-]+)",
            self.attributes,
        )
        for group in re.findall(
            r"(?:branch_computations|called_computations)=\{([^}]*)\}", self.attributes
        ):
            names += [name.strip().lstrip("%") for name in group.split(",")]
        return tuple(names)

    @property
    def condition(self) -> str | None:
        """The condition of a loop."""
        match = re.search(r"condition=%?([\w.\-]+)", self.attributes)
        return match[1] if match else None


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions by name, in the order of the text."""

    name: str
    instructions: dict[str, Instruction]

    @property
    def root(self) -> Instruction:
        """What the computation returns."""
        return next(one for one in self.instructions.values() if one.is_root)

    def inputs(self, instruction: Instruction) -> list[Instruction]:
        """The instructions whose results it takes."""
        return [self.instructions[n] for n in instruction.operands if n in self.instructions]

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Of each instruction those that take its result."""
        users: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for one in self.instructions.values():
            for name in one.operands:
                if name in users:
                    users[name].append(one)
        return users


class Program:
    """An optimized program of XLA, as `compiled.as_text()` prints it.

    Args:
      text: The text.
      dynamic_trips: The iterations of a loop whose number the program computes, from the path of
        the primitive that the loop comes from; by default 1.

    Example:
      >>> import jax
      >>> loop = lambda x: jax.lax.fori_loop(0, 5, lambda _, y: y @ x, x)
      >>> text = jax.jit(loop).lower(jax.ShapeDtypeStruct((8, 8), "float32")).compile().as_text()
      >>> Program(text).flops
      5120
    """

    def __init__(self, text: str, dynamic_trips: Callable[[str], float] = lambda _: 1.0) -> None:
        self._dynamic_trips = dynamic_trips
        self.computations: dict[str, Computation] = {}
        self._frames = _Frames(text)
        entry = ""
        current: dict[str, Instruction] | None = None
        for line in text.splitlines():
            if current is None:
                if header := _HEADER.match(line):
                    current = {}
                    self.computations[header[2]] = Computation(header[2], current)
                    entry = header[2] if header[1] else entry
            elif line == "}":
                current = None
            elif instruction := _parse(line):
                current[instruction.name] = last = instruction
            elif "metadata={" in line:  # The end of a kernel whose own text takes several lines.
                attributes = last.attributes + line
                current[last.name] = last = dataclasses.replace(last, attributes=attributes)
        self.entry = self.computations[entry]

    @functools.cached_property
    def runs(self) -> dict[str, float]:
        """How often each computation runs in one run of the program."""
        runs: dict[str, float] = dict.fromkeys(self.computations, 0.0)

        def add(name: str, times: float) -> None:
            runs[name] += times
            for one in self.computations[name].instructions.values():
                if one.opcode in _REDUCTIONS:
                    continue
                trips = self.trips(self.computations[name], one) if one.opcode == "while" else 1.0
                for called in self._called(one):
                    # Every branch counts: of the step's, all but one do next to nothing.
                    add(called, times * trips)

        add(self.entry.name, 1.0)
        return runs

    def trips(self, computation: Computation, loop: Instruction) -> float:
        """How often a loop runs: from where its counter begins to what it is compared with."""
        if match := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
            return float(match[1])
        assert loop.condition is not None
        condition = self.computations[loop.condition]
        for one in self._flat(condition):
            if one.opcode != "compare":
                continue
            for operand in condition.inputs(one) or condition.instructions.values():
                end = _constant(operand)
                if end is not None:
                    return end - _begin(computation, loop, condition.inputs(one))
        return self._dynamic_trips(loop.op_name)

    def _called(self, one: Instruction) -> Iterator[str]:
        """The computations that it runs; a kernel's text may name others, which are its own."""
        return (name for name in one.called if name in self.computations)

    def _flat(self, computation: Computation) -> Iterator[Instruction]:
        for one in computation.instructions.values():
            yield one
            for called in self._called(one):
                yield from self._flat(self.computations[called])

    def located(self) -> Iterator[tuple[Computation, Instruction, float]]:
        """Every instruction with its computation and the number of its runs."""
        for name, computation in self.computations.items():
            if times := self.runs[name]:
                for one in computation.instructions.values():
                    yield computation, one, times

    @property
    def flops(self) -> int:
        """FLOPs of all matrix products that XLA itself computes (kernels are opaque)."""
        return round(sum(times * _flops(c, one) for c, one, times in self.located()))

    @property
    def cycles(self) -> int:
        """Clock cycles of a run by XLA's own estimate, which programs for TPUs carry."""
        return round(
            sum(
                times * int(match[1])
                for _, one, times in self.located()
                if (match := re.search(r'"estimated_cycles":"(\d+)"', one.attributes))
            )
        )

    @functools.cached_property
    def fused(self) -> frozenset[str]:
        """The computations whose intermediate results never reach memory."""
        inside: set[str] = set()

        def add(name: str) -> None:
            if name not in inside:
                inside.add(name)
                for one in self.computations[name].instructions.values():
                    for called in self._called(one):
                        add(called)

        for computation in self.computations.values():
            for one in computation.instructions.values():
                if one.opcode == "fusion" or one.opcode in _REDUCTIONS:
                    for called in self._called(one):
                        add(called)
        return frozenset(inside)

    def work(self) -> Iterator[tuple[Instruction, float, float, float]]:
        """Each instruction that runs by itself: its runs, and in one run FLOPs and bytes moved."""
        for computation, one, times in self.located():
            if computation.name in self.fused or one.opcode in _FREE:
                continue
            yield one, times, self._flops_inside(computation, one), self._traffic(computation, one)

    def _flops_inside(self, computation: Computation, one: Instruction) -> float:
        if one.opcode != "fusion":
            return _flops(computation, one)
        return sum(
            self._flops_inside(self.computations[name], inner)
            for name in self._called(one)
            for inner in self.computations[name].instructions.values()
        )

    def _traffic(self, computation: Computation, one: Instruction) -> float:
        """Bytes that an instruction reads from main memory and writes to it."""
        inputs = computation.inputs(one)
        if one.opcode in ("dynamic-slice", "slice", "gather"):
            return 2.0 * one.num_bytes
        if one.opcode in ("dynamic-update-slice", "scatter"):
            return 2.0 * inputs[1 if one.opcode == "dynamic-update-slice" else -1].num_bytes
        if one.opcode == "fusion":
            return self._fusion_traffic(one, inputs)
        if one.opcode.endswith("-done"):
            return 0.0
        return one.num_bytes + sum(x.num_bytes for x in inputs)

    def _fusion_traffic(self, fusion: Instruction, inputs: list[Instruction]) -> float:
        inside = self.computations[fusion.called[0]]
        parameters = [x for x in inside.instructions.values() if x.opcode == "parameter"]
        total = 0.0
        updated: set[str] = set()  # Parameters that are updated in place.
        roots = inside.inputs(inside.root) if inside.root.opcode == "tuple" else [inside.root]
        for root in roots:
            through = _through(inside, root)
            if through.opcode == "dynamic-update-slice":
                operands = inside.inputs(through)
                total += operands[1].num_bytes
                updated.add(_through(inside, operands[0]).name)
            else:
                total += root.num_bytes
        for parameter in parameters:
            users = inside.users[parameter.name]
            if parameter.name in updated:
                continue
            if users and all(x.opcode in ("dynamic-slice", "slice", "gather") for x in users):
                total += sum(x.num_bytes for x in users) if parameter.arrays[0].in_hbm else 0
            else:
                total += parameter.num_bytes
        return total

    def source(self, instruction: Instruction) -> str:
        """The line of Python that an instruction comes from, as FILE:LINE, or ""."""
        return self._frames.source(instruction.attributes)


# What they call works on single numbers.
_REDUCTIONS = frozenset(
    (
        *("reduce", "reduce-window", "scatter", "select-and-scatter", "sort", "map"),
        *("all-reduce", "all-reduce-start", "reduce-scatter"),
    )
)


def _constant(one: Instruction) -> float | None:
    """The value of a whole constant."""
    match = re.match(r"(\d+)\)", one.attributes)
    return float(match[1]) if one.opcode == "constant" and match else None


def _begin(computation: Computation, loop: Instruction, compared: list[Instruction]) -> float:
    """Where the counter of a loop begins: not at 0 if XLA takes its first iteration out of it."""
    for one in compared:
        match = re.search(r"index=(\d+)", one.attributes)
        [state] = computation.inputs(loop)
        if one.opcode == "get-tuple-element" and match and state.opcode == "tuple":
            counter = computation.inputs(state)[int(match[1])]
            return _constant(_through(computation, counter)) or 0.0
    return 0.0


def _through(computation: Computation, one: Instruction) -> Instruction:
    """What an instruction passes on in another form."""
    while one.opcode in ("bitcast", "copy", "convert", "reshape") and computation.inputs(one):
        one = computation.inputs(one)[0]
    return one


def _parse(line: str) -> Instruction | None:
    match = _INSTRUCTION.match(line)
    if not match:
        return None
    rest = match[3]
    end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
    types, rest = rest[: end + 1], rest[end + 1 :].lstrip()
    opcode = _OPCODE.match(rest)
    if not opcode:
        return None
    end = _closing(rest, opcode.end() - 1)
    inside = rest[opcode.end() : end]
    arrays = tuple(
        Array(dtype, tuple(int(n.lstrip("<=")) for n in dims.split(",") if n.strip()), _in_hbm(lay))
        for dtype, dims, lay in _ARRAY.findall(types)
    )
    # A constant's value stands where operands do.
    attributes = rest[opcode.end() :] if opcode[1] in ("constant", "parameter") else rest[end + 1 :]
    return Instruction(
        match[2], opcode[1], arrays, tuple(_NAME.findall(inside)), attributes, bool(match[1])
    )


def _in_hbm(layout: str) -> bool:
    return re.search(r"S\([1-9]", layout) is None


def _closing(text: str, start: int) -> int:
    depth = 0
    for index in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[index], 0)
        if not depth:
            return index
    raise ValueError(f"no closing parenthesis in {text[:80]!r}")


def _flops(computation: Computation, one: Instruction) -> float:
    """FLOPs of a matrix product; TPUs have convolutions in their place."""
    if one.opcode == "dot":
        lhs = computation.inputs(one)[0].arrays[0]
        match = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.attributes)
        axes = [int(axis) for axis in match[1].split(",") if axis] if match else []
        return 2.0 * one.arrays[0].size * math.prod(lhs.shape[axis] for axis in axes)
    if one.opcode == "convolution":
        return _convolution_flops(computation, one)
    return 0.0


def _convolution_flops(computation: Computation, one: Instruction) -> float:
    """FLOPs of a convolution, of which most are matrix products in another form."""
    lhs, rhs = (operand.arrays[0].shape for operand in computation.inputs(one)[:2])
    match = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.attributes)
    window = re.search(r"window=\{([^}]*)\}", one.attributes)
    assert match is not None
    fields = dict(field.split("=") for field in window[1].split()) if window else {}
    out = one.arrays[0].shape
    size = 1.0
    for label, length in zip(match[3], out, strict=True):
        if not label.isdigit():
            size *= length
            continue
        # A batch axis is a window that meets each entry once: only real entries are multiplied.
        axis, entries, places = int(label), lhs[match[1].index(label)], rhs[match[2].index(label)]
        along = {name: value.split("x")[axis] for name, value in fields.items()}
        size *= _overlaps(length, entries, places, along)
    return 2.0 * size * rhs[match[2].index("i")]


def _overlaps(out: int, lhs: int, rhs: int, fields: dict[str, str]) -> int:
    """Pairs of an output and a place of the window that meet an entry and not padding."""
    stride, dilation = int(fields.get("stride", 1)), int(fields.get("lhs_dilate", 1))
    spread, low = int(fields.get("rhs_dilate", 1)), int(fields.get("pad", "0_0").split("_")[0])
    places = (o * stride + k * spread - low for o in range(out) for k in range(rhs))
    return sum(place % dilation == 0 and 0 <= place // dilation < lhs for place in places)


class _Frames:
    """The tables at the head of a program that lead from an instruction to a line of Python."""

    def __init__(self, text: str) -> None:
        self._names = _table(text, "FileNames", r'(\d+) "(.*)"')
        self._functions = _table(text, "FunctionNames", r'(\d+) "(.*)"')
        self._locations = _table(text, "FileLocations", r"(\d+) \{(.*)\}")
        self._frames = _table(text, "StackFrames", r"(\d+) \{(.*)\}")

    def source(self, attributes: str) -> str:
        match = re.search(r"stack_frame_id=(\d+)", attributes)
        frame = match[1] if match else ""
        while frame in self._frames:
            fields = dict(re.findall(r"(\w+)=(\d+)", self._frames[frame]))
            location = dict(re.findall(r"(\w+)=(\d+)", self._locations[fields["file_location_id"]]))
            file = self._names.get(location["file_name_id"], "")
            if "/site-packages/" not in file:
                return f"{file.rpartition('/ranktuner_jax/')[2]}:{location['line']}"
            parent = fields.get("parent_frame_id", "")
            if parent == frame:
                break
            frame = parent
        return ""


def _table(text: str, title: str, row: str) -> dict[str, str]:
    match = re.search(rf"^{title}\n((?:.+\n)*)", text, re.MULTILINE)
    return dict(re.findall(row, match[1])) if match else {}
