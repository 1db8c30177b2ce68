"""What runs inside a sandbox: one program, or the tests of one that runs in another sandbox.

The worker passes this file to a bare interpreter as text, so it imports the standard library
alone. Processes speak in lines of JSON; values cross as plain data and nothing is unpickled.
"""

import builtins
import contextlib
import ctypes
import errno
import json
import os
import resource
import struct
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

OPEN_FILES = 32
LINE_BYTES = 16 << 20  # The longest message.
TEXT = 200  # Characters of an error that are kept.

PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SECCOMP_MODE_FILTER = 1, 22, 38, 2

# System calls that no program to be graded needs, by machine. The two sandboxes refuse many of
# them too, each its own set. Landlock does not see changes of a file's mode, owner or times.
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
DENIED = {
    "x86_64": [
        *(56, 57, 58, 59, 322, 435, 109, 112, 157, 272, 308),  # clone fork vfork exec prctl unshare
        *(62, 200, 234, 129, 297, 424, 434, 438, 101, 310, 311),  # kill pidfd ptrace process_vm
        *(41, 53, 42, 425),  # socket socketpair connect io_uring
        *(319, 447, 29, 64, 68, 240),  # memfd shmget semget msgget mq_open
        *(323, 321, 298, 248, 249, 250, 165),  # userfaultfd bpf perf_event keys mount
        *(90, 91, 268, 452, 92, 93, 94, 260, 132, 235, 261, 280),  # chmod chown utime
        *(188, 189, 190, 197, 198, 199, 463, 466),  # setxattr removexattr
        *(86, 265, 88, 266, 16, 253, 294, 254, 300),  # link symlink ioctl inotify fanotify
    ],
    "aarch64": [
        *(220, 221, 281, 435, 154, 157, 167, 97, 268),
        *(129, 130, 131, 138, 240, 424, 434, 438, 117, 270, 271),
        *(198, 199, 203, 425),
        *(279, 447, 194, 190, 186, 180),
        *(282, 280, 241, 217, 218, 219, 40),
        *(52, 53, 452, 54, 55, 88),
        *(5, 6, 7, 14, 15, 16, 463, 466),
        *(37, 36, 29, 26, 27, 262),
    ],
}


class CandidateError(Exception):
    """What the candidate raised, where it is no built-in exception."""


class BadTests(BaseException):
    """The tests ask for what cannot be done."""


class CandidateGone(BaseException):
    """The candidate no longer answers, or not in plain data."""


