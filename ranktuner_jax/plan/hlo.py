"""Reads a compiled program: its loops, collectives, matrix products, memory traffic and arrays.

XLA's own cost analysis counts the body of a loop once, so that the text of the optimized program is
read here, and what lies in a loop counts as often as the loop runs.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator

from ranktuner_jax.plan.flops import product_flops
from ranktuner_jax.plan.frames import Frames
from ranktuner_jax.plan.instructions import Computation, Instruction, read_instruction

__all__ = ["Program"]

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
# Nothing is computed or moved by these.
_FREE = frozenset(
    (
        *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"),
        *("while", "conditional", "call", "partition-id", "replica-id", "optimization-barrier"),
    )
)


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
        self._frames = Frames(text)
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
            elif instruction := read_instruction(line):
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
        return round(sum(times * product_flops(c, one) for c, one, times in self.located()))

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
            return product_flops(computation, one)
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
