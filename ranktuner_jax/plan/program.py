"""The step that training would run, compiled for devices that need not be there, without arrays."""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ranktuner_jax import models
from ranktuner_jax.data import Batch
from ranktuner_jax.errors import UserError
from ranktuner_jax.plan.hlo import Program
from ranktuner_jax.train.config import TrainConfig
from ranktuner_jax.train.random_model import random_model
from ranktuner_jax.train.runtime.mesh import BATCH_AXES, check_batch, make_mesh
from ranktuner_jax.train.step.optimizers import make_optimizer
from ranktuner_jax.train.step.schedules import make_schedule
from ranktuner_jax.train.step.state import TrainState, abstract_state
from ranktuner_jax.train.step.train_step import make_train_step

__all__ = ["CompiledStep", "Sizes", "TooLargeError", "compile_step", "read_model"]


class TooLargeError(UserError):
    """XLA refuses to compile a step, since it needs more memory than the device has."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of a step.

    Attributes:
      rows: Rows per step, of all devices.
      accumulation: Micro-batches.
      length: Tokens of a row.
      shares: Devices, or groups of them, that have rows of their own.
    """

    rows: int
    accumulation: int
    length: int
    shares: int

    @property
    def micro_tokens(self) -> int:
        """Positions of one device in a micro-batch."""
        return self.rows // self.accumulation // self.shares * self.length


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """A compiled step.

    Attributes:
      model: The decoder.
      lora: Its adapters, if these are trained.
      mesh: Its devices.
      sizes: Its batch.
      state: The train state: shapes and shardings.
      text: The optimized program.
      memory: XLA's account of its memory, on each device.
      seconds: How long tracing and compilation took.
    """

    model: models.DecoderConfig
    lora: models.Lora | None
    mesh: Mesh
    sizes: Sizes
    state: TrainState
    text: str
    memory: Any
    seconds: float

    def program(self) -> Program:
        """The program, in which every position is supervised."""
        return Program(self.text, chunk_trips(self.text, self.sizes.micro_tokens))


def chunk_trips(text: str, tokens: int) -> Callable[[str], float]:
    """How often the loops of the loss run, which is for the mask to say.

    Args:
      text: A program with a fused loss.
      tokens: Supervised positions of one call of the loss.

    Returns:
      The number of iterations from the path of a loop, as `Program` takes it.
    """
    # The loss runs over as many chunks as supervised tokens fill, and then over the rest.
    chunks = [int(n) for n in set(re.findall(r"chunks_of_(\d+)", text))]
    left = tokens
    trips = {}
    for size in sorted(chunks, reverse=True):
        trips[size] = left // size if size > min(chunks) else math.ceil(left / size)
        left -= trips[size] * size

    def dynamic(path: str) -> float:
        match = re.search(r"chunks_of_(\d+)", path)
        return trips[int(match[1])] if match else 1.0

    return dynamic


def read_model(config: TrainConfig) -> models.DecoderConfig:
    """The shape of a config's model; its config.json is enough.

    Raises:
      UserError: If there is no such model, or the hub does not give its config.
    """
    return models.read_config(models.resolve(config.model, weights=False))


def compile_step(
    config: TrainConfig, model: models.DecoderConfig, devices: Sequence[jax.Device]
) -> CompiledStep:
    """Compiles the step of a config.

    Args:
      config: The config.
      model: The shape of its model.
      devices: What to compile for.

    Raises:
      UserError: If the mesh or the batch does not suit the devices.
      TooLargeError: If XLA finds that the step needs more memory than a device has.
    """
    start = time.perf_counter()
    train, loss, lora = config.train, config.loss, config.lora
    if lora.adapter:
        raise UserError(
            f"lora.adapter: expected new adapters for a plan, got {lora.adapter}; set lora.rank to "
            "the rank that its adapter_config.json has"
        )
    mesh = make_mesh(config.mesh, devices)
    check_batch(mesh, train.batch_size, train.accumulation)
    model = dataclasses.replace(model, vocab_multiple=max(1, mesh.shape["tensor"]))
    abstract = nnx.eval_shape(lambda: random_model(config, model, mesh))
    steps = train.steps
    state = abstract_state(abstract, make_optimizer(config.optimizer, steps), mesh)
    shares = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    sizes = Sizes(train.batch_size, train.accumulation, config.data.row_length, shares)
    step = make_train_step(
        state,
        mesh,
        weighting=loss.make_weighting(),
        normalize=loss.normalize,
        ramp_steps=loss.ramp_steps,
        chunk_size=loss.chunk_size or None,
        clip_norm=config.optimizer.clip_norm,
        schedule=make_schedule(config.optimizer, steps),
    )
    hold = jax.ShapeDtypeStruct((), jnp.bool_, sharding=NamedSharding(mesh, PartitionSpec()))
    try:
        compiled = step.lower(state, _batch(mesh, sizes), hold).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = str(error).splitlines()[0]
        raise TooLargeError(
            f"the step does not fit: {reason}; raise train.accumulation, set train.remat=full, or "
            "divide further; --search tries them"
        ) from None
    memory = compiled.memory_analysis()
    text = compiled.as_text() or ""
    seconds = time.perf_counter() - start
    return CompiledStep(model, lora.new_adapters, mesh, sizes, state, text, memory, seconds)


def _batch(mesh: Mesh, sizes: Sizes) -> Batch[Any]:
    rows = (sizes.accumulation, sizes.rows // sizes.accumulation)
    sharding = NamedSharding(mesh, PartitionSpec(None, BATCH_AXES))
    one = np.zeros((1, 1))
    row = Batch.of({"tokens": one, "labels": one, "mask": one})
    return jax.tree.map(
        lambda array: jax.ShapeDtypeStruct(
            rows if array.ndim == 1 else (*rows, sizes.length), array.dtype, sharding=sharding
        ),
        row,
    )
