"""A plan: what the step of a config needs on devices that need not be there."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax

from ranktuner_jax.plan import topologies
from ranktuner_jax.plan.chips import Chip, chip_of
from ranktuner_jax.plan.collectives import Collective, collectives, total_gb
from ranktuner_jax.plan.memory import HEADROOM, available_gb, memory_gb
from ranktuner_jax.plan.program import compile_step, read_model
from ranktuner_jax.plan.roofline import Roofline, roofline
from ranktuner_jax.train.config import TrainConfig

__all__ = ["LargeArray", "Plan", "make_plan", "plan_for"]


@dataclasses.dataclass(frozen=True)
class LargeArray:
    """An array that a device holds during the step.

    Attributes:
      type: Its dtype and shape.
      gb: Its size.
      source: The line of Python that it comes from, or "".
    """

    type: str
    gb: float
    source: str


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a step needs, of one device.

    Attributes:
      topology: The name of the devices.
      chip: One of them.
      mesh: Sizes of the mesh's axes.
      settings: The keys of the config that decide most.
      memory_gb: By kind; see `memory.memory_gb`.
      available_gb: The memory of the device.
      collectives: What it sends.
      roofline: How long it takes.
      tokens: Positions of a step, of all devices.
      steps: Steps of the run, or None where only the data tells.
      arrays: The ten largest arrays.
      compile_seconds: How long tracing and compilation took here.
    """

    topology: str
    chip: Chip
    mesh: dict[str, int]
    settings: dict[str, Any]
    memory_gb: dict[str, float]
    available_gb: float
    collectives: tuple[Collective, ...]
    roofline: Roofline
    tokens: int
    steps: int | None
    arrays: tuple[LargeArray, ...]
    compile_seconds: float

    @property
    def fits(self) -> bool:
        """Whether the total leaves some of the memory free."""
        return self.memory_gb["total"] <= HEADROOM * self.available_gb

    @property
    def devices(self) -> int:
        """The number of devices."""
        return math.prod(self.mesh.values())

    def to_json(self) -> dict[str, Any]:
        """What `ranktuner plan --json` prints."""
        low, high = self.roofline.low, self.roofline.high
        return {
            "fits": self.fits,
            "topology": self.topology,
            "device": self.chip.kind,
            "mesh": self.mesh,
            "settings": self.settings,
            "memory_gb": self.memory_gb,
            "available_gb": self.available_gb,
            "collective_gb": dict(total_gb(self.collectives)),
            "collectives": [dataclasses.asdict(one) for one in self.collectives],
            "step_seconds": [low, high],
            "dcn_seconds": self.roofline.dcn_seconds,
            "tokens_per_second": [self.tokens / high, self.tokens / low],
            "mfu": [self.mfu(high), self.mfu(low)],
            "hours": None if self.steps is None else [self.hours(low), self.hours(high)],
            "device_hours": None
            if self.steps is None
            else [self.devices * self.hours(low), self.devices * self.hours(high)],
            "flops": self.roofline.flops,
            "model_flops": self.roofline.model_flops,
            "arrays": [dataclasses.asdict(array) for array in self.arrays],
            "compile_seconds": self.compile_seconds,
        }

    def mfu(self, seconds: float) -> float:
        """The share of the peak that the model's own FLOPs are, at so many seconds a step."""
        return self.roofline.model_flops / seconds / self.chip.flops

    def hours(self, seconds: float) -> float:
        """Hours of the run, at so many seconds a step."""
        assert self.steps is not None
        return self.steps * seconds / 3600


def make_plan(config: TrainConfig, topology: str) -> Plan:
    """Compiles the step of a config for a topology, and reads the program.

    Raises:
      UserError: If there is no such topology, its devices are not known, or the mesh, the batch or
        the model do not suit it.
    """
    return plan_for(config, topologies.devices(topology), topology)


def plan_for(config: TrainConfig, devices: Sequence[jax.Device], topology: str) -> Plan:
    """Like `make_plan`, for given devices, which may be attached; `topology` is their name."""
    chip = chip_of(devices[0], config.train.compute_dtype)
    step = compile_step(config, read_model(config), devices)
    program = step.program()
    sent = tuple(collectives(program, step.mesh))
    train = config.train
    arrays = sorted(
        {
            LargeArray(str(array), array.num_bytes / 1e9, program.source(one))
            for one, *_ in program.work()
            for array in one.arrays
            if array.in_hbm
        },
        key=lambda array: -array.gb,
    )
    return Plan(
        topology=topology,
        chip=chip,
        mesh=dict(step.mesh.shape),
        settings={
            "train.batch_size": train.batch_size,
            "train.accumulation": train.accumulation,
            "train.remat": train.remat,
            "optimizer.moment_dtype": config.optimizer.moment_dtype or train.param_dtype,
            "data.row_length": config.data.row_length,
        },
        memory_gb=memory_gb(step, program),
        available_gb=available_gb(chip, len(devices)),
        collectives=sent,
        roofline=roofline(step, program, chip, sent),
        tokens=step.sizes.rows * step.sizes.length,
        steps=train.steps if train.epochs is None else None,
        arrays=tuple(arrays[:10]),
        compile_seconds=step.seconds,
    )
