"""The file of all answers, `samples.jsonl`: each is written as it comes."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Iterable
from typing import Any

from ranktuner_jax import files
from ranktuner_jax.errors import UserError

__all__ = ["Sample", "SampleFile"]


@dataclasses.dataclass(frozen=True)
class Sample:
    """One line of `samples.jsonl`: an answer, or the likelihoods of the choices.

    Attributes:
      task: The benchmark.
      question: Number of the question in it, from 0.
      sample: Number of the answer to it, from 0.
      reference: What the answer is compared with.
      completion: The answer; "" where choices are scored.
      tokens: Its length.
      finished: Whether it ended by itself.
      log_likelihoods: Of the choices, in nats; empty for an answer.
      seconds: Since the evaluation of the benchmark began.
      correct: Whether the answer, or the likeliest choice, is right; None until it is graded.
      correct_per_character: Whether the choice that is likeliest per character is right; None for
        an answer.
    """

    task: str
    question: int
    sample: int
    reference: Any
    completion: str = ""
    tokens: int = 0
    finished: bool = True
    log_likelihoods: tuple[float, ...] = ()
    seconds: float = 0.0
    correct: bool | None = None
    correct_per_character: bool | None = None

    def to_json(self) -> str:
        """One line, without its end."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False)


class SampleFile:
    """Reads and writes `samples.jsonl`.

    A line that a killed process wrote in part, the last one, is dropped.

    Args:
      path: The file; it need not exist.

    Raises:
      UserError: If a line before the last is broken.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = pathlib.Path(folder, "samples.jsonl")
      ...     with SampleFile(path) as file:
      ...         file.append(Sample("sums", 0, 0, "4", "It is 4."))
      ...     [sample.completion for sample in SampleFile(path).samples]
      ['It is 4.']
    """

    def __init__(self, path: pathlib.Path) -> None:
        self._path = path
        self.samples: list[Sample] = []
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        for number, line in enumerate(lines, 1):
            try:
                sample = Sample(**json.loads(line))
            except (ValueError, TypeError) as error:
                if number == len(lines):
                    break
                raise UserError(
                    f"{path}:{number}: expected a sample, got a broken line ({error}); restore the "
                    "file, or choose another --output"
                ) from error
            if not line.endswith(b"\n"):
                break
            likelihoods = tuple(sample.log_likelihoods)
            self.samples.append(dataclasses.replace(sample, log_likelihoods=likelihoods))
        if len(self.samples) < len(lines):
            self.rewrite(self.samples)
        self._file: Any = None

    def __enter__(self) -> SampleFile:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("a", encoding="utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, sample: Sample) -> None:
        """Writes one more line; it is on its way to the disk when this returns."""
        self._file.write(sample.to_json() + "\n")
        self._file.flush()
        self.samples.append(sample)

    def rewrite(self, samples: Iterable[Sample]) -> None:
        """Replaces all lines at once."""
        self.samples = list(samples)
        files.write_whole(self._path, "".join(f"{s.to_json()}\n" for s in self.samples))
