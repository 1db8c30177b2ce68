"""Which mathematical answers are equal, and what an answer may cost."""

import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies

from ranktuner_jax.errors import RunError, UserError
from ranktuner_jax.evals import GRADERS, MathGrader

WORKER = pathlib.Path(__file__).parents[2] / "ranktuner_jax/evals/graders/math_worker.py"

needs_proc = pytest.mark.skipif(
    not pathlib.Path("/proc/self/status").exists(), reason="processes are looked up in /proc"
)

# (reference, what a box holds): the same answer in another form.
EQUAL = [
    (r"\frac{1}{2}", r"\dfrac{1}{2}"),
    (r"\frac12", "0.5"),
    (r"\frac{1}{2}", "1/2"),
    (r"\frac{14}{3}", r"4\frac{2}{3}"),
    (r"\frac{1}{3}", "0.333333"),
    (r"-\frac{1}{2}", r"\frac{-1}{2}"),
    (".35625", "0.35625"),
    ("27.0", "27"),
    ("033", "33"),
    ("1.25", r"\frac54"),
    (r"58,500", "58500"),
    (r"10,\!080", "10080"),
    (r"11,\! 111,\! 111,\! 100", "11111111100"),
    ("1200", "1{,}200"),
    ("1200", r"1\,200"),
    ("1200", "1 200"),
    (r"\$32,\!348", "32348"),
    (r"\$18.90", "18.9"),
    ("36", r"\$36"),
    ("4.5e33", r"4.5 \times 10^{33}"),
    ("2.55e-10", r"2.55 \cdot 10^{-10}"),
    ("-1./3", r"-\frac{1}{3}"),
    ("5", "5."),
    (r"8 \%", "8"),
    (r"8 \%", "0.08"),
    ("62.5%", r"62.5\%"),
    ("62.5%", r"\frac58"),
    ("10", r"10 \text{ percent}"),
    (r"90^\circ", "90"),
    (r"45^{\circ}", r"45 \text{ degrees}"),
    (r"\frac{270}7\text{ degrees}", r"\frac{270}{7}"),
    (r"864 \mbox{ inches}^2", "864"),
    (r"5.4 \text{ cents}", "5.4"),
    ("1.6", r"1.6 \mathrm{~cm}"),
    ("12", "12 km"),
    ("7", r"7 \text{ hours}"),
    ("300", r"300 \mathrm{~km} / \mathrm{s}"),
    (r"3\sqrt{13}", r"\sqrt{117}"),
    (r"11\sqrt2", r"11\sqrt{2}"),
    (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt{3}}"),
    (r"\frac{8}{\sqrt[3]{7}}", r"\frac{8 \cdot 49^{1/3}}{7}"),
    (r"288 \pi", r"288\pi"),
    (r"\frac{20000}{\pi}", r"20000/\pi"),
    (r"6 - 5i", "-5i + 6"),
    ("2^{1009}", r"2 \cdot 2^{1008}"),
    (r"\frac{100!}{2^{50}}", r"100! \cdot 2^{-50}"),
    (r"2,-\log _{10} 250", r"-\log_{10} 250, 2"),
    ("x=5", "5"),
    ("5", "x = 5"),
    ("k=1", "1"),
    (r"f(x)=2 x", "2x"),
    ("y = 2x + 3", "y = 3 + 2x"),
    ("y = 2x + 3", "2x - y + 3 = 0"),
    ("3", "1 + 2 = 3"),
    ("(a+5)(b+2)", "ab + 2a + 5b + 10"),
    ("x^3+3x-6", "-6 + 3x + x^3"),
    (r"\frac{n(n+1)}{2}", r"\frac{n^2+n}{2}"),
    (r"\cos^2 x", r"1 - \sin^2 x"),
    ("1,-2", "-2, 1"),
    (r"$69$,$84$", "84, 69"),
    (r"$500$,$250$", "250, 500"),
    ("$221,$8$", "8, 221"),
    ("1,3,5", r"\{5, 3, 1\}"),
    ("1,3", r"1 \text{ and } 3"),
    ("-1,2", "x = -1 \\text{ or } x = 2"),
    (r"1 \pm \sqrt{19}", r"1+\sqrt{19}, 1-\sqrt{19}"),
    (r"\{1\pm\sqrt{5},-2\}", r"\{-2, 1-\sqrt5, 1+\sqrt5\}"),
    (r"$a=2$, $a=-6-4 \sqrt{2}$", r"-6-4\sqrt{2}, 2"),
    ("1.68,0.45", "0.45, 1.68"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3, \pi/2)"),
    ("(2,4)", r"\left(2, \frac{8}{2}\right)"),
    ("(6,31,-1)", "6, 31, -1"),
    ("(1,1), (3,2)", "(3,2),(1,1)"),
    (r"(3,4]", r"\left(3,4\right]"),
    (r"\left(\frac{3}{5},\frac{8}{3}\right]", r"(0.6, \frac83]"),
    (r"(2,\infty)", "x > 2"),
    (r"x \in [-2,7]", "[-2,7]"),
    (r"[-2,7]", r"-2 \le x \le 7"),
    (r"(-\infty, 2) \cup (3, \infty)", r"(3,\infty)\cup(-\infty,2)"),
    (r"k \geqslant 2", r"k \ge 2"),
    ("k \\geq 2", "2 \\leq k"),
    (r"\emptyset", r"\varnothing"),
    (
        r"\begin{pmatrix} -1/3 \\ 2/3 \end{pmatrix}",
        r"\begin{bmatrix} -\frac13 \\ \frac23 \end{bmatrix}",
    ),
    (r"\begin{pmatrix} -1 & 0 \\ 0 & -1 \end{pmatrix}", r"\begin{pmatrix}-1&0\\0&-1\end{pmatrix}"),
    (r"\text{Evelyn}", "Evelyn"),
    (r"\text{even}", r"\textbf{Even}"),
    (r"\text{(C)}", "C"),
    (r"\text{(C)}", "(C)"),
    ("52_8", "52_{8}"),
    ("52_8", "52"),
    (r"m_{\max }=n^{2}-n-1", "n^2 - n - 1"),
    (r"E_{1},E_{2}", "E_2, E_1"),
    (r"\lceil n / 2\rceil+1", r"1 + \lceil \frac{n}{2} \rceil"),
]

