"""A process that grades one program after another, each in sandboxes of its own.

Jobs come as lines of JSON on the standard input, and answers leave on the standard output. It
runs as a script, without the rest of the package, so that nothing is ever forked from a
process that has JAX. Programs under test speak to their tests through it and to nothing else.
"""

import contextlib
import io
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

INSIDE = pathlib.Path(__file__).with_name("inside.py").read_text()
LINE_BYTES = 16 << 20  # The longest message, as in inside.py.
TEXT = 200
ENDED = (EOFError, OSError)  # What talking to a process that has ended raises.


class SandboxError(Exception):
    """The sandbox itself failed, so that nothing is known of the program."""


class Peer:
    """A process in a sandbox, and lines to and from it."""

    def __init__(self, process: Any, kill: Callable[[], None]) -> None:
        """Takes the ends of the process's pipes, which are unbuffered."""
        self.kill, self._stdin = kill, process.stdin
        self._stdout = io.BufferedReader(process.stdout)

    def send(self, line: bytes) -> None:
        """Sends a whole line; raises OSError where nobody reads."""
        rest = memoryview(line)
        while rest:
            rest = rest[self._stdin.write(rest) :]

    def receive(self) -> bytes:
        """The next whole line; raises EOFError where there is none."""
        line = self._stdout.readline(LINE_BYTES)
        if not line.endswith(b"\n"):
            raise EOFError
        return line


@contextlib.contextmanager
def sandlock(options: dict[str, Any], command: list[str]) -> Iterator[Peer]:
    """Runs a command under Landlock and seccomp."""
    import sandlock

    piped, null = sandlock.StdioMode.PIPED, sandlock.StdioMode.NULL
    box = sandlock.Sandbox(**options)
    with contextlib.ExitStack() as stack:
        process = stack.enter_context(box.popen(command, stdin=piped, stdout=piped, stderr=null))
        handle = os.pidfd_open(process.pid)
        stack.callback(os.close, handle)

        def kill() -> None:
            # By a handle: its number may be another's by now, and so may its process group.
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(handle, signal.SIGKILL)

        stack.callback(kill)
        yield Peer(process, kill)


@contextlib.contextmanager
def bubblewrap(options: dict[str, Any], command: list[str]) -> Iterator[Peer]:
    """Runs a command in namespaces of its own."""
    pipe, null = subprocess.PIPE, subprocess.DEVNULL
    full = [*options["command"], *command]
    with subprocess.Popen(full, bufsize=0, stdin=pipe, stdout=pipe, stderr=null) as process:
        try:
            yield Peer(process, process.kill)
        finally:
            process.kill()


SANDBOXES = {"sandlock": sandlock, "bubblewrap": bubblewrap}


def line_of(message: dict[str, Any]) -> bytes:
    """A message as a line of JSON."""
    return json.dumps(message).encode() + b"\n"


def failed(reason: str) -> dict[str, Any]:
    """The answer for a program that did not pass."""
    return {"passed": False, "reason": reason[:TEXT]}


def object_in(line: bytes) -> dict[str, Any]:
    """The object that a line from a sandbox holds; an empty one where it holds none."""
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return message if isinstance(message, dict) else {}


def answer_in(message: dict[str, Any]) -> dict[str, Any]:
    """An answer from a sandbox, as plain as it should be."""
    if "mistake" in message:
        return {"mistake": str(message["mistake"])[:TEXT]}
    reason = str(message.get("reason", "answered out of turn"))[:TEXT]
    return {"passed": message.get("passed") is True, "reason": reason}


def converse(job: dict[str, Any], peers: dict[str, Peer]) -> dict[str, Any]:
    """Gives the processes their parts of the job, and carries calls from tests to candidate."""
    for peer in peers.values():
        if object_in(peer.receive()) != {"ready": True}:
            raise SandboxError("it did not start a program")
    if "whole" in peers:
        try:
            peers["whole"].send(line_of({"code": job["code"]}))
            return answer_in(object_in(peers["whole"].receive()))
        except ENDED:
            return failed("ended before its last line")
    tests, candidate = peers["tests"], peers["candidate"]
    try:
        candidate.send(line_of({"code": job["code"]}))
        loaded = object_in(candidate.receive())
    except ENDED:
        return failed("ended before its last line")
    if loaded != {"loaded": True}:
        return {**answer_in(loaded), "passed": False}
    try:
        tests.send(line_of({"tests": job["tests"], "entry_point": job["entry_point"]}))
        while "call" in (message := object_in(call := tests.receive())):
            try:
                candidate.send(call)
                reply = candidate.receive()
            except ENDED:
                return failed(f"{message['call']}: ended before it answered")
            tests.send(reply)
    except ENDED:
        return failed("the tests ended before they were through")
    return answer_in(message)


def grade(job: dict[str, Any]) -> dict[str, Any]:
    """Runs one job: the program alone where it has no tests, else the program and its tests."""
    roles = ["whole"] if job["tests"] is None else ["tests", "candidate"]
    limits = [str(job["memory_mb"] << 20), str(math.ceil(job["timeout_s"]) + 1)]
    late = threading.Event()
    with contextlib.ExitStack() as stack:
        peers: dict[str, Peer] = {}
        try:
            for role in roles:
                command = [*job["python"], "-c", INSIDE, role, *limits]
                sandbox = SANDBOXES[job["sandbox"]](job["options"], command)
                peers[role] = stack.enter_context(sandbox)
        except Exception as error:
            raise SandboxError(str(error)) from error

        def stop() -> None:
            late.set()
            for peer in peers.values():
                peer.kill()

        timer = threading.Timer(job["timeout_s"], stop)
        timer.start()
        stack.callback(timer.cancel)
        try:
            answer = converse(job, peers)
        except ENDED as error:
            if not late.is_set():
                raise SandboxError("it ended before the program began") from error
        if late.is_set():
            return failed(f"took longer than {job['timeout_s']:g} s")
        return answer


def main() -> None:
    """Answers jobs until there are no more."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # Nothing that a library prints is taken for an answer.
    for line in sys.stdin.buffer:
        try:
            answer = grade(json.loads(line))
        except SandboxError as error:
            answer = {"broken": str(error)}
        answers.write(line_of(answer))
        answers.flush()


if __name__ == "__main__":
    main()
