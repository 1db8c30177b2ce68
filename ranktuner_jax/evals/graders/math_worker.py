"""Judges pairs of mathematical answers in a process of its own; imports nothing of ours.

`MathGrader` starts it by its path, as a script: importing it through the package would import JAX.
It prints `ready`, then reads a JSON list `[reference, answer]` from each line of standard input and
prints `taken` and, when it is done, a JSON list `[is_equal, is_last]`. On an answer that takes too
long the kernel ends the process, and whoever reads from it sees the end.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import pathlib
import re
import resource
import signal
import sys
from typing import Any

import sympy
from latex2sympy2_extended import NormalizationConfig
from latex2sympy2_extended.logic import And
from math_verify import LatexExtractionConfig, parse, verify

# The sizes of two decimals that count as one: the sixth decimal place, as in math-verify, if that
# is four digits of the value; or the last digits of a double.
_ABSOLUTE, _RELATIVE, _ROUNDING = 1e-6, 1e-4, 1e-12
# Units are removed here: math-verify would take the t of `\frac{1}{m} t` for one.
_CONFIG = LatexExtractionConfig(
    boxed_match_priority=0,
    normalization_config=NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="last"
    ),
)

_UNITS = (
    "degrees?|deg|radians?|rad|percent|dollars?|cents?|pounds?|euros?|units?|inch(?:es)?|in|feet|"
    "foot|ft|yards?|miles?|mi|mph|kmh|km|cm|mm|nm|meters?|metres?|kilometers?|centimeters?|"
    "kilograms?|kg|mg|grams?|lbs?|liters?|litres?|ml|gallons?|seconds?|secs?|minutes?|mins?|hours?|"
    "hrs?|days?|weeks?|months?|years?|square|cubic|sq|cu|per|students?|people|apples?|coins?|"
    "points?|times|ways|cm|eV|Hz|kHz|MHz|kJ|mol|moles?"
)
_WORD = rf"(?:{_UNITS})(?![A-Za-z])(?:\^\{{?-?\d\}}?)?"
_TEXT = r"\\(?:text|mathrm|mbox|textrm|operatorname)\s*\{[^{}]*\}(?:\^\{?-?\d\}?)?"
_UNIT = re.compile(
    rf"((?:\d|\}}|\\pi|\))\s*)(?:(?:~|\\[,;!: ]|\s|/|\\cdot)*(?:{_TEXT}|{_WORD}))+\s*$"
)
_REWRITES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        # Between two formulas a comma separates answers; elsewhere `$` says nothing.
        (r"\$\s*([,;])\s*\$", r"\1 "),
        (r"\\?\$", ""),
        (r"[−–]", "-"),
        (r"\\text\s*\{\s*(and|or)\s*\}", r" \1 "),
        (r"\\q?quad(?![A-Za-z])", " "),
        # With an index it is a name, and no longer Euler's number.
        (r"(?<![A-Za-z\\])[Ee](?=_)", r"\\varepsilon"),
        (r"\\varnothing", r"\\emptyset"),
        (r"_\s*\{?\s*\\(max|min)\s*\}?", r"_{\1}"),
        # 10,\!080 and 10{,}080 and 10\,080 and 10 080 are 10080.
        (r"(?<=\d)(?:,\\!\s*|\{,\}|\\[,;: !]|~)(?=\d{3}(?!\d))", ""),
        (r"(?<![\d.,}])(\d{1,3})((?: \d{3}(?!\d))+)", lambda m: m[1] + m[2].replace(" ", "")),
        (r"\^\s*(?:\{\s*\\circ\s*\}|\\circ)|\\degree(?![A-Za-z])|°", ""),
        # 4.5e33, 1./3 and 5.
        (r"(?<![A-Za-z\d])(\d+\.?\d*)[eE]([+-]?\d+)(?!\d)", r"\1 \\times 10^{\2}"),
        (r"(\d)\.(?!\d|\\overline)", r"\1"),
        (r"[\s.,;]+$", ""),
    )
)
_PERCENT = re.compile(r"\s*(?:\\?%|\\text\s*\{\s*(?:%|percent)\s*\}|\bpercent)$")
_BASE = re.compile(r"(\d[0-9A-Za-z]*)_\{?(?:\\text\{)?(\w+)\}*")
_WORDS = re.compile(r"\\(?:text|mathrm|mbox)[a-z]*\s*\{([^{}\\]*[A-Za-z]{2}[^{}\\]*)\}")


def is_equal(reference: str, answer: str) -> bool:
    """Whether an answer, as it stands in a box, is the reference in another form."""
    reference, answer = _rewritten(reference), _rewritten(answer)
    if _letters(reference) == _letters(answer):
        return True
    if _WORDS.fullmatch(reference):
        return False
    bases = [_BASE.fullmatch(text) for text in (reference, answer)]
    if any(bases):
        # 52 may be read in the base that the question asks for; 52 in base 9 may not.
        digits = {
            base[1] if base else text for base, text in zip(bases, (reference, answer), strict=True)
        }
        return len(digits) == 1 and len({base[2] for base in bases if base}) == 1
    return any(
        _parsed_equal(one, other)
        for one, other in itertools.product(_readings(reference), _readings(answer))
    )


def _rewritten(text: str) -> str:
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    return _UNIT.sub(r"\1", text).strip()


def _letters(text: str) -> str:
    """The text without fonts, sizes, white space, the brackets of a choice, the case of a word."""
    text = re.sub(r"\\(?:text|mathrm|mbox|textbf|mathbf)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\(?:left|right|displaystyle)(?![A-Za-z])|\\[!,;: ]", "", text)
    text = re.sub(r"(?<!\d)[\s~]+|[\s~]+(?!\d)", "", text)  # 1 2 is not 12
    text = re.sub(r"\\[dtc]frac", r"\\frac", text)
    if re.fullmatch(r"\([A-J]\)", text):
        return text[1]
    return text.casefold() if re.fullmatch(r"[A-Za-z]{3,}", text) else text


def _readings(text: str) -> list[str]:
    """A percentage is the number before the sign, and a hundredth of it."""
    bare = _PERCENT.sub("", text)
    return [text] if bare == text else [bare, rf"\frac{{{bare}}}{{100}}"]


def _parsed_equal(reference: str, answer: str) -> bool:
    gold, found = _parsed(reference), _parsed(answer)
    if gold is None or found is None:
        return False
    if _is_point(gold) and isinstance(found, sympy.FiniteSet) and r"\{" not in answer:
        # A point without its brackets; a set has no first element.
        found = sympy.Tuple(*getattr(found, "_unsorted_args", found.args))
    return _same(gold, found)


@functools.lru_cache(maxsize=64)  # the same reference comes with many answers
def _parsed(text: str) -> Any:
    # No alarms inside: the limit of the process holds.
    found = parse(
        rf"\boxed{{{text}}}", [_CONFIG], fallback_mode="no_fallback", parsing_timeout=None
    )
    return found[0] if found else None


def _same(gold: Any, found: Any) -> bool:
    """Whether two parsed answers are equal, part by part."""
    gold, found = _unwrapped(gold, found)
    if isinstance(gold, sympy.Set) != isinstance(found, sympy.Set):
        gold, found = _as_set(gold), _as_set(found)
    if isinstance(gold, sympy.FiniteSet) or isinstance(found, sympy.FiniteSet):
        return _same_elements(gold, found)
    if isinstance(gold, sympy.Tuple) or isinstance(found, sympy.Tuple):
        if not (_is_point(gold) and _is_point(found)):
            return False
        return _all_same(_coordinates(gold), _coordinates(found))
    if isinstance(gold, sympy.Interval) and isinstance(found, sympy.Interval):
        return (gold.left_open, gold.right_open) == (found.left_open, found.right_open) and (
            _all_same((gold.start, gold.end), (found.start, found.end))
        )
    if isinstance(gold, sympy.MatrixBase) and isinstance(found, sympy.MatrixBase):
        return gold.shape == found.shape and _all_same(gold.flat(), found.flat())
    if _is_equation(gold) and _is_equation(found):
        # The same name on the left, or equivalent equations.
        if _all_same(gold.args, found.args):
            return True
    elif _is_number(gold) and _is_number(found):
        return _same_number(gold, found)
    return verify(gold, found, timeout_seconds=None)


def _all_same(gold: Any, found: Any) -> bool:
    return len(gold) == len(found) and all(map(_same, gold, found))


def _same_elements(gold: Any, found: Any) -> bool:
    """Whether each element of one set has its own equal in the other."""
    left = list(found.args) if isinstance(found, sympy.FiniteSet) else [found]
    for element in gold.args if isinstance(gold, sympy.FiniteSet) else [gold]:
        match = next((other for other in left if _same(element, other)), None)
        if match is None:
            return False
        left.remove(match)
    return not left


def _unwrapped(gold: Any, found: Any) -> tuple[Any, Any]:
    """Both sides without `x =` if only one of them has it; a chain `a = b = c` ends on c."""
    gold, found = (
        sympy.Eq(side._unsorted_args[0].lhs, side._unsorted_args[-1].rhs, evaluate=False)
        if isinstance(side, And) and all(map(_is_equation, side._unsorted_args))
        else side
        for side in (gold, found)
    )
    if _is_equation(found) and not _is_equation(gold):
        found = found.rhs
    elif _is_equation(gold) and not _is_equation(found) and _is_name(gold.lhs):
        gold = gold.rhs
    return gold, found


def _as_set(side: Any) -> Any:
    """A relation such as 1 < x as the numbers that fulfil it; anything else as it is."""
    if isinstance(side, And | sympy.core.relational.Relational):
        with contextlib.suppress(Exception):
            return sympy.And(*getattr(side, "_unsorted_args", [side])).as_set()
    return side


def _is_equation(side: Any) -> bool:
    return isinstance(side, sympy.Eq)


def _is_name(side: Any) -> bool:
    """Whether it is x, x_1 or f(x): what an answer may be called."""
    return isinstance(side, sympy.Symbol | sympy.core.function.AppliedUndef)


def _is_point(side: Any) -> bool:
    """Whether it is a tuple; two of its coordinates are parsed as an open interval."""
    return isinstance(side, sympy.Tuple) or (
        isinstance(side, sympy.Interval)
        and side.left_open == sympy.true
        and side.right_open == sympy.true
    )


def _coordinates(point: Any) -> tuple[Any, ...]:
    return (point.start, point.end) if isinstance(point, sympy.Interval) else point.args


def _is_number(side: Any) -> bool:
    return isinstance(side, sympy.Expr) and not side.free_symbols and side.is_number


def _same_number(gold: Any, found: Any) -> bool:
    if gold == found:
        return True
    if isinstance(gold, sympy.Rational) and isinstance(found, sympy.Rational):
        return False
    is_decimal = gold.has(sympy.Float) or found.has(sympy.Float)
    gold, found = gold.doit(), found.doit()
    size = max(abs(sympy.N(gold, 30)), abs(sympy.N(found, 30)))
    difference = abs(sympy.N(gold - found, 30))
    if is_decimal:
        return bool(
            difference <= _ROUNDING * size or difference <= min(_ABSOLUTE, _RELATIVE * size)
        )
    # Exact values: 2^1009 + 1 is not 2^1009, so closeness alone proves only the difference.
    return bool(difference <= _ROUNDING * size) and verify(gold, found, timeout_seconds=None)


def _resident_bytes() -> int:
    """The memory in use, or 0 where the system does not say."""
    statm = pathlib.Path("/proc/self/statm")
    if not statm.exists():
        return 0
    return int(statm.read_text().split()[1]) * resource.getpagesize()


def main(seconds: float, memory: int) -> None:
    """Answers pairs until standard input ends."""
    # Where the system knows no such limit, the one on time remains.
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    print("ready", flush=True)
    for line in sys.stdin:
        # Seconds of this process's own work, so that a busy machine makes no answer wrong. The
        # signal's default action is death, which no loop inside C code can put off.
        signal.setitimer(signal.ITIMER_PROF, seconds)
        print("taken", flush=True)
        try:
            verdict = is_equal(*json.loads(line))
        except Exception:  # of sympy's many, on texts that are no mathematics
            verdict = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        # One that has grown goes, rather than fail an answer that is not to blame.
        is_last = _resident_bytes() > memory // 2
        print(json.dumps([verdict, is_last]), flush=True)


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))