# (reference, what a box holds): close, and wrong.
DIFFERENT = [
    ("42", "43"),
    ("42", "-42"),
    ("42", "4.2"),
    ("42", "42, 43"),
    ("42", "420"),
    ("0.08", r"80\%"),
    ("62.5", "0.625"),
    (r"\frac{1}{3}", "0.333"),
    (r"\frac{1}{2}", r"\frac{2}{1}"),
    ("2.55e-10", "7.25e-11"),
    ("0.00000001", "0.00000002"),
    ("4.5e33", "4.5e32"),
    (r"\pi", "3.14"),
    (r"\sqrt{51}", "51"),
    (r"3\sqrt{13}", r"13\sqrt{3}"),
    ("6 - 5i", "6 + 5i"),
    ("2^{1009}", "2^{1009}+1"),
    ("52_8", "52_9"),
    ("52_8", "42"),
    ("x_1", "x"),
    ("x_1", "x_2"),
    ("12", "1 2"),
    ("0", r"0.\overline{3}"),
    ("6m", "6"),
    (r"\frac{1}{m} t", r"\frac{1}{m}"),
    ("2k+2", "2k+1"),
    ("y = 2x + 3", "y = 2x - 3"),
    ("x=5", "y=5"),
    ("1,-2", "1"),
    ("1,-2", "-2"),
    ("1,-2", "-1, 2"),
    ("1,-2", "1, -2, 3"),
    ("1,3,5", "1,3"),
    ("-1,2", "x = -1 \\text{ or } x = 3"),
    (r"1 \pm \sqrt{19}", r"1 + \sqrt{19}"),
    (r"f(x)=x$,$f(x)=2-x", "f(x)=x"),
    ("(2,4)", "(4,2)"),
    ("(2,4)", "4, 2"),
    ("(2,4)", r"\{2, 4\}"),
    (r"\{1,2\}", "(2,1)"),
    (r"\{1,2\}", "(1,2)"),
    ("(6,31,-1)", "(31,6,-1)"),
    ("(6,31,-1)", "(6,31)"),
    ("(1,1), (3,2)", "(1,1)"),
    ("(1,1), (3,2)", "(1,1), (2,3)"),
    ("(3,4]", "(3,4)"),
    ("(3,4]", "[3,4]"),
    ("(3,4]", "(3,5]"),
    (r"(2,\infty)", r"[2,\infty)"),
    (r"(2,\infty)", r"x \ge 2"),
    (r"(-\infty, 2) \cup (3, \infty)", r"(-\infty, 2)"),
    (r"(-\infty, 2) \cup (3, \infty)", r"(-\infty, 2] \cup (3, \infty)"),
    (r"k \geq 2", r"k \leq 2"),
    (r"k \geq 2", "2"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 2 \\ 1 \end{pmatrix}"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 1 & 2 \end{pmatrix}"),
    (r"\text{even}", "odd"),
    (r"\text{even}", "neve"),
    (r"\text{(C)}", "(D)"),
    ("7", ""),
    ("7", "?"),
]

