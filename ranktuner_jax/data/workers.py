"""Processes that tokenize parts of a source, one for each core."""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO

from ranktuner_jax.errors import RunError

if TYPE_CHECKING:
    from ranktuner_jax.data.cache_builder import Builder

__all__ = ["Workers", "serve"]

# A process has to import everything first, which takes as long as tokenizing some parts.
_PARTS_PER_PROCESS = 4
# Not multiprocessing: it would run the user's script again in each process, or fork one with
# threads.
_COMMAND = (sys.executable, "-c", "from ranktuner_jax.data.workers import serve; serve()")


class Workers:
    """Builds parts in this process, or in several if there are parts enough for each.

    Args:
      builder: Builds parts in this process.
      tokenizer: The tokenizer of its encoder.
      parts: How many are to be built.
    """

    def __init__(self, builder: Builder, tokenizer: Any, parts: int) -> None:
        self._builder = builder
        self._processes: list[subprocess.Popen[bytes]] = []
        count = min(_cores(), parts // _PARTS_PER_PROCESS)
        self._count = count if count > 1 else 0
        if self._count:
            self._job = pickle.dumps((*builder.job(), tokenizer))
        self._threads = ThreadPoolExecutor(max(1, self._count))
        self._local = threading.local()

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._threads.shutdown(cancel_futures=True)
        for process in self._processes:
            with contextlib.suppress(BrokenPipeError):
                assert process.stdin
                process.stdin.close()
            process.wait()

    def build(self, numbers: Sequence[int], wait: bool) -> Iterator[bool]:
        """Builds parts; see `Builder.build`. The error of the first part that has one is raised."""
        if not self._count:
            return (self._builder.build(number, wait) for number in numbers)
        return self._threads.map(lambda number: self._ask(number, wait), numbers)

    def _ask(self, number: int, wait: bool) -> bool:
        if not hasattr(self._local, "process"):
            self._local.process = self._start()
        process = self._local.process
        try:
            pickle.dump((number, wait), process.stdin)
            process.stdin.flush()
            answer = pickle.load(process.stdout)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError) as error:
            raise RunError(
                f"data cache: a process that tokenizes ended with code {process.wait()}; what is "
                "done is kept, run the same command again to go on"
            ) from error
        if isinstance(answer, BaseException):
            raise answer
        return bool(answer)

    def _start(self) -> subprocess.Popen[bytes]:
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            # Each process has one core, and none an accelerator.
            "TOKENIZERS_PARALLELISM": "false",
            "JAX_PLATFORMS": "cpu",
        }
        process = subprocess.Popen(
            _COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        self._processes.append(process)
        assert process.stdin
        process.stdin.write(self._job)
        return process


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def serve() -> None:
    """Builds the parts that are asked for on standard input, until it ends."""
    asked = sys.stdin.buffer
    # What libraries print must not get between the answers.
    answers: BinaryIO = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    from ranktuner_jax.data.cache_builder import Builder
    from ranktuner_jax.data.chat import ChatEncoder
    from ranktuner_jax.data.encode import Split

    config, name, chosen, held_out, folder, rows, tokenizer = pickle.load(asked)
    split = Split(config, name, chosen)
    split.held_out = held_out
    encoder = ChatEncoder(tokenizer, enable_thinking=config.enable_thinking)
    builder = Builder(split, encoder, folder, rows)
    while True:
        try:
            number, wait = pickle.load(asked)
        except EOFError:
            return
        answer: bool | Exception
        try:
            answer = builder.build(number, wait)
        except Exception as error:  # Raised again in the process that asked.
            answer = error
        pickle.dump(answer, answers)
        answers.flush()
