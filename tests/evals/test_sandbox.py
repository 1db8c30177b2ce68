"""The sandbox: what programs may do, how they are graded, and what is left behind: nothing."""

from __future__ import annotations

import http.server
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from ranktuner_jax.errors import RunError, UserError
from ranktuner_jax.evals.sandbox import (
    Program,
    Verdict,
    check_python,
    check_python_many,
    grade_python,
    programs,
    run_python,
)
from ranktuner_jax.evals.sandbox.grader import program_of

TIMEOUT_S = 20.0  # Far more than any of these takes, unless a test is about it.
# Marks the processes of this file: it is in their command lines.
MEMORY_MB = 128 + os.getpid() % 128


@pytest.fixture(scope="module", autouse=True)
def temporary(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pathlib.Path]:
    """The folder for temporary files of the workers that this file starts."""
    folder = tmp_path_factory.mktemp("temporary")
    programs._WORKERS.close()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(folder))
        patch.setenv("SECRET_TOKEN", "hunter2")
        yield folder
        programs._WORKERS.close()


# All of it in the second one, too, takes as long again.
@pytest.fixture(params=["sandlock", pytest.param("bubblewrap", marks=pytest.mark.drill)])
def sandbox(request: pytest.FixtureRequest) -> str:
    try:
        return programs.find_sandbox(request.param)
    except UserError as error:
        pytest.skip(str(error))


def run(code: str, sandbox: str, timeout_s: float = TIMEOUT_S) -> Verdict:
    return run_python(code, timeout_s=timeout_s, memory_mb=MEMORY_MB, sandbox=sandbox)


def check(
    code: str,
    tests: str,
    sandbox: str,
    entry_point: str | None = None,
    timeout_s: float = TIMEOUT_S,
) -> Verdict:
    return check_python(
        code, tests, entry_point, timeout_s=timeout_s, memory_mb=MEMORY_MB, sandbox=sandbox
    )


def left_processes() -> list[str]:
    """The programs of this file that still run."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if str(MEMORY_MB << 20).encode() in command:
            found.append(path.parent.name)
    return found


def eventually(condition: Any) -> bool:
    deadline = time.monotonic() + 10
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


# What programs can do.


def test_a_program_that_runs_to_its_end_passes(sandbox: str) -> None:
    assert run("assert sorted([3, 1, 2]) == [1, 2, 3]", sandbox).passed


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("assert 1 + 1 == 3", "AssertionError"),
        ("raise ValueError('no\\nway')", "ValueError: no way"),
        ("def f(:", "SyntaxError: invalid syntax (<__main__>, line 1)"),
        ("import sys; sys.exit(0)", "SystemExit: 0"),
        ("import os; os._exit(0)", "ended before its last line"),
        ("import numpy", "ModuleNotFoundError: No module named 'numpy'"),
        ("input()", "EOFError: EOF when reading a line"),
    ],
)
def test_a_program_that_ends_early_fails_with_the_reason(
    code: str, reason: str, sandbox: str
) -> None:
    assert run(code, sandbox) == Verdict(False, reason)


def test_a_program_sees_no_environment(sandbox: str) -> None:
    code = "import os; assert 'hunter2' not in str(os.environ), os.environ"
    assert run(code, sandbox) == Verdict(True, "ran to its end")


def test_a_program_may_print_a_lot(sandbox: str) -> None:
    assert run("for _ in range(200_000): print('x' * 100)", sandbox).passed


# How programs are graded.


@pytest.mark.parametrize(
    "value",
    [
        "None, True, 0, -1, 2**200, -0.5, 1e300, 1 + 2j",
        "'text', 'naïve 🙂', '\\ud800', '\\x00', b'\\x00\\xff', bytearray(b'a')",
        "[1, [2, (3,)], {}]",
        "{1: 'a', (2, 3): {4}, 'b': frozenset({5, 6})}, set(), ()",
        "float('inf'), -float('inf')",
    ],
)
def test_plain_data_crosses_unchanged_both_ways(value: str, sandbox: str) -> None:
    tests = f"""
def types(x):
    return [type(x), [types(y) for y in x] if type(x) in (list, tuple, dict) else 0]
