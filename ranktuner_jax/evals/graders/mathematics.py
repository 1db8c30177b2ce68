"""Grades mathematical answers by meaning, in worker processes."""

from __future__ import annotations

import atexit
import concurrent.futures
import contextlib
import functools
import importlib.util
import json
import os
import pathlib
import queue
import re
import subprocess
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from ranktuner_jax.errors import RunError, UserError
from ranktuner_jax.evals.answers import announced, last_box
from ranktuner_jax.evals.graders.reference import reference_text

__all__ = ["MathGrader", "math"]

# Formulas, and several that are joined; none reaches over the start of another one.
_INSIDE = r"(?:[^\\]|\\[^()\[\]])+"
_SPAN = rf"(?:(?<!\\)\$\$[^$]+\$\$|(?<!\\)\$[^$]+\$|\\\({_INSIDE}\\\)|\\\[{_INSIDE}\\\])"
_SPANS = re.compile(rf"{_SPAN}(?:(?:\s*,?\s*(?:and|or)\s+|\s*,\s*){_SPAN})*")
_DELIMITER = re.compile(r"\\[()\[\]]")
_SENTENCE_END = re.compile(r"\.(?=\s|$)|\n")
_NUMBER = re.compile(r"-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:/\d+)?")
_HASHES = re.compile(r"####[^\S\n]*(.*)")


