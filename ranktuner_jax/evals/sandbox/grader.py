"""Grades a completion that is a Python program."""

import json
import re
from collections.abc import Mapping
from typing import Any

from ranktuner_jax.evals.sandbox.programs import Program, check_python

__all__ = ["grade_python", "program_of"]

# A fence that the completion does not close holds the rest of it.
_BLOCK = re.compile(
    r"^[ \t]*```[ \t]*(\w*)[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE
)
_PYTHON = ("", "python", "python3", "py")
# Where a base model goes on to something else: the stop sequences of Chen et al. (2021),
# "Evaluating Large Language Models Trained on Code", and a fence.
_STOP = re.compile(r"\n(?:class|def|#|if|print|```)")


def grade_python(completion: str, reference: Any) -> bool:
    r"""Whether the program in a completion passes its tests, in a sandbox.

    The program is the first block of Python between fences, or the first that defines the
    function under test where it is known; without fences it is the whole completion, which
    goes on from the prompt where there is one.

    Args:
      completion: The whole completion.
      reference: The tests as text, or a row as a mapping or as text in JSON, with the fields of
        HumanEval (`test`, `entry_point`, `prompt`) or of MBPP (`test_list`, and if there are
        any `test_imports` and `code`, whose last function that the tests name is under test).

    Raises:
      ValueError: If the reference is none of these.
      UserError: If no sandbox works here, or the tests are at fault; see `check_python`.

    Example:
      >>> answer = "Here it is: ```python\ndef f(x): return x * x\n```"
      >>> grade_python(answer, "assert f(3) == 9")  # doctest: +SKIP
      True
    """
    program = program_of(completion, reference)
    return check_python(program.code, program.tests, program.entry_point).passed


def program_of(completion: str, reference: Any) -> Program:
    r"""The program in a completion, and the tests in a reference; see `grade_python`.

    Example:
      >>> row = {"test_list": ["assert add(1, 2) == 3"], "code": "def add(a, b): return a + b"}
      >>> program_of("```python\ndef add(a, b): return 3\n```", row)
      Program(code='def add(a, b): return 3\n', tests='assert add(1, 2) == 3', entry_point='add')
    """
    if isinstance(reference, str) and reference.lstrip().startswith("{"):
        reference = json.loads(reference)
    if isinstance(reference, str) and reference.strip():
        return Program(_extract(completion, None, ""), reference)
    if isinstance(reference, Mapping) and "test" in reference and "entry_point" in reference:
        prompt, name = str(reference.get("prompt", "")), str(reference["entry_point"])
        # The tests may call functions that the prompt defines, and get them from there.
        return Program(_extract(completion, name, prompt), f"{prompt}\n{reference['test']}", name)
    if isinstance(reference, Mapping) and reference.get("test_list"):
        tests = "\n".join([*reference.get("test_imports", []), *reference["test_list"]])
        defined = re.findall(r"^def\s+(\w+)", str(reference.get("code", "")), re.MULTILINE)
        called = [name for name in defined if re.search(rf"\b{name}\b", tests)]
        tested = called[-1] if called else None
        return Program(_extract(completion, tested, ""), tests, tested)
    raise ValueError(
        "reference: expected tests in Python or a row with test and entry_point, or test_list, "
        f"got {type(reference).__name__} {reference!r:.80}; name the column that holds the tests"
    )


def _extract(completion: str, name: str | None, prompt: str) -> str:
    """The program: a block of the completion, or the prompt and how the completion goes on."""
    goes_on = bool(prompt) and re.match(r"\n*(?:  |\t)", completion)
    blocks = [code for language, code in _BLOCK.findall(completion) if language in _PYTHON]
    if goes_on or not blocks:
        if not prompt:
            return completion
        if _defines(name, completion):
            return f"{prompt}\n{completion}"
        return prompt + _STOP.split(completion, maxsplit=1)[0]
    block = next((code for code in blocks if _defines(name, code)), blocks[0])
    # The prompt stands alone: it ends with the docstring of the function, defined anew below.
    return f"{prompt}\n{block}" if prompt and _defines(name, block) else prompt + block


def _defines(name: str | None, code: str) -> bool:
    return name is not None and bool(
        re.search(rf"^\s*(?:async\s+)?def\s+{name}\b", code, re.MULTILINE)
    )
