"""Short training runs on this device, beside the same runs on the CPU."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator

import jax
import numpy as np

from ranktuner_jax.bench.gpu import shapes
from ranktuner_jax.bench.gpu.case import Case
from ranktuner_jax.bench.train import SharedState
from ranktuner_jax.errors import RunError
from ranktuner_jax.train import LoraConfig, LossConfig, OptimizerConfig, StepConfig, TrainConfig

__all__ = ["cases", "losses", "print_losses"]

STEPS, ROWS, LENGTH = 10, 8, 64
# The types that are computed in, and what is trained.
RUNS = {
    "float32": ("float32", LoraConfig()),
    "bfloat16": ("bfloat16", LoraConfig()),
    "QLoRA, nf4": ("float32", LoraConfig(rank=4, base="nf4")),
    "QLoRA, int8": ("float32", LoraConfig(rank=4, base="int8")),
}
# Adam divides gradients, and so their rounding, by their own size; bfloat16 rounds to 2^-9.
ALLOWED = {"float32": 1e-4, "bfloat16": 1e-2}
_COMMAND = "from ranktuner_jax.bench.gpu.training import print_losses; print_losses()"


def cases(small: bool) -> Iterator[Case]:
    """All runs; they are small anyway."""
    for name, (dtype, _) in RUNS.items():
        yield Case(
            f"losses of {STEPS} steps of AdamW, beside those on the CPU",
            name,
            dtype,
            functools.partial(_compare, name),
        )


def _compare(name: str) -> dict[str, float]:
    ours, theirs = np.array(losses(name)), np.array(_cpu_losses()[name])
    return {
        "first loss": ours[0],
        "last loss": ours[-1],
        "loss error": float((np.abs(ours - theirs) / theirs).max()),
        "loss allowed": ALLOWED[RUNS[name][0]],
    }


def losses(name: str) -> list[float]:
    """The loss of each step of a tiny model, on all devices."""
    dtype, lora = RUNS[name]
    config = TrainConfig(
        lora=lora,
        loss=LossConfig(options={"base": "one"}),
        optimizer=OptimizerConfig(learning_rate=1e-2),
        train=StepConfig(steps=STEPS, batch_size=ROWS, compute_dtype=dtype),
    )
    # Random weights are the same to the last bit only if they come from the same device.
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        run = shapes.random_run(shapes.TINY, config)
    with jax.default_matmul_precision("highest"):
        shared = SharedState(run)
        batch = shapes.random_batch(shapes.TINY, ROWS, LENGTH)
        program = shared.compile(batch)
        placed = shared.place(batch)
        return [float(shared.step(program, placed)["loss"]) for _ in range(STEPS)]


@functools.cache
def _cpu_losses() -> dict[str, list[float]]:
    process = subprocess.run(
        [sys.executable, "-c", _COMMAND],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    if process.returncode:
        raise RunError(f"the run on the CPU ended with code {process.returncode}")
    return json.loads(process.stdout.splitlines()[-1])


def print_losses() -> None:
    """What the process on the CPU does."""
    print(json.dumps({name: losses(name) for name in RUNS}))