value = [{value}]
assert same(value) == value
assert types(same(value)) == types(value)
assert there(value)
"""
    code = f"def same(x): return x\ndef there(x): return x == [{value}]"
    assert check(code, tests, sandbox) == Verdict(True, "passed its tests")


def test_not_a_number_and_the_sign_of_zero_cross(sandbox: str) -> None:
    tests = "assert math.isnan(f(math.nan)) and math.copysign(1, f(-0.0)) == -1"
    assert check("def f(x): return x", tests, sandbox).passed


def test_containers_of_the_library_cross_as_plain_ones(sandbox: str) -> None:
    code = """
import collections
def count(x): return collections.Counter(x)
def pair(x): return collections.namedtuple('Pair', 'a b')(x, x)
def lazily(x): yield from x
"""
    tests = """
assert count('aab') == {'a': 2, 'b': 1}
assert pair(1) == (1, 1)
assert list(lazily([1, 2])) == [1, 2] and lazily([1]) != [1]
"""
    assert check(code, tests, sandbox) == Verdict(True, "passed its tests")


def test_a_change_in_place_comes_back(sandbox: str) -> None:
    tests = "x = [3, 1, 2]\nassert order(x) is None\nassert x == [1, 2, 3]"
    assert check("def order(x): x.sort()", tests, sandbox).passed
    assert not check("def order(x): sorted(x)", tests, sandbox).passed


def test_exceptions_reach_the_tests(sandbox: str) -> None:
    tests = """
names = {1: 'ValueError', 2: 'KeyError', 3: 'CandidateError'}
for bad, kind in ((1, ValueError), (2, KeyError), (3, Exception)):
    try: f(bad)
    except kind as error: assert type(error).__name__ == names[bad]
    else: assert False
try: f(1)
except ValueError as error: assert str(error) == 'one'
"""
    code = """
class Mine(BaseException): pass
def f(x): raise {1: ValueError('one'), 2: KeyError(2), 3: Mine()}[x]
"""
    assert check(code, tests, sandbox) == Verdict(True, "passed its tests")


def test_of_other_results_only_the_truth_is_seen(sandbox: str) -> None:
    code = "import re\ndef f(x): return re.match('a', x)"
    assert check(code, "assert f('a') and not f('b')", sandbox).passed
    reason = "TypeError: Match is not plain data in: assert f('a') == 1"
    assert check(code, "assert f('a') == 1", sandbox) == Verdict(False, reason)


def test_a_candidate_keeps_its_state_between_calls(sandbox: str) -> None:
    code = "seen = []\ndef f(x): seen.append(x); return len(seen)"
    assert check(code, "assert [f(0), f(0), f(0)] == [1, 2, 3]", sandbox).passed


def test_check_is_called_with_the_entry_point_and_helpers_of_the_tests_win(sandbox: str) -> None:
    tests = """
def double(x):
    '''A helper that the candidate redefines.'''
    return 2 * x
def f(x):
    '''The stub.'''
def check(candidate):
    assert candidate(2) == double(3)
