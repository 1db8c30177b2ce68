"""HumanEval and MBPP: every reference solution passes, and fails once a line of it is broken."""

from __future__ import annotations

import ast
import json
import os
import pathlib
import warnings
from collections.abc import Callable
from typing import Any

import pytest

from ranktuner_jax.errors import UserError
from ranktuner_jax.evals.sandbox import Verdict, check_python_many, programs
from ranktuner_jax.evals.sandbox.grader import program_of

DATA = pathlib.Path(__file__).parents[3] / "shared/data"
TIMEOUT_S = 60.0  # One reference solution takes seconds, and the machine may be busy.


def rows(name: str) -> list[dict[str, Any]]:
    path = DATA / f"{name}.jsonl"
    if not path.is_file():
        pytest.skip("needs the benchmark files, which are not part of this project")
    return [json.loads(line) for line in path.read_text().splitlines()]


def solutions() -> dict[str, tuple[str, dict[str, Any]]]:
    """The function under test as a whole, and its row, by the name of the problem."""
    humaneval = rows("humaneval")
    found = {r["task_id"]: (r["prompt"] + r["canonical_solution"], r) for r in humaneval}
    found |= {f"MBPP/{r['task_id']}": (r["code"], r) for r in rows("sanitized_mbpp")}
    return found


@pytest.fixture(autouse=True, scope="module")
def sandbox() -> str:
    try:
        return programs.find_sandbox()
    except UserError as error:
        pytest.skip(str(error))


def grade(codes: list[tuple[str, dict[str, Any]]], sandbox: str = "auto") -> list[Verdict]:
    fenced = [program_of(f"```python\n{code}\n```", row) for code, row in codes]
    return check_python_many(fenced, timeout_s=TIMEOUT_S, sandbox=sandbox)


def failures(verdicts: list[Verdict], names: list[str]) -> dict[str, str]:
    return {n: v.reason for n, v in zip(names, verdicts, strict=True) if not v.passed}


# Those with tests of a kind of their own: helpers from the prompt (32, 38, 50), a function named
# like a built-in (126), like `check` (56), a module in the tests (596), a match (737), randomness.
SPECIAL = ["HumanEval/32", "HumanEval/38", "HumanEval/50", "HumanEval/53"] + [
    f"MBPP/{number}" for number in (56, 126, 596, 737, 787)
]


def test_reference_solutions_pass() -> None:
    every = solutions()
    names = [*SPECIAL, *list(every)[::24]]
    assert failures(grade([every[name] for name in names]), names) == {}


def test_continuations_of_the_prompt_pass() -> None:
    sample = rows("humaneval")[::16]
    answers = [program_of(row["canonical_solution"], row) for row in sample]
    verdicts = check_python_many(answers, timeout_s=TIMEOUT_S)
    assert failures(verdicts, [row["task_id"] for row in sample]) == {}


@pytest.mark.drill
@pytest.mark.parametrize(
    "sandbox_name", ["sandlock", pytest.param("bubblewrap", marks=pytest.mark.drill)]
)
def test_every_reference_solution_passes(sandbox_name: str) -> None:
    try:
        programs.find_sandbox(sandbox_name)
    except UserError as error:
        pytest.skip(str(error))
    every = solutions()
    verdicts = grade(list(every.values()), sandbox_name)
    assert failures(verdicts, list(every)) == {}
    assert len(verdicts) == 164 + 427
    # The worker does not grow with what it has run.
    for worker in programs._WORKERS._idle:
        status = pathlib.Path(f"/proc/{worker._process.pid}/status").read_text()
        assert len(os.listdir(f"/proc/{worker._process.pid}/fd")) < 30
        assert int(status.split("VmRSS:")[1].split()[0]) < 200_000  # KiB


Breaker = Callable[[ast.AST], bool]


def return_nothing(node: ast.AST) -> bool:
    if isinstance(node, ast.Return) and node.value is not None:
        node.value = ast.Constant(None)
        return True
    return False


def add_one(node: ast.AST) -> bool:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        node.value += 1  # type: ignore[operator]
        return True
    return False


def turn_a_comparison_round(node: ast.AST) -> bool:
    opposite = {ast.Lt: ast.GtE, ast.Gt: ast.LtE, ast.LtE: ast.Gt, ast.GtE: ast.Lt}
    opposite |= {ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.NotIn: ast.In}
    if isinstance(node, ast.Compare) and type(node.ops[0]) in opposite:
        node.ops[0] = opposite[type(node.ops[0])]()
        return True
    return False


def broken(code: str, breaker: Breaker) -> str | None:
    """The program with the last place broken that can be, or None."""
    with warnings.catch_warnings(action="ignore"):  # Of escapes in the solutions of MBPP.
        tree = ast.parse(code)
    for node in reversed(list(ast.walk(tree))):
        if breaker(node):
            return ast.unparse(tree)
    return None


def survivors(breaker: Breaker, names: list[str]) -> tuple[list[str], int]:
    """The problems whose broken solution passes, and how many could be broken."""
    every = solutions()
    codes = {name: broken(every[name][0], breaker) for name in names}
    able = {name: (code, every[name][1]) for name, code in codes.items() if code is not None}
    verdicts = check_python_many(
        [program_of(f"```python\n{code}\n```", row) for code, row in able.values()], timeout_s=10
    )
    passed = [name for name, verdict in zip(able, verdicts, strict=True) if verdict.passed]
    return passed, len(able)


def test_reference_solutions_that_return_nothing_fail() -> None:
    passed, able = survivors(return_nothing, [*SPECIAL, *list(solutions())[::48]])
    assert passed == []
    assert able >= 15


@pytest.mark.drill
@pytest.mark.parametrize(
    ("breaker", "share"),
    [(return_nothing, 0.05), (add_one, 0.25), (turn_a_comparison_round, 0.1)],
)
def test_broken_reference_solutions_fail(breaker: Breaker, share: float) -> None:
    passed, able = survivors(breaker, list(solutions()))
    print(f"{breaker.__name__}: {len(passed)} of {able} pass: {passed}")
    # Those that pass are changes that make no difference, or that the tests do not look at.
    assert len(passed) <= share * able
