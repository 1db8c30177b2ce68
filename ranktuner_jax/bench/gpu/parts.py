"""The parts of `ranktuner bench gpu`, in their order, each of which runs in a process of its own.

A part that crashes or runs out of memory does not disturb the next one, and torch and JAX do not
share the memory of the GPU.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import sys
from collections.abc import Iterator
from typing import Any

__all__ = ["MACHINE", "PARTS", "Part", "serve"]


@dataclasses.dataclass(frozen=True)
class Part:
    """One part.

    Attributes:
      module: The module whose `cases(small)` are measured.
      seconds: When it is stopped.
    """

    module: str
    seconds: float = 240.0


# Whether it is right comes first, and then how fast it is.
PARTS = {
    name: Part(f"ranktuner_jax.bench.gpu.{name}")
    for name in (
        *("loss_values", "attention", "training"),
        *("loss_speed", "torch_speed", "step", "sampling"),
    )
}
MACHINE = Part("", 60)


def serve() -> None:
    """What a part's process does: writes a line of JSON for each record, as soon as it is there."""
    module, small = json.loads(sys.argv[1])
    # What libraries print goes to the log.
    lines = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for found in _records(module, small) if module else _machine(small):
        print(json.dumps(found), file=lines, flush=True)


def _machine(small: bool) -> Iterator[dict[str, Any]]:
    """The machine; nothing if it has no GPU and one is needed."""
    import jax

    from ranktuner_jax.bench.machine import describe_machine

    if small or jax.default_backend() == "gpu":
        yield describe_machine()


def _records(module: str, small: bool) -> Iterator[dict[str, Any]]:
    for case in importlib.import_module(module).cases(small):
        yield dataclasses.asdict(case.run())


if __name__ == "__main__":
    serve()