"""
    right = "def double(x): return 4\ndef f(x): return 3 * x"
    wrong = "def double(x): return 4\ndef f(x): return 2 * x"
    assert check(right, tests, sandbox, "f") == Verdict(True, "passed its tests")
    assert not check(wrong, tests, sandbox, "f").passed


def test_an_entry_point_may_shadow_a_builtin_and_nothing_else_may(sandbox: str) -> None:
    code = "def sum(a, b): return 6\ndef abs(x): return 6"
    assert check(code, "assert sum(10, 15) == 6", sandbox, "sum").passed
    assert not check(code, "assert abs(sum(10, 15)) - 1 == -abs(1)", sandbox, "sum").passed


def test_the_reason_names_the_assert_that_failed(sandbox: str) -> None:
    tests = "assert f(1) == 1\nassert f(2) == 4, 'wrong'\n"
    reason = "AssertionError: wrong in: assert f(2) == 4, 'wrong'"
    assert check("def f(x): return x", tests, sandbox) == Verdict(False, reason)


@pytest.mark.parametrize(
    ("tests", "message"),
    [
        ("assert f(", "expected tests in Python, got SyntaxError"),
        ("assert True", "expected tests that call the candidate, got none that does"),
        ("def check(candidate): assert candidate(1) == 1", "expected tests that call"),
        ("assert f(len) == 1", "expected arguments of plain data, got builtin_function_or_method"),
    ],
)
def test_tests_that_cannot_grade_are_refused(tests: str, message: str, sandbox: str) -> None:
    with pytest.raises(UserError, match=message):
        check("def f(x): return 1", tests, sandbox)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"timeout_s": 0}, "timeout_s: expected more than 0 seconds, got 0"),
        ({"timeout_s": float("nan")}, "timeout_s: expected more than 0 seconds, got nan"),
        ({"memory_mb": 10}, "memory_mb: expected at least 64, got 10"),
        ({"sandbox": "docker"}, "sandbox: expected one of auto, sandlock, bubblewrap, got 'dock"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run_python("pass", **arguments)


def test_nothing_runs_without_a_sandbox(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs._WORKERS.close()
    programs.find_sandbox.cache_clear()
    monkeypatch.setenv("PATH", str(tmp_path))
    try:
        with pytest.raises(UserError, match="expected one that can run untrusted programs, got no"):
            run_python(f"open({str(tmp_path / 'ran')!r}, 'w')", sandbox="bubblewrap")
    finally:
        programs._WORKERS.close()
        programs.find_sandbox.cache_clear()
    assert not (tmp_path / "ran").exists()


# What programs cannot do, with the reason that stops them; each takes the paths it needs.

FORBIDDEN = {
    "fork bomb": ("import os\nwhile True: os.fork()", "PermissionError"),
    "thread bomb": (
        "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=[9]).start()",
        "RuntimeError: can't start new thread",
    ),
    "daemon left behind": (
        "import os, time\nif os.fork() == 0:\n  os.setsid()\n  time.sleep(60)",
        "PermissionError",
    ),
    "another program": ("import subprocess\nsubprocess.run(['/bin/sh'])", "Error"),
    "exec": ("import os, sys\nos.execv(sys.executable, ['python'])", "Error"),
    "a list of 4 GB": ("x = [0] * (4 << 27)", "MemoryError"),
    "more memory after lifting the limit": (
        "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
        "Error",
    ),
    "memory in no process": ("import os\nos.memfd_create('x')", "PermissionError"),
    "a file of 10 GB": (
        "f = open('big', 'wb')\nfor _ in range(10_000): f.write(bytes(1 << 20))",
        "Error",
    ),
    "a file in the usual places": (
        "import os\nfor p in ('/tmp', '/var/tmp', '/dev/shm', '/run', '/', '.'):\n"
        "  try: open(f'{p}/outside', 'w')\n  except OSError: continue\n  break\n"
        "else: raise SystemError('nowhere')",
        "SystemError: nowhere",
    ),
    "unlimited open files": ("x = [open('/dev/null') for _ in range(1000)]", "OSError: [Errno 24]"),
    "reading the home folder": (
        # A sandbox may have a folder of that name, with the path to Python in it.
        "import os, sys\nif set(os.listdir(HOME)) <= set(sys.executable.split('/')): raise OSError",
        "Error",
    ),
    "reading a secret file": ("open(SECRET).read()", "Error"),
    "a link to a secret file": ("import os\nos.symlink(SECRET, 'x')\nopen('x').read()", "Error"),
    "writing outside": ("open(OUTSIDE, 'w').write('x')", "Error"),
    "a link out": ("import os\nos.symlink(FOLDER, 'x')\nopen('x/outside', 'w')", "Error"),
    "a hard link": ("import os\nos.link(SECRET, FOLDER + '/outside')", "Error"),
    "a folder outside": ("import os\nos.mkdir(OUTSIDE)", "Error"),
    "moving a file outside": ("import os\nos.rename(SECRET, OUTSIDE)", "Error"),
    "cutting a file outside": ("import os\nos.truncate(SECRET, 0)", "Error"),
    "removing a file outside": ("import os\nos.remove(SECRET)", "Error"),
    "changing modes outside": ("import os\nos.chmod(SECRET, 0o777)", "Error"),
    "changing owners outside": ("import os\nos.chown(SECRET, 1, 1)", "Error"),
    "changing times outside": ("import os\nos.utime(SECRET, (1, 1))", "Error"),
    "changing attributes outside": ("import os\nos.setxattr(SECRET, 'user.x', b'1')", "Error"),
    "changing modes of Python": ("import os\nos.chmod(os.__file__, 0o777)", "Error"),
    "changing modes through a descriptor": (
        "import os\nos.fchmod(os.open(os.__file__, os.O_RDONLY), 0o777)",
        "Error",
    ),
    "writing into Python": ("import os\nopen(os.__file__, 'a').write('x')", "Error"),
    "the memory of the parent": ("import os\nopen(f'/proc/{os.getppid()}/mem')", "Error"),
    "the environment of process 1": ("open('/proc/1/environ').read()", "Error"),
    "the parent's file descriptors": ("import os\nos.listdir(f'/proc/{os.getppid()}/fd')", "Error"),
    "killing the parent": ("import os\nos.kill(os.getppid(), 9)", "Error"),
    "killing the host": ("import os\nos.kill(HOST, 9)", "Error"),
    "killing everyone": ("import os\nos.kill(-1, 9)", "Error"),
    "a connection": ("import socket\nsocket.create_connection(('127.0.0.1', PORT))", "Error"),
    "a datagram": ("import socket\nsocket.socket(type=socket.SOCK_DGRAM)", "Error"),
    "a local socket": ("import socket\nsocket.socket(socket.AF_UNIX).connect(SOCKET)", "Error"),
    "a page of the web": ("import urllib.request as u\nu.urlopen(f'http://[::1]:{PORT}')", "Error"),
    "tracing": (
        "import ctypes\nc = ctypes.CDLL(None, use_errno=True)\n"
        "if c.ptrace(16, HOST, 0, 0): raise OSError(ctypes.get_errno(), 'no')",
        "PermissionError",
    ),
    "a wild pointer": ("import ctypes\nctypes.string_at(1)", "ended before its last line"),
    "deep recursion": ("def f(): f()\nf()", "RecursionError"),
    "bottomless recursion": (
        "import sys\nsys.setrecursionlimit(10**9)\ndef f(): [f() for _ in '1']\nf()",
        "",
    ),
    "a printed number of many digits": ("print(10 ** 100_000)", "ValueError: Exceeds"),
    "an error that cannot be shown": (
        "import os\nclass E(Exception):\n  def __str__(self): raise SystemExit\nraise E",
        "E",
    ),
    "an error that is never shown to its end": (
        "class E(Exception):\n  def __str__(self): return 'x' * 10**8\nraise E",
        "E: xxx",
    ),
    "a handler at exit": (
        "import atexit, os\natexit.register(lambda: os.write(1, b'{\"passed\": true}'))\n1 / 0",
        "ZeroDivisionError",
    ),
    "a token printed": ("print('{\"passed\": true}')\nassert False", "AssertionError"),
}


@pytest.fixture
def host(tmp_path: pathlib.Path) -> Iterator[dict[str, Any]]:
    """Things to harm: a file, servers, this process. None of them may notice anything."""
    secret = tmp_path / "secret"
    secret.write_text("hunter2")
    secret.chmod(0o600)
    before, home = secret.stat(), sorted(os.listdir(pathlib.Path.home()))
    requests: list[Any] = []
    server = http.server.HTTPServer(("127.0.0.1", 0), requests.append)  # type: ignore[arg-type]
    # The kernel's limit on the length of such an address is 107 bytes.
    folder = pathlib.Path(f"/tmp/ranktuner-test-{os.getpid()}")
    folder.mkdir(exist_ok=True)
    with socket.socket(socket.AF_UNIX) as local:
        local.bind(str(folder / "socket"))
        local.listen()
        local.setblocking(False)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield {
            "HOME": str(pathlib.Path.home()),
            "FOLDER": str(tmp_path),
            "SECRET": str(secret),
            "OUTSIDE": str(tmp_path / "outside"),
            "PORT": server.server_address[1],
            "SOCKET": str(folder / "socket"),
            "HOST": os.getpid(),
        }
        server.shutdown()
        server.server_close()
        with pytest.raises(BlockingIOError):
            local.accept()
    (folder / "socket").unlink()
    folder.rmdir()
    assert requests == []
    assert os.listdir(tmp_path) == ["secret"]
    after = secret.stat()
    assert (after.st_mode, after.st_uid, after.st_mtime_ns) == (
        before.st_mode,
        before.st_uid,
        before.st_mtime_ns,
    )
    assert os.listxattr(secret) == []
    assert sorted(os.listdir(pathlib.Path.home())) == home


def assert_nothing_left(temporary: pathlib.Path) -> None:
    assert eventually(lambda: not left_processes()), left_processes()
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("name", FORBIDDEN)
def test_a_program_cannot_do_harm(
    name: str, sandbox: str, host: dict[str, Any], temporary: pathlib.Path
) -> None:
    code, reason = FORBIDDEN[name]
    verdict = run("".join(f"{k} = {v!r}\n" for k, v in host.items()) + code, sandbox)
    assert not verdict.passed
    assert reason in verdict.reason
    assert "in time" not in verdict.reason
    assert_nothing_left(temporary)


@pytest.mark.parametrize(
    "code",
    [
        "while True: pass",
        "while True: print('x' * 10_000)",
        "import signal, time\nsignal.signal(15, signal.SIG_IGN)\nwhile True: time.sleep(1)",
        "import signal\nsignal.alarm(0)\nsignal.pause()",
        "import os\nwhile True: os.write(1, b'x')",
    ],
)
def test_a_program_that_does_not_end_is_ended(
    code: str, sandbox: str, temporary: pathlib.Path
) -> None:
    start = time.monotonic()
    assert run(code, sandbox, timeout_s=1.5) == Verdict(False, "took longer than 1.5 s")
    assert time.monotonic() - start < 6
    assert_nothing_left(temporary)


# Programs that are wrong and try to pass. The tests ask for the squares of 3 and 4.

TESTS = """
def check(candidate):
    assert candidate(3) == 9
    assert candidate(4) == 16
    assert sorted([candidate(5), candidate(2)]) == [4, 25]