def harden(memory_bytes: int, cpu_seconds: int) -> None:
    """Limits this process for good: memory, files, no child, no thread, no socket."""
    libc = ctypes.CDLL(None, use_errno=True)

    def call(name: str, *args: Any) -> None:
        if getattr(libc, name)(*args) != 0:
            code = ctypes.get_errno()
            raise OSError(code, f"{name}: {os.strerror(code)}")

    for limit, most in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_CPU, cpu_seconds),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, OPEN_FILES),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (most, most))
    # No capability remains, so that root cannot lift the limits.
    call("capset", struct.pack("Ii", 0x20080522, 0), bytes(24))
    call("prctl", PR_SET_PDEATHSIG, *map(ctypes.c_ulong, (9, 0, 0, 0)))  # Dies with the worker.
    call("prctl", PR_SET_NO_NEW_PRIVS, *map(ctypes.c_ulong, (1, 0, 0, 0)))
    code = filter_program()
    buffer = ctypes.create_string_buffer(code)
    program = struct.pack("HP", len(code) // 8, ctypes.addressof(buffer))
    call("prctl", PR_SET_SECCOMP, ctypes.c_ulong(SECCOMP_MODE_FILTER), program)


def filter_program() -> bytes:
    """The seccomp filter: 8-byte instructions of classic BPF that refuse `DENIED` with EPERM."""
    machine = os.uname().machine
    numbers = DENIED[machine]
    load, equal, at_least, answer = 0x20, 0x15, 0x35, 0x06
    kill, allow, refuse = 0x80000000, 0x7FFF0000, 0x00050000 | errno.EPERM
    code = [
        (load, 0, 0, 4),  # The calling convention, which gives the numbers their meaning.
        (equal, 1, 0, AUDIT_ARCH[machine]),
        (answer, 0, 0, kill),
        (load, 0, 0, 0),  # The number.
        (at_least, len(numbers) + 1, 0, 0x40000000),  # x32: other names for the same calls.
        *((equal, len(numbers) - i, 0, number) for i, number in enumerate(numbers)),
        (answer, 0, 0, allow),
        (answer, 0, 0, refuse),
    ]
    return b"".join(struct.pack("HBBI", *instruction) for instruction in code)


class Channel:
    """Messages to and from the worker, off the standard streams."""

    def __init__(self) -> None:
        """Takes the standard streams and leaves /dev/null in their place."""
        self._read, self._write = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
        null = os.open(os.devnull, os.O_RDWR)
        for stream in range(3):
            os.dup2(null, stream)
        os.close(null)

    def send(self, message: dict[str, Any]) -> None:
        """Sends one line."""
        self._write.write(json.dumps(message).encode() + b"\n")
        self._write.flush()

    def receive(self) -> dict[str, Any]:
        """The next line; raises EOFError where there is none."""
        line = self._read.readline(LINE_BYTES)
        if not line.endswith(b"\n"):
            raise EOFError("the other side ended")
        message = json.loads(line)
        if not isinstance(message, dict):
            raise ValueError("expected an object")
        return message


def refuse(value: Any) -> Any:
    """Raises TypeError: `value` is not plain data."""
    raise TypeError(f"{type(value).__name__} is not plain data")


def opaque(value: Any) -> Any:
    """Of what is not plain data: its type's name, and whether it counts as true."""
    return {"Opaque": [type(value).__name__, bool(value)]}


def encode(value: Any, other: Callable[[Any], Any] = refuse) -> Any:
    """Plain data as JSON; a subclass crosses as its base, a Counter as a dict.

    What is not plain data becomes what `other` makes of it.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        number = int(value)
        return number if abs(number) < 1 << 53 else {"int": hex(number)}
    if isinstance(value, float):
        return float(value)  # JSON as Python writes it: exact, with NaN and Infinity.
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, list):
        return [encode(item, other) for item in value]
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, bytes | bytearray):
        return {"bytearray" if isinstance(value, bytearray) else "bytes": value.hex()}
    if isinstance(value, dict):
        return {"dict": [[encode(k, other), encode(v, other)] for k, v in value.items()]}
    for kind in (tuple, set, frozenset, Iterator):
        if isinstance(value, kind):
            return {kind.__name__: [encode(item, other) for item in value]}
    return other(value)


class Opaque:
    """A result that is not plain data, such as a match: tests may ask if it is true, no more."""

    def __init__(self, name: str, truth: bool) -> None:
        """Holds what the candidate says of it."""
        self._name, self._truth = name[:TEXT], truth is True

    def __bool__(self) -> bool:
        """Whether it counts as true."""
        return self._truth

    def __eq__(self, other: object) -> bool:
        """Refuses to be compared."""
        raise TypeError(f"{self._name} is not plain data")

    __hash__ = None  # type: ignore[assignment]


DECODERS: dict[str, Callable[[Any], Any]] = {
    "int": lambda digits: int(digits, 16),
    "complex": lambda parts: complex(*parts),
    "bytes": bytes.fromhex,
    "bytearray": bytearray.fromhex,
    "dict": lambda items: {decode(key): decode(item) for key, item in items},
    "tuple": lambda items: tuple(map(decode, items)),
    "set": lambda items: set(map(decode, items)),
    "frozenset": lambda items: frozenset(map(decode, items)),
    "Opaque": lambda parts: Opaque(*parts),
    "Iterator": lambda items: iter([decode(item) for item in items]),
}


def decode(data: Any) -> Any:
    """The value that `encode` turned into JSON, of exactly the built-in types."""
    if isinstance(data, list):
        return [decode(item) for item in data]
    if isinstance(data, dict):
        [(kind, content)] = data.items()
        return DECODERS[kind](content)
    return data


def message_of(error: BaseException) -> str:
    """The text of an error, whatever its own `__str__` does."""
    try:
        return str(error)[:TEXT]
    except BaseException:
        return ""


def describe(error: BaseException) -> str:
    """An error in one line."""
    name, text = type(error).__name__, " ".join(message_of(error).split())
    return (f"{name}: {text}" if text else name)[:TEXT]


def execute(code: Any, name: str, **names: Any) -> types.ModuleType:
    """Runs a program as the module `name`."""
    module = sys.modules[name] = types.ModuleType(name)
    vars(module).update(names)
    if isinstance(code, str):
        code = compile(code, f"<{name}>", "exec")
    exec(code, vars(module))
    return module


def run_whole(job: dict[str, Any], channel: Channel) -> None:
    """Runs a program to its end; an exit, even with code 0, is not its end."""
    try:
        execute(job["code"], "__main__")
    except BaseException as error:
        channel.send({"passed": False, "reason": describe(error)})
    else:
        channel.send({"passed": True, "reason": "ran to its end"})


def serve(job: dict[str, Any], channel: Channel) -> None:
    """Loads the candidate, then calls its functions as it is told."""
    try:
        module = execute(job["code"], "candidate")
    except BaseException as error:
        channel.send({"passed": False, "reason": describe(error)})
        return
    channel.send({"loaded": True})
    while True:
        request = channel.receive()
        args, kwargs = decode(request["args"]), decode(request["kwargs"])
        try:
            value = getattr(module, request["call"])(*args, **kwargs)
        except BaseException as error:
            channel.send({"raised": type(error).__name__, "text": message_of(error)})
            continue
        try:
            channel.send({"value": encode(value, opaque), "args": encode(args, opaque)})
        except BaseException as error:
            channel.send({"refused": describe(error)})


class Proxy:
    """Stands in the tests for a function of the candidate."""

    def __init__(self, name: str, channel: Channel, state: dict[str, Any]) -> None:
        """Calls `name` over `channel`; `state` counts the calls and keeps what broke."""
        self.__name__, self._channel, self._state = name, channel, state

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The candidate's answer, or the exception that it raised."""
        self._state["calls"] += 1
        try:
            request = {"call": self.__name__, "args": encode(list(args)), "kwargs": encode(kwargs)}
        except TypeError as error:
            raise BadTests(f"expected arguments of plain data, got {error}") from None
        self._channel.send(request)
        value: Any = None
        failure: Exception | None = None
        try:
            reply = self._channel.receive()
            if "refused" in reply:
                raise ValueError(f"its result could not be read: {reply['refused']}")
            if "raised" in reply:
                failure = exception_of(str(reply["raised"]), str(reply["text"])[:TEXT])
            else:
                value = decode(reply["value"])
                for mine, theirs in zip(args, decode(reply["args"]), strict=True):
                    write_back(mine, theirs)
        except BaseException as broken:
            # Kept, so that a bare `except` in the tests cannot make it good.
            self._state["gone"] = self._state["gone"] or f"{self.__name__}: {describe(broken)}"
            raise CandidateGone from None
        if failure is not None:
            raise failure
        return value


def exception_of(name: str, text: str) -> Exception:
    """The built-in exception of that name, or else a CandidateError."""
    kind = getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, Exception):
        with contextlib.suppress(TypeError):  # UnicodeDecodeError takes more than a text.
            return kind(text)
    return CandidateError(text)


