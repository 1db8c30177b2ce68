"""Runs programs that nobody has read, and says whether they are right."""

import atexit
import concurrent.futures
import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Any

from ranktuner_jax.errors import RunError, UserError
from ranktuner_jax.evals.sandbox import policy

__all__ = ["Program", "Verdict", "check_python", "check_python_many", "run_python"]

LEAST_MEMORY_MB = 64  # Python itself takes about half of this.
PATIENCE_S = 30.0  # How long a worker may take beyond a program's own time.


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether a program passed, and why it did not.

    Attributes:
      passed: True if everything ran to its end.
      reason: One line, such as `AssertionError in: assert f(2) == 4`.
    """

    passed: bool
    reason: str


@dataclasses.dataclass(frozen=True)
class Program:
    """A program, and the tests that it is to pass.

    Attributes:
      code: The candidate: a whole Python module.
      tests: Python that calls the candidate's functions and asserts.
      entry_point: The function to test. Where the tests define `check`, it is called with this
        function, as in HumanEval.
    """

    code: str
    tests: str
    entry_point: str | None = None


class _Worker:
    """A process that grades, one program at a time."""

    def __init__(self) -> None:
        script = pathlib.Path(__file__).with_name("worker.py")
        self._process = subprocess.Popen(
            [sys.executable, "-I", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C ends this process, which ends the worker.
        )

    def answer(self, job: dict[str, Any]) -> dict[str, Any]:
        """The worker's answer to a job."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        guard = threading.Timer(job["timeout_s"] + PATIENCE_S, self._process.kill)
        guard.start()
        try:
            self._process.stdin.write(json.dumps(job).encode() + b"\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except OSError:
            line = b""
        finally:
            guard.cancel()
        if not line:
            self.close()
            return {"broken": "its worker ended"}
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """Ends the process, whatever it is doing."""
        self._process.kill()
        self._process.communicate()

    @property
    def ended(self) -> bool:
        """Whether the process is no longer there."""
        return self._process.poll() is not None


class _Workers:
    """Workers that wait for their next program, so that each starts once."""

    def __init__(self) -> None:
        self._idle: list[_Worker] = []
        # A forked child must not speak to its parent's workers.
        os.register_at_fork(after_in_child=self._idle.clear)
        atexit.register(self.close)

    def answer(self, job: dict[str, Any]) -> dict[str, Any]:
        """The answer of an idle worker, or of a new one; any number of threads may ask."""
        try:
            worker = self._idle.pop()
        except IndexError:
            worker = _Worker()
        try:
            answer = worker.answer(job)
        except BaseException:  # Such as Ctrl-C: its answer would be taken for the next one's.
            worker.close()
            raise
        if not worker.ended:
            self._idle.append(worker)
        return answer

    def close(self) -> None:
        """Ends the idle workers."""
        while self._idle:
            self._idle.pop().close()


_WORKERS = _Workers()


@functools.cache
def find_sandbox(name: str = "auto") -> str:
    """The sandbox to use, `"sandlock"` or `"bubblewrap"`, once it has run a program.

    Args:
      name: A sandbox, or `"auto"` for the first that works.

    Raises:
      UserError: If none works here.
    """
    if name not in ("auto", *policy.SANDBOXES):
        known = ", ".join(("auto", *policy.SANDBOXES))
        raise UserError(f"sandbox: expected one of {known}, got {name!r}; fix the name")
    found = []
    for sandbox in policy.SANDBOXES if name == "auto" else [name]:
        answer = _WORKERS.answer(policy.job(sandbox, "pass", None, None, 10.0, 1024))
        if answer.get("passed"):
            return sandbox
        found.append(f"{sandbox}: {answer.get('broken') or answer.get('reason')}")
    raise UserError(
        f"sandbox: expected one that can run untrusted programs, got none ({'; '.join(found)}); "
        "on Linux 6.12 or newer pip install sandlock, on an older one apt install bubblewrap"
    )


def _verdict(
    code: str,
    tests: str | None,
    entry_point: str | None,
    timeout_s: float,
    memory_mb: int,
    sandbox: str,
) -> Verdict:
    """The verdict of a worker on one program."""
    if not timeout_s > 0:
        raise UserError(f"timeout_s: expected more than 0 seconds, got {timeout_s}; raise it")
    if memory_mb < LEAST_MEMORY_MB:
        raise UserError(
            f"memory_mb: expected at least {LEAST_MEMORY_MB}, got {memory_mb}; raise it"
        )
    where = find_sandbox(sandbox)
    answer = _WORKERS.answer(
        policy.job(where, code, tests, entry_point, float(timeout_s), memory_mb)
    )
    if "mistake" in answer:
        raise UserError(f"tests: {answer['mistake']}; correct the tests")
    if "broken" in answer:
        raise RunError(f"{where}: could not run a program ({answer['broken']}); try again")
    return Verdict(answer["passed"], answer["reason"])


def run_python(
    code: str, *, timeout_s: float = 10.0, memory_mb: int = 1024, sandbox: str = "auto"
) -> Verdict:
    """Runs a whole program in a sandbox, which passes if it runs to its end.

    An error, an exit (even with code 0) and a limit are failures. The program has one process
    and one thread, no network and no environment; it can read the standard library and write
    nothing. Here a program shares its process with the asserts in it, so that one that sets
    out to can pass without running them: to grade, use `check_python`.

    Args:
      code: The program, with its asserts.
      timeout_s: Seconds on the clock that it may take, start included.
      memory_mb: MiB of address space, of which Python takes about 30; at least 64.
      sandbox: `"sandlock"`, `"bubblewrap"` or `"auto"`, the first of them that works.

    Returns:
      Whether it passed, and why not.

    Raises:
      UserError: If no sandbox works here, or an argument is out of range.
      RunError: If the sandbox failed, so that nothing is known of the program.

    Example:
      >>> run_python("assert 1 + 1 == 3")  # doctest: +SKIP
      Verdict(passed=False, reason='AssertionError')
    """
    return _verdict(code, None, None, timeout_s, memory_mb, sandbox)


def check_python(
    code: str,
    tests: str,
    entry_point: str | None = None,
    *,
    timeout_s: float = 10.0,
    memory_mb: int = 1024,
    sandbox: str = "auto",
) -> Verdict:
    """Grades a program by tests that it cannot reach.

    The tests run unchanged in one sandbox and the program in another. Each name that the tests
    use and do not define calls the program's function of that name. Arguments, results and
    exceptions cross as plain data (None, bool, int, float, complex, str, bytes, bytearray,
    list, tuple, dict, set, frozenset and iterators, nested), and a change of an argument in
    place comes back; of a result of any other type the tests learn only whether it is true.
    So a program can give wrong answers and nothing else: it sees no expected value, and the
    verdict leaves the tests' own process by a way that the program does not have.

    Args:
      code: The program under test.
      tests: Python that calls it: asserts, as in MBPP, or a function `check`, as in HumanEval.
        Functions that they need are defined here too; a definition of `entry_point` is left
        out, so that the text that the program completes may come first. Names of modules of
        the standard library are imported.
      entry_point: The function under test; needed for `check`, and where a function has the
        name of a built-in.
      timeout_s: Seconds on the clock for the program and its tests, start included.
      memory_mb: MiB of address space for each of the two.
      sandbox: As in `run_python`.

    Returns:
      Whether it passed, and why not.

    Raises:
      UserError: If no sandbox works here, an argument is out of range, or the tests are not
        Python, never call the program, or pass it what is not plain data.
      RunError: If the sandbox failed, so that nothing is known of the program.

    Example:
      >>> check_python("def f(x): return x * x", "assert f(3) == 9")  # doctest: +SKIP
      Verdict(passed=True, reason='passed its tests')
    """
    return _verdict(code, tests, entry_point, timeout_s, memory_mb, sandbox)


def check_python_many(
    programs: Sequence[Program],
    *,
    workers: int | None = None,
    timeout_s: float = 10.0,
    memory_mb: int = 1024,
    sandbox: str = "auto",
) -> list[Verdict]:
    """Grades programs as `check_python` does, several at a time.

    Args:
      programs: What to grade.
      workers: Programs that run at a time; the processors of this machine by default.
      timeout_s: Seconds for each.
      memory_mb: MiB for each of the two processes of each.
      sandbox: As in `run_python`.

    Returns:
      One verdict for each program, in order.

    Raises:
      UserError: As `check_python`.
      RunError: As `check_python`.

    Example:
      >>> programs = [Program("def f(x): return x", "assert f(3) == 9")]
      >>> check_python_many(programs)  # doctest: +SKIP
      [Verdict(passed=False, reason='AssertionError in: assert f(3) == 9')]
    """
    workers = workers or len(os.sched_getaffinity(0))
    find_sandbox(sandbox)  # Once, and not in every thread at the same time.

    def check(program: Program) -> Verdict:
        return check_python(
            program.code,
            program.tests,
            program.entry_point,
            timeout_s=timeout_s,
            memory_mb=memory_mb,
            sandbox=sandbox,
        )

    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        return list(pool.map(check, programs))
