"""How long a step takes at least, from what it computes, reads and sends."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable

from ranktuner_jax.plan.chips import Chip
from ranktuner_jax.plan.collectives import Collective
from ranktuner_jax.plan.hlo import Program
from ranktuner_jax.plan.program import CompiledStep
from ranktuner_jax.train.telemetry.utilisation import step_flops

__all__ = ["Roofline", "roofline"]

# What programs reach of the time that the numbers of a device allow: measured steps lie between
# this share and all of it.
_EFFICIENCY = 0.65
# Matrix products of an attention kernel, by a part of its name.
_KERNELS = {"dkv": 4, "dq": 3, "bwd": 5, "fwd": 2}


@dataclasses.dataclass(frozen=True)
class Roofline:
    """The time of a step, of one device.

    Attributes:
      flops: FLOPs that it computes, recomputation included.
      model_flops: FLOPs that the model needs, as `mfu` counts them in training.
      compute_seconds: Its FLOPs at the peak of the device.
      memory_seconds: What it reads and writes, at the bandwidth of its memory.
      busy_seconds: Operation by operation, the longer of these two.
      network_seconds: What it sends to its neighbors, over all links.
      dcn_seconds: What it sends to other slices, at its share of the data center's network; None if
        that is not known.
    """

    flops: float
    model_flops: float
    compute_seconds: float
    memory_seconds: float
    busy_seconds: float
    network_seconds: float
    dcn_seconds: float | None

    @property
    def low(self) -> float:
        """Seconds if the device is never idle and both networks run beside it."""
        return max(self.busy_seconds, self.network_seconds, self.dcn_seconds or 0.0)

    @property
    def high(self) -> float:
        """Seconds at the share of that speed which programs reach at least."""
        return self.low / _EFFICIENCY


def roofline(
    step: CompiledStep, program: Program, chip: Chip, sent: Iterable[Collective]
) -> Roofline:
    """The roofline of a step on a chip."""
    flops = moved = busy = 0.0
    for one, times, operations, traffic in program.work():
        if one.opcode == "custom-call":
            operations += _attention_flops(step, one.attributes)
        flops += times * operations
        moved += times * traffic
        busy += times * max(operations / chip.flops, traffic / chip.memory_bandwidth)
    sizes, devices = step.sizes, step.mesh.size
    tokens = sizes.rows * sizes.length
    pairs = tokens * (sizes.length + 1) / 2
    sent = list(sent)
    network = sum(one.num_bytes for one in sent if not one.dcn)
    dcn = sum(one.num_bytes for one in sent if one.dcn)
    return Roofline(
        flops,
        step_flops(step.model, tokens, tokens, pairs, step.lora) / devices,
        flops / chip.flops,
        moved / chip.memory_bandwidth,
        busy,
        network / chip.network_bandwidth if chip.network_bandwidth else 0.0,
        dcn / chip.dcn_bandwidth if chip.dcn_bandwidth else None if dcn else 0.0,
    )


def _attention_flops(step: CompiledStep, attributes: str) -> float:
    """FLOPs of an attention kernel: XLA sees into none."""
    match = re.search(r"splash|fmha|flash", attributes)
    if not match:
        return 0.0
    products = next((n for part, n in _KERNELS.items() if part in attributes.lower()), 2)
    model, sizes = step.model, step.sizes
    rows = sizes.micro_tokens // sizes.length
    heads = model.num_heads / step.mesh.shape["tensor"]
    # Half of the pairs of tokens: attention is causal.
    return products * 2 * rows * heads * model.head_dim * sizes.length**2 / 2