# (completion, reference, whether it is right): where the answer stands.
PLACES: list[tuple[str, Any, bool]] = [
    (r"First \boxed{3}, but in fact \boxed{4}.", "4", True),
    (r"First \boxed{3}, but in fact \boxed{4}.", "3", False),
    (r"\boxed{1} and \boxed{2}", "1,2", False),
    (r"We get 12. So the answer is \boxed{13}.", "12", False),
    (r"\boxed{13} is the answer. I checked 12 cases", "12", False),
    (r"\boxed{\text{the value is } 3", "4", False),
    (r"Thus \fbox{7}", "7", True),
    (r"Thus $\boxed 7$.", "7", True),
    ("The final answer is $\\frac{1}{2}$. I hope it is correct.", "0.5", True),
    ("The answer is 5, since 7 - 2 = 5. Not 6.", "6", False),
    ("The answer is 3.5. It took 2 steps.", "3.5", True),
    ("Answer: **12**", "12", True),
    ("**Answer:** $x = 12$", "12", True),
    ("The answer is\n\\[\n12\n\\]", "12", True),
    ("The answer is therefore $5$, as $x>3$.", "5", True),
    ("The answers: the answer is $2$ and $3$", "2,3", True),
    ("Hence $x = 4$, and so $y = 5$.", "5", True),
    ("Hence $x = 4$, and so $y = 5$.", "4", False),
    ("Half of 48 is 24", "24", True),
    ("24 is half of 48", "24", False),
    ("no idea", "24", False),
    ("", "24", False),
    (r"\boxed{18}", "She sold 9 * 2 = 18.\n#### 18", True),
    (r"\boxed{18}", r"We get $\boxed{1}$, then \boxed{18} eggs.", True),
    (r"\boxed{18}", [18], True),
    (r"\boxed{18}", 18.0, True),
]


@pytest.fixture(scope="module")
def grader() -> Iterator[MathGrader]:
    with MathGrader(workers=2) as grader:
        yield grader


@pytest.mark.parametrize(("reference", "answer"), EQUAL)
def test_the_same_answer_in_another_form_is_right(
    grader: MathGrader, reference: str, answer: str
) -> None:
    assert grader(rf"Therefore the result is $\boxed{{{answer}}}$.", reference)


@pytest.mark.parametrize(("reference", "answer"), DIFFERENT)
def test_a_near_miss_is_wrong(grader: MathGrader, reference: str, answer: str) -> None:
    assert not grader(rf"Therefore the result is $\boxed{{{answer}}}$.", reference)