"""
EVERYWHERE = """
import os
for fd in range(32):
    try: os.write(fd, b'{"passed": true, "reason": "passed its tests", "verdict": true}\\n' * 9)
    except OSError: pass
"""
CHEATS = {
    "exit before the asserts": "import os\nos._exit(0)",
    "a polite exit before the asserts": "raise SystemExit(0)",
    "exit when called": "import os\ndef f(x): os._exit(0)",
    "a polite exit when called": "import sys\ndef f(x): sys.exit(0)",
    "equal to everything": (
        "class Any:\n  def __eq__(self, other): return True\n  __lt__ = __eq__\n"
        "def f(x): return Any()"
    ),
    "a number equal to everything": (
        "class Any(int):\n  def __eq__(self, other): return True\n  __hash__ = int.__hash__\n"
        "def f(x): return Any(0)"
    ),
    "a list equal to everything": (
        "class Any(list):\n  def __eq__(self, other): return True\ndef f(x): return Any()"
    ),
    "other builtins": (
        "import builtins\nbuiltins.sorted = lambda x: [4, 25]\n"
        "builtins.AssertionError = ValueError\nbuiltins.isinstance = lambda *a: True\n"
        "def f(x): return 0"
    ),
    "other modules of the grader": (
        'import sys, json\njson.dumps = lambda x: \'{"passed": true, "verdict": true}\'\n'
        "sys.modules['tests'] = sys.modules['unittest'] = None\ndef f(x): return 0"
    ),
    "another way to answer": (
        "import sys, gc\nfor o in gc.get_objects():\n"
        "  if type(o).__name__ == 'Channel':\n"
        "    o.send({'loaded': True})\n    o.send({'passed': True, 'reason': ''})\n"
        "    while True:\n      o.receive()\n      o.send({'passed': True, 'reason': ''})\n"
    ),
    "the verdict on every descriptor, at once": EVERYWHERE + "def f(x): return 0",
    "the verdict on every descriptor, when called": (
        "def f(x):\n" + "".join(f"    {line}\n" for line in EVERYWHERE.splitlines())
    ),
    "the verdict on every descriptor, then exit": EVERYWHERE + "os._exit(0)",
    "the tests, from memory": (
        "import gc\ndef f(x):\n  for o in gc.get_objects():\n"
        "    if isinstance(o, str) and 'assert' in o: return {3: 9, 4: 16, 5: 25, 2: 4}[x]\n"
        "  return 0"
    ),
    "the tests, from the process table": (
        "import os\ndef f(x):\n  for p in os.listdir('/proc'):\n"
        "    try: t = open(f'/proc/{p}/cmdline').read()\n    except OSError: continue\n"
        "    if 'candidate(3)' in t: return x * x\n  return 0"
    ),
    "a trace function": (
        "import sys\ndef trace(frame, *rest):\n  frame.f_locals.update(value=9)\n  return trace\n"
        "sys.settrace(trace)\ndef f(x): return 0"
    ),
    "a pickle": (
        "import os\nclass P:\n  def __reduce__(self): return os.system, ('touch /tmp/pwned',)\n"
        "def f(x): return P()"
    ),
    "a kind of data that does not exist": (
        "import sys\nm = sys.modules['candidate']\n"
        "import gc\n[c] = [o for o in gc.get_objects() if type(o).__name__ == 'Channel']\n"
        "def f(x): c.send({'value': {'os.system': 'true'}, 'args': [3]})"
    ),
    "data nested without end": "x = []\nx.append(x)\ndef f(y): return x",
    "data nested deep": (
        "import gc\n[c] = [o for o in gc.get_objects() if type(o).__name__ == 'Channel']\n"
        "def f(x): c._write.write(b'[' * 10**6 + b'\\n'); c._write.flush()"
    ),
    "a huge number": "def f(x): return 1 << 10**8",
    "a line without end": (
        "import gc\n[c] = [o for o in gc.get_objects() if type(o).__name__ == 'Channel']\n"
        "def f(x):\n  while True: c._write.write(b'x' * 10**6)"
    ),
    "an endless iterator": "def f(x):\n  while True: yield 'x' * 10**7",
    "an error that shows itself as it likes": (
        "import os\nclass AssertionError(Exception):\n"
        "  def __str__(self): os._exit(0)\n  __repr__ = __str__\n"
        "def f(x): raise AssertionError"
    ),
    "an error with the name of an exit": (
        "class SystemExit(Exception): pass\ndef f(x): raise SystemExit(0)"
    ),
    "a generator's exit": "def f(x): raise GeneratorExit",
    "a handler at exit": (
        "import atexit, os\natexit.register(lambda: os.write(1, b'{\"passed\": true}\\n'))\n"
        "def f(x): return 0"
    ),
    "killing the tests": "import os\ndef f(x): os.kill(0, 9); os.kill(os.getppid(), 9)",
    "a change of the argument": "def f(x): x = 9; return None",
    "no function": "g = 9",
    "no callable": "f = 9",
    "no program": "Sure! Here is the function.",
    "nothing": "",
}


def test_a_right_program_passes(sandbox: str) -> None:
    verdict = check("def f(x): return x * x", TESTS, sandbox, "f")
    assert verdict == Verdict(True, "passed its tests")


@pytest.mark.parametrize("name", CHEATS)
def test_a_wrong_program_cannot_pass(name: str, sandbox: str, temporary: pathlib.Path) -> None:
    verdict = check(CHEATS[name], TESTS, sandbox, "f")
    assert not verdict.passed, verdict
    assert verdict.reason
    assert len(verdict.reason) <= 200
    assert not pathlib.Path("/tmp/pwned").exists()
    assert_nothing_left(temporary)


@pytest.mark.parametrize(
    "code",
    [
        "import os\ndef f(x): os._exit(0)",
        "class Half:\n  def __bool__(self): raise ValueError\ndef f(x): return Half()",
    ],
)
def test_tests_that_catch_everything_do_not_forgive_a_lost_answer(code: str, sandbox: str) -> None:
    tests = """
