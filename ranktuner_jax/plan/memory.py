"""Where the memory of a device goes."""

from __future__ import annotations

import math
import os
from typing import Any

import jax
import jax.numpy as jnp

from ranktuner_jax.plan.chips import Chip
from ranktuner_jax.plan.hlo import Program
from ranktuner_jax.plan.instructions import Array
from ranktuner_jax.plan.program import CompiledStep

__all__ = ["HEADROOM", "available_gb", "memory_gb", "shard_bytes"]

# The share of a device's memory that a step may take. The rest is for what XLA does not count:
# its own reserve, the next batch, and an evaluation's programs.
HEADROOM = 0.93


def available_gb(chip: Chip, devices: int) -> float:
    """The memory of one of `devices` devices; a CPU's devices share the machine's."""
    if chip.memory_gb is not None:
        return chip.memory_gb
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9 / devices


def memory_gb(step: CompiledStep, program: Program) -> dict[str, float]:
    """GB of a device, by kind.

    Returns:
      What lies there all the time, `parameters` and `optimizer`; what the step adds, `gradients`
      (one of each parameter), `activations` (what the forward pass keeps for the backward pass),
      `loss` (a chunk of logits and the unembedding's gradient) and `other`; and `total`: XLA's
      arguments, outputs and the sum of its temporary arrays. `peak` is what XLA says is alive at
      the same time; it is lower, and nothing is decided by it.
    """
    memory = step.memory
    new = memory.output_size_in_bytes - memory.alias_size_in_bytes
    temporary = memory.temp_size_in_bytes + new
    params, optimizer = shard_bytes(step.state.params), shard_bytes(step.state.opt_state)
    gradients = shard_bytes(step.state.params, jnp.float32)
    layers, activations, loss = step.model.num_layers, 0, 0
    over_layers = (layers, layers - 1)  # XLA may take the first one out of the loop.
    parameters = jax.tree.leaves((step.state.params, step.state.base))
    kept = {leaf.sharding.shard_shape(leaf.shape) for leaf in parameters}
    for computation, one, _ in program.located():
        if one.opcode != "while":
            continue
        carried = [array for array in one.arrays if array.in_hbm]
        if "chunks_of_" in one.op_name:
            loss = max(loss, _distinct(carried))
        elif "transpose" not in one.op_name and program.trips(computation, one) in over_layers:
            stacked = [a for a in carried if a.shape[:1] == (layers,) and a.shape not in kept]
            activations = max(activations, sum(array.num_bytes for array in stacked))
    arguments = memory.argument_size_in_bytes
    kinds = {
        "parameters": params + shard_bytes(step.state.base),
        "optimizer": optimizer,
        "gradients": min(gradients, temporary),
        "activations": activations,
        "loss": loss,
    }
    total = arguments + temporary
    kinds["other"] = max(0, total - sum(kinds.values()))
    kinds |= {"total": total, "peak": getattr(memory, "peak_memory_in_bytes", 0)}
    return {name: size / 1e9 for name, size in kinds.items()}


def _distinct(arrays: list[Array]) -> int:
    """Bytes of arrays, of which a loop may carry the same twice."""
    return sum(array.num_bytes for array in set(arrays))


def shard_bytes(tree: Any, dtype: Any = None) -> int:
    """Bytes of a tree's arrays on one device, as they are or in another dtype.

    Example:
      >>> shard_bytes({"count": jax.ShapeDtypeStruct((), "int32")})
      4
    """
    total = 0
    for leaf in jax.tree.leaves(tree):
        sharding = getattr(leaf, "sharding", None)
        shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
        total += math.prod(shape) * jnp.dtype(dtype or leaf.dtype).itemsize
    return total