@pytest.mark.parametrize(("completion", "reference", "right"), PLACES)
def test_one_place_in_a_completion_counts(
    grader: MathGrader, completion: str, reference: Any, right: bool
) -> None:
    assert grader(completion, reference) == right


ENDLESS = {
    "braces": "{" * 500_000 + "}" * 500_000,
    "tower": "10^{10^{10^{10}}} + 1",
    "nines": "9^{9^{9^{9}}}",
    "factorial": "((10^{10})!)!",
    "fractions": r"\frac{" * 20_000 + "1" + "}{2}" * 20_000,
    "brackets": "(" * 5_000 + "1" + ")" * 5_000,
    "sum": r"\sum_{n=1}^{10^9} \frac{1}{n^2}",
    "digits": "1" * 1_000_000,
}


@needs_proc
@pytest.mark.parametrize(
    "name",
    [
        name if name in ("braces", "tower") else pytest.param(name, marks=pytest.mark.drill)
        for name in ENDLESS
    ],
)
def test_an_answer_without_end_costs_its_limit_and_is_wrong(name: str) -> None:
    before = workers()
    with MathGrader(seconds=0.5) as grader:
        assert not grader(rf"\boxed{{{ENDLESS[name]}}}", "3")
        assert grader(r"\boxed{1/2}", "0.5")
    assert workers() == before


def test_the_kernel_ends_a_worker_that_takes_too_long() -> None:
    with worker(0.5, 2**30) as process:
        output, _ = process.communicate(json.dumps(["3", "9^{9^{9^{9}}}"]) + "\n", timeout=60)
    assert output == "taken\n"
    assert process.returncode == -signal.SIGPROF


@needs_proc
def test_an_answer_of_gigabytes_stays_within_the_limit_and_its_memory_is_returned() -> None:
    limit = 160 * 2**20
    with worker(30, limit) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(["3", "2^{33000000000}"]) + "\n")  # 4 GB
        process.stdin.flush()
        assert process.stdout.readline() == "taken\n"
        assert json.loads(process.stdout.readline())[0] is False
        peak, now = memory_of(process.pid)
        assert peak < limit
        assert now < 100 * 2**20


@needs_proc
def test_a_worker_that_has_grown_is_replaced_between_answers() -> None:
    # More than half of 100 MB are the worker's own.
    with MathGrader(memory=100 * 2**20) as grader:
        before = workers()
        assert grader(r"\boxed{1/2}", "0.5")
        assert workers() == before
        assert grader(r"\boxed{1/2}", "0.5")


@needs_proc
def test_a_worker_that_was_killed_between_answers_fails_none() -> None:
    before = workers()
    with MathGrader() as grader:
        assert grader(r"\boxed{1/2}", "0.5")
        [pid] = workers() - before
        os.kill(pid, signal.SIGKILL)
        assert grader(r"\boxed{1/2}", "0.5")
        assert not workers() & {pid}