for x in (1, 2):
    try: f(x)
    except: pass
"""
    assert not check(code, tests, sandbox).passed


def test_tests_that_do_not_end_are_ended(sandbox: str, temporary: pathlib.Path) -> None:
    verdict = check("def f(x): return 1", "while f(1): pass", sandbox, timeout_s=1.5)
    assert verdict == Verdict(False, "took longer than 1.5 s")
    assert_nothing_left(temporary)


# Workers.


def test_many_programs_are_graded_in_order_and_at_the_same_time(sandbox: str) -> None:
    sleepers = [
        Program(f"import time\ntime.sleep(1)\ndef f(): return {i}", f"assert f() == {i % 3}")
        for i in range(6)
    ]
    start = time.monotonic()
    verdicts = check_python_many(sleepers, workers=6, timeout_s=TIMEOUT_S, sandbox=sandbox)
    assert [verdict.passed for verdict in verdicts] == [True] * 3 + [False] * 3
    assert time.monotonic() - start < 5


def worker_ids() -> list[int]:
    return [worker._process.pid for worker in programs._WORKERS._idle]


def test_a_worker_serves_one_program_after_another(sandbox: str) -> None:
    run("pass", sandbox)
    before = worker_ids()
    run("import os; os._exit(1)", sandbox)
    assert worker_ids() == before


def test_a_worker_that_is_killed_takes_its_program_along(sandbox: str) -> None:
    run("pass", sandbox)
    worker = worker_ids()[-1]
    errors: list[BaseException] = []

    def wait_for_the_end() -> None:
        try:
            run("import time\ntime.sleep(60)", sandbox, timeout_s=60)
        except RunError as error:
            errors.append(error)

    thread = threading.Thread(target=wait_for_the_end)
    thread.start()
    assert eventually(left_processes)
    os.kill(worker, signal.SIGKILL)
    thread.join(10)
    [error] = errors
    assert "could not run a program (its worker ended); try again" in str(error)
    assert eventually(lambda: not left_processes())
    assert run("pass", sandbox).passed


def test_nothing_outlives_the_process_that_asked(sandbox: str) -> None:
    if sandbox != programs.find_sandbox():
        pytest.skip("the same for each sandbox")
    script = """
