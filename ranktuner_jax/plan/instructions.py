"""The operations of a compiled program, read from its text line by line."""

from __future__ import annotations

import dataclasses
import functools
import math
import re

__all__ = ["Array", "Computation", "Instruction", "read_instruction"]

_BITS = {"pred": 8, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=\s]*)\](\{[^}]*\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"([a-z][\w\-]*)\(")


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


def read_instruction(line: str) -> Instruction | None:
    """The operation that a line of a program holds; None if it holds something else."""
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
