"""The base class of hooks: called every n steps and at the end of training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ranktuner_jax.train.trainer import Trainer

__all__ = ["Hook"]


class Hook:
    """Called with the trainer every n steps, and at the end of training.

    A hook can read `trainer.steps_done`, `trainer.model` and `trainer.metrics` (by name, such as
    "train/loss"), log more metrics with `trainer.log`, print a line with `trainer.say` and end
    training after the current step with `trainer.stop`. Hooks are called in order, before the
    checkpoint of the step is saved, and in every process.

    A hook with state is a subclass that implements `get_state` and `set_state`; its state is saved
    with each checkpoint.

    Args:
      call: The function to call; a subclass overrides `__call__` instead.
      every: Steps between calls; 0 calls it at the end only.
      at_end: Whether to call it at the end too, unless the last step has already.

    A subclass may set `every` and `at_end` as class attributes instead.

    Example:
      >>> hook = Hook(lambda trainer: trainer.say(f"step {trainer.steps_done}"), every=10)
      >>> hook.is_due(20), hook.is_due(25)
      (True, False)
    """

    every: int = 0
    at_end: bool = True
    _call: Callable[[Trainer], object] | None = None

    def __init__(
        self,
        call: Callable[[Trainer], object] | None = None,
        *,
        every: int | None = None,
        at_end: bool | None = None,
    ) -> None:
        if every is not None and every < 0:
            raise ValueError(f"every must be 0 or more: got {every}.")
        self._call = call
        self.every = type(self).every if every is None else every
        self.at_end = type(self).at_end if at_end is None else at_end

    def is_due(self, step: int) -> bool:
        """Whether to call the hook after this step; the last step depends on `at_end` instead."""
        return self.every > 0 and step % self.every == 0

    def start(self, trainer: Trainer) -> None:
        """Called when `Trainer.fit` starts, after the state of a resumed run is restored."""

    def before_step(self, trainer: Trainer, step: int) -> None:
        """Called before each step, with its number."""

    def __call__(self, trainer: Trainer) -> None:
        """Called after the steps at which the hook is due."""
        if self._call is None:
            raise NotImplementedError(f"{type(self).__name__} needs a function, or a __call__")
        self._call(trainer)

    def close(self) -> None:
        """Called when `Trainer.fit` returns or raises."""

    def get_state(self) -> dict[str, Any]:
        """The state to save, as JSON types."""
        return {}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Restores what `get_state` returned when the checkpoint was saved."""
