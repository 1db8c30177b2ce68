"""The hooks of a trainer: when they are called, and how a resumed run continues with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ranktuner_jax.train.hooks.hook import Hook
from ranktuner_jax.train.runtime.preemption import Stopped

if TYPE_CHECKING:
    from ranktuner_jax.train.trainer import Trainer

__all__ = ["HookCalls"]


class HookCalls:
    """Calls hooks in order. Those that a signal prevented are called when the run resumes.

    Args:
      hooks: The hooks.
    """

    def __init__(self, hooks: Sequence[Hook]) -> None:
        self._hooks = hooks
        self._called: list[Hook] = []  # After the last step.
        self._pending: list[Hook] = []  # Due after the last step, and not called yet.

    def start(self, trainer: Trainer) -> None:
        """Called when training begins."""
        for hook in self._hooks:
            hook.start(trainer)

    def before_step(self, trainer: Trainer, step: int) -> None:
        """Called before each step."""
        self._called = []
        for hook in self._hooks:
            hook.before_step(trainer, step)

    def are_due(self, step: int) -> bool:
        """Whether any hook is due after this step."""
        return any(hook.is_due(step) for hook in self._hooks)

    def after_step(self, trainer: Trainer, step: int, stopping: bool) -> bool:
        """Calls the hooks that are due, unless the run is stopping; returns whether it is then."""
        self._pending = [hook for hook in self._hooks if hook.is_due(step)]
        return stopping or self.call_pending(trainer)

    def call_pending(self, trainer: Trainer) -> bool:
        """Calls the hooks that are pending; returns whether a signal prevented any."""
        try:
            while self._pending:
                self._pending[0](trainer)
                self._called.append(self._pending.pop(0))
        except Stopped:
            return True
        return False

    def finish(self, trainer: Trainer) -> None:
        """Called after the last step; no hook is called twice for it."""
        for hook in self._hooks:
            if hook.at_end and hook not in self._called:
                hook(trainer)

    def close(self) -> None:
        """Called when training ends for any reason."""
        for hook in self._hooks:
            hook.close()

    def get_state(self) -> dict[str, Any]:
        """The state of each hook by name, and which are pending."""
        named = self._by_name()
        return {
            "states": {name: hook.get_state() for name, hook in named.items()},
            "pending": [name for name, hook in named.items() if hook in self._pending],
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Restores it; hooks that were not there then keep their own."""
        named = self._by_name()
        self._pending = [hook for name, hook in named.items() if name in state["pending"]]
        for name, hook in named.items():
            if name in state["states"]:
                hook.set_state(state["states"][name])

    def _by_name(self) -> dict[str, Hook]:
        """Hooks by the name of their class; those of one class are numbered."""
        named: dict[str, Hook] = {}
        for hook in self._hooks:
            name = type(hook).__name__
            same = sum(key.split(".")[0] == name for key in named)
            named[f"{name}.{same}" if same else name] = hook
        return named