def write_back(mine: Any, theirs: Any) -> None:
    """Makes an argument what the candidate has made of its copy, as a call in place would."""
    if isinstance(mine, list | bytearray):
        mine[:] = theirs
    elif isinstance(mine, dict | set):
        mine.clear()
        mine.update(theirs)


def names_to_call(tree: Any, entry_point: str | None) -> tuple[set[str], set[str]]:
    """The names that the tests use and do not define: of the candidate, and of modules."""
    import ast

    loaded: set[str] = set()
    bound = set(dir(builtins))
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            (loaded if isinstance(node.ctx, ast.Load) else bound).add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            bound.add(node.name)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.alias):
            bound.add((node.asname or node.name).split(".")[0])
        elif isinstance(node, ast.ExceptHandler) and node.name:
            bound.add(node.name)
    free = loaded - bound
    modules = free & set(sys.stdlib_module_names)
    return (free - modules) | ({entry_point} if entry_point else set()), modules - {entry_point}


def check(job: dict[str, Any], channel: Channel) -> None:
    """Runs the tests, in which the functions of the candidate are proxies."""
    import ast
    import traceback

    entry_point = job["entry_point"]
    try:
        tree = ast.parse(job["tests"], "<tests>")
        # A stub, where the tests start with the text that the candidate completes.
        tree.body = [
            node
            for node in tree.body
            if not (isinstance(node, ast.FunctionDef) and node.name == entry_point)
        ]
        names, modules = names_to_call(tree, entry_point)
        program = compile(tree, "<tests>", "exec")
    except (SyntaxError, ValueError, RecursionError) as error:
        channel.send({"mistake": f"expected tests in Python, got {describe(error)}"})
        return
    state: dict[str, Any] = {"calls": 0, "gone": ""}
    proxies = {name: Proxy(name, channel, state) for name in names}
    failure = ""
    try:
        module = execute(program, "tests", **{m: __import__(m) for m in modules}, **proxies)
        if entry_point and isinstance(getattr(module, "check", None), types.FunctionType):
            module.check(proxies[entry_point])
    except BadTests as error:
        channel.send({"mistake": str(error)})
        return
    except BaseException as error:
        lines = job["tests"].splitlines()
        at = [
            f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == "<tests>"
        ]
        where = f" in: {lines[at[-1] - 1].strip()}" if at and at[-1] else ""
        failure = (describe(error) + where)[:TEXT]
    failure = state["gone"] or failure
    if failure or state["calls"]:
        channel.send({"passed": not failure, "reason": failure or "passed its tests"})
    else:
        channel.send({"mistake": "expected tests that call the candidate, got none that does"})


def main() -> None:
    """Limits itself, says so, and does the job that the first line describes."""
    role, memory_bytes, cpu_seconds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    channel = Channel()
    harden(memory_bytes, cpu_seconds)
    channel.send({"ready": True})
    {"whole": run_whole, "candidate": serve, "tests": check}[role](channel.receive(), channel)
    os._exit(0)  # No exit handlers: the answer is given.


if __name__ == "__main__":
    main()
