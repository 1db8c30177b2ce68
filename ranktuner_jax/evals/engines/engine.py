"""What writes answers: the decoder of this package, or a server."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from ranktuner_jax.errors import UserError
from ranktuner_jax.evals.benchmarks import Question

__all__ = ["Answer", "Choice", "Engine", "Request", "Sampling"]


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How answers are drawn.

    Attributes:
      samples: Answers to each question.
      temperature: 0 takes the likeliest token.
      top_p: Draws among the likeliest tokens that have this probability together; 1 for all.
      top_k: Draws among so many of the likeliest tokens; 0 for all.
      max_new_tokens: The most tokens of an answer, the one that ends it included.
      seed: Another one draws other answers.

    Raises:
      UserError: If a value is out of its range, or several answers would all be the same.
    """

    samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("samples", 1), ("max_new_tokens", 1), ("top_k", 0)):
            if getattr(self, name) < least:
                raise UserError(f"--{name}: expected at least {least}, got {getattr(self, name)}")
        if self.temperature < 0:
            raise UserError(f"--temperature: expected at least 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top_p: expected more than 0 and at most 1, got {self.top_p}")
        if self.samples > 1 and self.temperature == 0:
            raise UserError(
                f"--samples={self.samples}: expected --temperature above 0, got 0, at which all "
                "answers to a question are the same; set --temperature=1, or --samples=1"
            )


class Request(NamedTuple):
    """One answer that is wanted: a question and the number of the sample, from 0."""

    question: Question
    sample: int


class Answer(NamedTuple):
    """One answer.

    Attributes:
      text: The text, without special tokens.
      tokens: Its length in tokens, without the one that ends it.
      finished: Whether it ended by itself, rather than at the limit.
    """

    text: str
    tokens: int
    finished: bool


class Choice(NamedTuple):
    """How likely the choices of one question are: the log-probability of each, in nats."""

    log_likelihoods: tuple[float, ...]


class Engine(Protocol):
    """Answers questions.

    Attributes:
      description: What identifies it, of JSON types; an evaluation goes on with the same only.
    """

    description: Mapping[str, Any]

    def answer(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        done: Callable[[int, Answer], None],
    ) -> None:
        """Writes an answer to each request, and calls `done` with its index and the answer.

        With several processes, all call with the same requests, and all get every answer.
        """

    def choose(self, questions: Sequence[Question], done: Callable[[int, Choice], None]) -> None:
        """Finds how likely the choices of each question are, and calls `done` likewise.

        Raises:
          UserError: If the engine does not tell likelihoods.
        """