def test_threads_share_the_workers(grader: MathGrader) -> None:
    pairs = [(rf"\boxed{{{n}/2}}", str(m / 2)) for n in range(8) for m in range(8)]
    assert grader.grade_all(pairs) == [n == m for n in range(8) for m in range(8)]
    verdicts: list[bool] = []
    threads = [
        threading.Thread(target=lambda: verdicts.append(GRADERS["math"](r"\boxed{1/2}", 0.5)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verdicts == [True] * 3


def test_a_worker_imports_neither_jax_nor_anything_of_ours() -> None:
    code = "import runpy, sys; runpy.run_path(sys.argv[1]); print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-P", "-c", code, str(WORKER)], capture_output=True, text=True, check=True
    ).stdout.split()
    assert "sympy" in loaded
    assert not {name.partition(".")[0] for name in loaded} & {"jax", "jaxlib", "ranktuner_jax"}


def test_a_missing_math_verify_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(UserError, match=r"expected the package math-verify, .*\[eval\]"):
        MathGrader()


def test_a_worker_that_cannot_start_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with (
        MathGrader() as grader,
        pytest.raises(RunError, match="its worker ended with code 1 before it was ready"),
    ):
        grader(r"\boxed{1}", "2")


@pytest.mark.parametrize("reference", [None, True, {"answer": 1}, ["1", "2"], [], "", " "])
def test_a_reference_that_is_no_answer_is_refused(grader: MathGrader, reference: Any) -> None:
    with pytest.raises(ValueError, match="reference: expected"):
        grader(r"\boxed{1}", reference)


COMMANDS = ["boxed{", "frac", "sqrt", "text{", "left", "begin{pmatrix}", "pi", "infty", "cup"]
LATEX = strategies.lists(
    strategies.sampled_from(
        [*"{}[]()$\\^_=+-,;:.%&0123456789xyeE\n −", *(f"\\{name}" for name in COMMANDS)]
    )
).map("".join)


@hypothesis.settings(
    deadline=None,
    max_examples=40,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(completion=strategies.text() | LATEX)
def test_no_completion_makes_it_raise(grader: MathGrader, completion: str) -> None:
    assert grader(completion, r"\frac{123456789}{1000}") is False


def paper_rows() -> list[Any]:
    """The reference answers of the paper's five sets."""
    folder = pathlib.Path(__file__).parents[3] / "shared/data"
    columns = {
        "math_oai": "answer",
        "minerva_math": "solution",
        "olympiadbench": "final_answer",
        "aime24": "answer",
        "amc23": "answer",
    }
    if not all((folder / f"{name}.jsonl").exists() for name in columns):
        pytest.skip("needs the benchmark files")
    return [
        json.loads(line)[column]
        for name, column in columns.items()
        for line in (folder / f"{name}.jsonl").read_text().splitlines()
    ]


def boxed_reference(reference: Any) -> str:
    """The reference as a completion would give it; of a solution, its last box."""
    [text] = reference if isinstance(reference, list) else [reference]
    return text if r"\boxed{" in str(text) else rf"\boxed{{{text}}}"


def test_each_answer_of_the_papers_sets_is_right_for_its_own_question(grader: MathGrader) -> None:
    rows = paper_rows()
    assert len(rows) == 1517
    pairs = [(rf"In the end it is {boxed_reference(row)}, as asked.", row) for row in rows]
    assert [
        row for row, right in zip(rows, grader.grade_all(pairs), strict=True) if not right
    ] == []


@pytest.mark.parametrize("step", [40, pytest.param(1, marks=pytest.mark.drill)])
def test_an_answer_of_the_papers_sets_is_wrong_for_the_next_question(
    grader: MathGrader, step: int
) -> None:
    rows = paper_rows()[::step]
    pairs = [(boxed_reference(row), other) for row, other in itertools.pairwise(rows)]
    accepted = [pair for pair, right in zip(pairs, grader.grade_all(pairs), strict=True) if right]
    assert [pair for pair in accepted if pair[0] != boxed_reference(pair[1])] == []


def worker(seconds: float, memory: int) -> "subprocess.Popen[str]":
    """A worker that is ready."""
    process = subprocess.Popen(
        [sys.executable, "-P", str(WORKER), str(seconds), str(memory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def workers() -> set[int]:
    """The workers of this process that have not ended."""
    found = set()
    for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            command = stat.with_name("cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if parent == os.getpid() and WORKER.name.encode() in command:
            found.add(int(stat.parent.name))
    return found


def memory_of(pid: int) -> tuple[int, int]:
    """The most memory that a process has held and what it holds, in bytes; 0 once it has ended."""
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    lines = dict(line.split(":", 1) for line in status.splitlines())
    peak, now = (int(lines.get(key, "0 kB").split()[0]) for key in ("VmHWM", "VmRSS"))
    return peak * 1024, now * 1024
