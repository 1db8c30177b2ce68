"""Sample completions during training, for people to read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
from etils import epath

from ranktuner_jax import data, evals, files
from ranktuner_jax.train.hooks.hook import Hook

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ranktuner_jax.train.trainer import Trainer

__all__ = ["SampleCompletions"]


class SampleCompletions(Hook):
    """Writes greedy completions of a few prompts to `samples/step_N.jsonl` in the workdir.

    Each line holds step, prompt, reference and completion, as text.

    Args:
      tokenizer: Decodes completions, and defines the tokens that end a turn.
      examples: Held-out conversations, as `data.load_examples` returns them.
      max_new_tokens: Maximum length of a completion.
      every: Steps between samples; 0 samples at the end only.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        examples: Sequence[data.Example],
        *,
        max_new_tokens: int = 64,
        every: int = 0,
    ) -> None:
        super().__init__(every=every)
        self._tokenizer, self._examples = tokenizer, list(examples)
        self._max_new_tokens = max_new_tokens

    def start(self, trainer: Trainer) -> None:
        """Checks that the trainer has a workdir."""
        if trainer.workdir is None:
            raise ValueError("SampleCompletions needs a trainer with a workdir.")

    def __call__(self, trainer: Trainer) -> None:
        """Generates and writes the completions."""
        completions = evals.generate(
            trainer.model,
            [example.prompt_tokens for example in self._examples],
            max_new_tokens=self._max_new_tokens,
            stop_ids=evals.stop_ids(self._tokenizer),
        )
        lines = [
            json.dumps(
                {
                    "step": trainer.steps_done,
                    "prompt": self._text(example.prompt_tokens),
                    "reference": self._text(example.completion_tokens),
                    "completion": self._text(completion.tokens),
                },
                ensure_ascii=False,
            )
            for example, completion in zip(self._examples, completions, strict=True)
        ]
        if jax.process_index() == 0:
            assert trainer.workdir is not None
            folder = epath.Path(trainer.workdir) / "samples"
            path = folder / f"step_{trainer.steps_done:06}.jsonl"
            files.write_whole(path, "\n".join(lines) + "\n")

    def _text(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))
