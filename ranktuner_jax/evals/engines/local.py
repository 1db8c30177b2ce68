"""Answers of a decoder in this process."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ranktuner_jax.data import BadRowError, ChatEncoder
from ranktuner_jax.errors import UserError
from ranktuner_jax.evals.benchmarks import Question
from ranktuner_jax.evals.engines.engine import Answer, Choice, Request, Sampling
from ranktuner_jax.evals.likelihood import encode_continuation, log_likelihoods
from ranktuner_jax.evals.sampler import Completion, generate
from ranktuner_jax.evals.stopping import stop_ids
from ranktuner_jax.models import Decoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["LocalEngine"]

# Questions whose choices are scored between two reports.
_QUESTIONS_PER_CALL = 64


class LocalEngine:
    """Samples from a decoder, on its mesh.

    Args:
      model: The decoder.
      tokenizer: Its tokenizer; answers need one with a chat template.
      name: What to call the model in results.
      enable_thinking: Passed to the chat template; Qwen3's uses it.
      options: Of `generate`, such as its memory for the cache.

    Attributes:
      description: The model and the precision of its arithmetic.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str = "",
        enable_thinking: bool = True,
        **options: Any,
    ) -> None:
        self._model, self._tokenizer, self._options = model, tokenizer, options
        self._enable_thinking = enable_thinking
        self.description: Mapping[str, Any] = {
            "engine": "local",
            "model": name,
            "dtype": str(model.dtype),
        }

    def answer(
        self, requests: Sequence[Request], sampling: Sampling, done: Callable[[int, Answer], None]
    ) -> None:
        """Writes an answer to each request; see `Engine.answer`."""
        # Here, since choices are scored without a chat template.
        encoder = ChatEncoder(self._tokenizer, enable_thinking=self._enable_thinking)
        prompts: dict[int, list[int]] = {}
        for question, _ in requests:
            if question.index not in prompts:
                try:
                    prompts[question.index] = encoder.encode_prompt(question.messages)
                except BadRowError as error:
                    raise UserError(f"question {question.index}: {error}") from error

        def finished(index: int, completion: Completion) -> None:
            text = str(self._tokenizer.decode(completion.tokens, skip_special_tokens=True))
            done(index, Answer(text, len(completion.tokens), completion.finished))

        generate(
            self._model,
            [prompts[question.index] for question, _ in requests],
            keys=[(question.index, sample) for question, sample in requests],
            max_new_tokens=sampling.max_new_tokens,
            stop_ids=stop_ids(self._tokenizer),
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            seed=sampling.seed,
            done=finished,
            **self._options,
        )

    def choose(self, questions: Sequence[Question], done: Callable[[int, Choice], None]) -> None:
        """Finds how likely each choice is; see `Engine.choose`.

        The text stands by itself, without a chat template, as in lm-eval.
        """
        for start in range(0, len(questions), _QUESTIONS_PER_CALL):
            some = questions[start : start + _QUESTIONS_PER_CALL]
            pairs = [
                encode_continuation(self._tokenizer, question.text, choice)
                for question in some
                for choice in question.choices
            ]
            values = iter(log_likelihoods(self._model, pairs))
            for index, question in enumerate(some, start):
                of_choices = itertools.islice(values, len(question.choices))
                done(index, Choice(tuple(value.total for value in of_choices)))
