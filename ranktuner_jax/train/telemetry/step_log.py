"""What a run says of its steps, read one step late so that no device waits for the host."""

from __future__ import annotations

import time
from collections.abc import Mapping

import jax

from ranktuner_jax.train.nonfinite import NonFiniteError
from ranktuner_jax.train.utilisation import Utilisation
from ranktuner_jax.train.writer import Writer

__all__ = ["StepLog", "prefixed"]


class StepLog:
    """Reads the metrics of a step once the next one is under way, so that no device waits.

    Args:
      writer: Where they go.
      steps: The steps of the whole run.
      every: Steps between two that are written; the first and the last are written too.
      utilisation: Turns the counts and the time of a step into what it asked of the machine.
      skipped: Steps that were not finite before this process began.
      limit: How many of those the run may have.
    """

    def __init__(
        self,
        writer: Writer,
        steps: int,
        every: int,
        utilisation: Utilisation,
        skipped: int = 0,
        limit: int = 0,
    ) -> None:
        self.skipped, self._limit = skipped, limit
        self._utilisation = utilisation
        self._writer, self._steps, self._every = writer, steps, every
        self._held: tuple[int, Mapping[str, jax.Array], Mapping[str, jax.Array]] | None = None
        self._clock = time.perf_counter()
        self._step_times: list[float] = []

    def restart_clock(self) -> None:
        """What happened since the last step is no part of the next one's time."""
        self._clock = time.perf_counter()

    def read_previous_then_hold(
        self, step: int, metrics: Mapping[str, jax.Array], batch: Mapping[str, jax.Array]
    ) -> None:
        """Reads the step before; keeps this one's metrics, which are still being computed."""
        self.read()
        self._held = (step, metrics, batch)

    def read(self) -> None:
        """Waits for the step that is held, and writes what it says."""
        if self._held is None:
            return
        (step, arrays, batch), self._held = self._held, None
        numbers = {name: float(value) for name, value in jax.device_get(arrays).items()}
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        self._step_times = [*self._step_times[-19:], seconds]
        if numbers.pop("nonfinite"):
            self.skipped += 1
            if self.skipped > self._limit:
                raise NonFiniteError(step, numbers["loss"], numbers["grad_norm"], batch)
        tokens, supervised = numbers.pop("tokens"), numbers.pop("supervised_tokens")
        seen = numbers.pop("seen")
        if step % self._every == 0 or step in (1, self._steps):
            numbers |= {
                "tokens_per_second": tokens / seconds,
                "supervised_tokens_per_second": supervised / seconds,
                "step_seconds": seconds,
                "skipped_steps": self.skipped,
            }
            numbers |= self._utilisation.metrics(
                tokens=tokens, supervised=supervised, seen=seen, seconds=seconds
            )
            self._writer.write(step, prefixed("train", numbers))
            mean = sum(self._step_times) / len(self._step_times)
            self._writer.progress(
                step,
                loss=numbers["loss"],
                nll=numbers["nll"],
                speed=tokens / seconds,
                left=mean * (self._steps - step),
            )


def prefixed(group: str, numbers: Mapping[str, float]) -> dict[str, float]:
    """Names such as "train/nll"; those that have a group of their own keep it."""
    return {name if "/" in name else f"{group}/{name}": value for name, value in numbers.items()}