from ranktuner_jax.evals.sandbox import programs, run_python
assert run_python("pass").passed
print(*[worker._process.pid for worker in programs._WORKERS._idle])
"""
    command = [sys.executable, "-c", script]
    root = pathlib.Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    [worker] = map(int, done.stdout.split())
    assert eventually(lambda: not pathlib.Path(f"/proc/{worker}").exists())


# Completions.

HUMANEVAL = {
    "prompt": 'from typing import List\n\ndef f(x: List[int]) -> int:\n    """The sum."""\n',
    "test": "def check(candidate):\n    assert candidate([1, 2]) == 3",
    "entry_point": "f",
}
MBPP = {
    "prompt": "Write a function to add up.",
    "code": "def g(x):\n    return x\ndef f(x):\n    return sum(g(x))",
    "test_imports": ["import math"],
    "test_list": ["assert math.isclose(f([1, 2]), 3)"],
}
WHOLE = "def f(x: list) -> int:\n    return sum(x)\n"


@pytest.mark.parametrize(
    ("completion", "reference"),
    [
        ("    return sum(x)\n", HUMANEVAL),
        ("    return sum(x)\n\nprint(f(1))\n# and so on, in prose", HUMANEVAL),
        ("    return sum(x)\n```\nThat is it.", HUMANEVAL),
        (f"```python\n{WHOLE}```", HUMANEVAL),
        (f"Use this:\n```python\n{WHOLE}```\nand then\n```python\nf(1)\n```", HUMANEVAL),
        (f"```bash\nls\n```\n```python\nf(1)\n```\n```python\n{WHOLE}```", HUMANEVAL),
        (f"```python\n{WHOLE}", HUMANEVAL),
        ("```python\n    return sum(x)\n```", HUMANEVAL),
        ("```\ndef f(x: List[int]):\n    return sum(x)\n```", HUMANEVAL),
        (f"```py\n{WHOLE}```", MBPP),
        (WHOLE, MBPP),
        (f"```python\n{WHOLE}```", json.dumps(MBPP)),
        (f"```python\n{WHOLE}```", json.dumps(HUMANEVAL)),
        (WHOLE, "assert f([1, 2]) == 3"),
    ],
)
def test_a_right_completion_is_right(completion: str, reference: Any) -> None:
    program = program_of(completion, reference)
    names: dict[str, Any] = {}
    exec(program.code, names)  # Written above: no stranger's.
    assert names["f"]([1, 2]) == 3
    assert program.entry_point == (None if reference == "assert f([1, 2]) == 3" else "f")


@pytest.mark.parametrize("reference", [HUMANEVAL, MBPP, "assert f([1, 2]) == 3"])
def test_completions_are_graded(reference: Any, sandbox: str) -> None:
    del sandbox  # Whichever works here.
    assert grade_python(f"```python\n{WHOLE}```", reference)
    assert not grade_python("```python\ndef f(x): return 4\n```", reference)
    assert not grade_python("I do not know.", reference)
    assert not grade_python("", reference)


@pytest.mark.parametrize("reference", ["", 3, None, {"test_list": []}, {"test": "assert f(1)"}])
def test_a_reference_without_tests_is_refused(reference: Any) -> None:
    with pytest.raises(ValueError, match="reference: expected tests in Python or a row with test"):
        grade_python("pass", reference)
