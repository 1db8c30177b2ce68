"""Logging of step metrics, read one step late so that no device waits for the host."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping

import jax

from ranktuner_jax.data import Batch
from ranktuner_jax.train.telemetry.telemetry import Telemetry
from ranktuner_jax.train.telemetry.utilisation import Utilisation

__all__ = ["NonFiniteError", "StepLog", "prefixed"]


@dataclasses.dataclass
class NonFiniteError(Exception):
    """A non-finite step beyond the limit; the state is unchanged."""

    step: int
    loss: float
    grad_norm: float
    batch: Batch


class StepLog:
    """Reads the metrics of a step once the next one is running, so that no device waits.

    Args:
      telemetry: Where the metrics are recorded.
      utilisation: Computes throughput and memory use of a step.
      steps: The steps of the whole run.
      every: Steps between recorded steps; the first and the last are always recorded.
      skipped: Non-finite steps before this process started.
      limit: Maximum number of non-finite steps in the run.
    """

    def __init__(
        self,
        telemetry: Telemetry,
        utilisation: Utilisation,
        steps: int,
        *,
        every: int = 1,
        skipped: int = 0,
        limit: int = 0,
    ) -> None:
        self.skipped, self._limit = skipped, limit
        self._utilisation = utilisation
        self._telemetry = telemetry
        self._steps, self._every = steps, every
        self._held: tuple[int, Mapping[str, jax.Array], Batch] | None = None
        self._clock = time.perf_counter()
        self._step_times: list[float] = []

    def restart_clock(self) -> None:
        """Excludes the time since the last step from the time of the next one."""
        self._clock = time.perf_counter()

    def read_previous_then_hold(
        self, step: int, metrics: Mapping[str, jax.Array], batch: Batch
    ) -> None:
        """Reads the previous step; holds this one's metrics, which are still being computed."""
        self.read()
        self._held = (step, metrics, batch)

    def read(self) -> None:
        """Waits for the held step and records its metrics."""
        if self._held is None:
            return
        (step, arrays, batch), self._held = self._held, None
        values = {name: float(value) for name, value in jax.device_get(arrays).items()}
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        self._step_times = [*self._step_times[-19:], seconds]
        if values.pop("nonfinite"):
            self.skipped += 1
            if self.skipped > self._limit:
                raise NonFiniteError(step, values["loss"], values["grad_norm"], batch)
        tokens, supervised = values.pop("tokens"), values.pop("supervised_tokens")
        seen = values.pop("seen")
        values |= {
            "tokens_per_second": tokens / seconds,
            "supervised_tokens_per_second": supervised / seconds,
            "step_seconds": seconds,
            "skipped_steps": self.skipped,
        }
        write = step % self._every == 0 or step in (1, self._steps)
        if write:
            values |= self._utilisation.metrics(
                tokens=tokens, supervised=supervised, seen=seen, seconds=seconds
            )
        self._telemetry.record(step, prefixed("train", values), write)  # For hooks: every step.
        if write:
            mean = sum(self._step_times) / len(self._step_times)
            self._telemetry.progress.step(
                step,
                loss=values["loss"],
                nll=values["nll"],
                speed=tokens / seconds,
                left=mean * (self._steps - step),
            )


def prefixed(group: str, values: Mapping[str, float]) -> dict[str, float]:
    """Adds a group to metric names, as in "train/nll", unless they have one."""
    return {name if "/" in name else f"{group}/{name}": value for name, value in values.items()}