class MathGrader:
    r"""Grades mathematical answers with math-verify, in processes that a bad answer cannot harm.

    The answer of a completion is the first of these that it has: what its last `\boxed{}` holds,
    and no other box; what follows its last "answer is" or "answer:", a formula (`$...$`) or the
    rest of the sentence; its last formula; its last number. These are the conventions of the
    evaluation of Qwen2.5-Math. Of a reference that is a whole solution, the last box or the line
    after `####` counts.

    The two are equal if they say the same: fractions, decimals, roots and percentages by value
    (`1/2`, `0.5`, `50\%`), formulas by algebra, points coordinate by coordinate and in order, sets
    element by element and in any order, intervals with their ends. Every element must be there
    and none besides. `x = 3` is 3. Units and degree signs are ignored. A decimal is equal to a
    value that it agrees with to the sixth decimal place and the fourth digit.

    Each worker is a Python process without JAX, started when first needed (about a second) and
    kept. An answer that takes longer than `seconds` of its time or more than `memory` ends its
    worker and is wrong; the next one starts a new worker. Calls from several threads run in
    parallel, and each waits for a free worker.

    Args:
      workers: How many processes may run at once.
      seconds: The processor time that one answer may take, in seconds.
      memory: The address space of a worker, in bytes; about 100 MB are its own.

    Raises:
      UserError: If math-verify is not installed.

    Example:
      >>> with MathGrader(workers=1) as grader:
      ...     grader.grade_all([(r"So it is \boxed{0.5}.", r"\frac{1}{2}"), ("2, not 3", "2")])
      [True, False]
    """

    def __init__(self, workers: int = 1, *, seconds: float = 5.0, memory: int = 2**30) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise UserError(
                "the grader math: expected the package math-verify, found none; "
                'pip install "ranktuner-jax[eval]"'
            )
        self._workers = [_Worker(seconds, memory) for _ in range(workers)]
        # Last in, first out: one thread keeps to one worker, and the others are never started.
        self._free: queue.LifoQueue[_Worker] = queue.LifoQueue()
        for worker in self._workers:
            self._free.put(worker)

    def __call__(self, completion: str, reference: Any) -> bool:
        """Whether the answer of a completion equals the reference.

        Raises:
          ValueError: If the reference is not a text, a number or a list of one, or is empty.
          RunError: If no worker can be started.
        """
        wanted = _reference_answer(reference_text(reference))
        answer = _final_answer(completion)
        if answer is None:
            return False
        if answer.strip() == wanted.strip():
            return True
        worker = self._free.get()
        try:
            return worker.is_equal(wanted, answer)
        finally:
            self._free.put(worker)

    def grade_all(self, pairs: Sequence[tuple[str, Any]]) -> list[bool]:
        """Grades pairs of a completion and its reference with all workers, in order."""
        with concurrent.futures.ThreadPoolExecutor(len(self._workers)) as threads:
            return list(threads.map(lambda pair: self(*pair), pairs))

    def close(self) -> None:
        """Ends the workers; a later call starts new ones."""
        for worker in self._workers:
            worker.close()

    def __enter__(self) -> MathGrader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class _Worker:
    """A process that runs `math_worker.py`, started when needed and again after it has died."""

    def __init__(self, seconds: float, memory: int) -> None:
        script = pathlib.Path(__file__).with_name("math_worker.py")
        # -P: the modules beside the script must not shadow those of the standard library.
        self._command = [sys.executable, "-P", str(script), str(seconds), str(memory)]
        self._process: subprocess.Popen[str] | None = None

    def is_equal(self, reference: str, answer: str) -> bool:
        """The worker's verdict; an answer that it dies of is wrong."""
        request = json.dumps([reference, answer]) + "\n"
        try:
            # That a worker had died before is no verdict: another one is asked.
            process = self._given(request) or self._given(request)
            reply = process.stdout.readline() if process and process.stdout else ""
        except BaseException:
            # A reply that arrives after an interrupt would be taken for the next answer's.
            self.close()
            raise
        verdict, is_last = json.loads(reply or "[false, true]")
        if is_last:
            self.close()
        return bool(verdict)

    def _given(self, request: str) -> subprocess.Popen[str] | None:
        """The process that has taken a request, or None if it ended first."""
        process = self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(request)
            process.stdin.flush()
            if process.stdout.readline() == "taken\n":
                return process
        self.close()
        return None

    def close(self) -> None:
        """Ends the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _running(self) -> subprocess.Popen[str]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self.close()
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,  # Ctrl-C is for us: we end the worker
        )
        assert self._process.stdout is not None
        if self._process.stdout.readline() != "ready\n":
            code = self._process.wait()
            raise RunError(
                f"the grader math: its worker ended with code {code} before it was ready; run "
                f"{' '.join(self._command)} to see why"
            )
        return self._process


@functools.cache
def _default_grader() -> MathGrader:
    grader = MathGrader(os.cpu_count() or 1)
    atexit.register(grader.close)
    return grader


def math(completion: str, reference: Any) -> bool:
    r"""`MathGrader`, with up to a worker a processor, which are kept until Python ends.

    Raises:
      ValueError: If the reference is not a text, a number or a list of one, or is empty.
      UserError: If math-verify is not installed.
      RunError: If no worker can be started.

    Example:
      >>> math(r"It is \boxed{\dfrac{1}{2}}.", "0.5"), math(r"It is \boxed{(2, 1)}.", "(1, 2)")
      (True, False)
    """
    return _default_grader()(completion, reference)


def _final_answer(completion: str) -> str | None:
    """The text of a completion's answer, or None if it gives none."""
    if (box := last_box(completion)) is not None:
        return box or None
    if (passage := announced(completion)) is not None:
        if formula := _SPANS.match(passage):
            return _without_delimiters(formula[0])
        sentence = _SENTENCE_END.split(passage, maxsplit=1)[0].strip(" *")
        formula = _SPANS.search(sentence)
        if formula and not re.search(r"\d", sentence[: formula.start()]):
            return _without_delimiters(formula[0])
        return sentence or None
    for pattern in (_SPANS, _NUMBER):
        if found := [match[0] for match in pattern.finditer(completion)]:
            return _without_delimiters(found[-1])
    return None


def _without_delimiters(formulas: str) -> str:
    """The formulas with `$` between them only where a comma separates two."""
    return _DELIMITER.sub("$", formulas)


def _reference_answer(reference: str) -> str:
    """The answer that a reference is, or that it ends on."""
    if (box := last_box(reference)) is not None:
        return box
    if lines := _HASHES.findall(reference):
        return lines[-1]
    return reference
