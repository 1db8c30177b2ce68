"""What a benchmark declares: where its rows come from, what is asked and how answers are graded."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ranktuner_jax.errors import UserError

__all__ = ["Benchmark", "Messages", "Question", "digest"]

Row = Mapping[str, Any]
Messages = tuple[dict[str, str], ...]


@dataclasses.dataclass(frozen=True)
class Question:
    """One question of a benchmark.

    Attributes:
      index: Its number in the benchmark, from 0.
      text: What is asked, without the system prompt.
      messages: The turns before the answer.
      reference: What the grader compares an answer with, or the index of the right choice; of JSON
        types.
      choices: The continuations of `text` to choose from by likelihood; empty if answers are
        sampled.
    """

    index: int
    text: str
    messages: Messages
    reference: Any
    choices: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A set of questions with a grader.

    Attributes:
      name: What `--tasks` calls it.
      file: Its rows in a folder of benchmarks (`--data=FOLDER`), a JSONL file.
      ask: The text of a row's question, or the turns that end with it.
      reference: What answers to a row are compared with.
      grader: A name in `GRADERS` or `TASKS`; unused with `choices`.
      system: The system prompt; "" for none.
      choices: The continuations of a row's text, one of which is right: the model chooses the
        likeliest instead of writing an answer.
      source: Where the rows are if no data is given: `hub:owner/name` or a built-in data set.
      subset: The configuration of a hub data set.
      split: The split of `source`.
      keep: Which rows belong to it; all if None.

    Example:
      >>> capital = Benchmark(
      ...     name="capitals",
      ...     file="capitals.jsonl",
      ...     ask=lambda row: f"What is the capital of {row['country']}?",
      ...     reference=lambda row: row["capital"],
      ...     grader="exact",
      ... )
      >>> [question] = capital.questions([{"country": "Peru", "capital": "Lima"}], "capitals.jsonl")
      >>> question.messages, question.reference
      (({'role': 'user', 'content': 'What is the capital of Peru?'},), 'Lima')
    """

    name: str
    file: str
    ask: Callable[[Row], str | Sequence[dict[str, str]]]
    reference: Callable[[Row], Any]
    grader: str = ""
    system: str = ""
    choices: Callable[[Row], Sequence[str]] | None = None
    source: str = ""
    subset: str = ""
    split: str = "test"
    keep: Callable[[Row], bool] | None = None

    def questions(
        self, rows: Sequence[Row], where: str, limit: int | None = None
    ) -> list[Question]:
        """The questions of the benchmark's rows.

        Args:
          rows: The rows.
          where: The source, for messages.
          limit: Only the first so many.

        Raises:
          UserError: If a row lacks a field, or none is left.
        """
        questions: list[Question] = []
        for number, row in enumerate(rows, 1):
            try:
                if self.keep is not None and not self.keep(row):
                    continue
                asked, reference = self.ask(row), self.reference(row)
                choices = tuple(self.choices(row)) if self.choices is not None else ()
            except (KeyError, IndexError, TypeError, ValueError) as error:
                raise UserError(
                    f"{self.name}: row {number} of {where} is not one of this benchmark "
                    f"({type(error).__name__}: {error}); it has the fields {sorted(row)}"
                ) from error
            turns = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
            system = [{"role": "system", "content": self.system}] if self.system else []
            questions.append(
                Question(
                    len(questions), turns[-1]["content"], (*system, *turns), reference, choices
                )
            )
            if len(questions) == limit:
                break
        if not questions:
            raise UserError(f"{self.name}: expected questions in {where}, found none")
        return questions


def digest(questions: Sequence[Question]) -> str:
    """A name for a set of questions, which changes with any of them: 16 hexadecimal digits.

    Example:
      >>> question = Question(0, "2 + 2?", ({"role": "user", "content": "2 + 2?"},), "4")
      >>> digest([question]) == digest([dataclasses.replace(question, reference="5")])
      False
    """
    text = json.dumps([dataclasses.asdict(question) for question in questions], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
