"""Measure the sampler: beside transformers' `generate`, and beside batches that are not refilled.

ranktuner bench sample
ranktuner bench sample --batch_sizes 32 --dtype bfloat16 --json
ranktuner bench sample --prompts=0 --answers=256

Prompts are random tokens, of lengths spread evenly in their logarithm, and completions are greedy.
Tokens count up to the end of the text. The repeats of all cases are interleaved, and a ratio is
that of the medians at each side's best batch.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np

from ranktuner_jax import evals, models
from ranktuner_jax.bench.records import Record, add_json, show
from ranktuner_jax.errors import UserError
from ranktuner_jax.train.commands import flags

__all__ = ["OURS", "Case", "add_arguments", "best", "run", "spread", "write"]

OURS, TORCH = "ranktuner_jax", "transformers + torch"
REFILLED, BATCHES = "rows refilled", "batch after batch"


@dataclasses.dataclass
class Case:
    """One way to write all completions.

    Attributes:
      name: What writes them.
      batch_size: Prompts together.
      write: Writes them and returns the number of their tokens.
      speeds: Tokens per second of each repeat.
    """

    name: str
    batch_size: int
    write: Callable[[], int]
    speeds: list[float] = dataclasses.field(default_factory=list)

    @property
    def median(self) -> float:
        """The median speed."""
        return statistics.median(self.speeds)

    def time(self) -> None:
        """Times it once; the first time after a warm-up, in which programs are compiled."""
        if not self.speeds:
            self.write()
        start = time.perf_counter()
        tokens = self.write()
        self.speeds.append(tokens / (time.perf_counter() - start))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `ranktuner bench sample`."""
    flags.add_config(parser, default="smollm2_chain_sum", groups=("model",))
    number = functools.partial(parser.add_argument, type=int, metavar="N")
    number("--prompts", default=64, help="prompts, 0 for none [%(default)s]")
    number("--prompt_tokens", nargs=2, default=[32, 256], help="fewest and most tokens [32 256]")
    number("--max_new_tokens", default=64, help="most tokens of a completion [%(default)s]")
    number("--batch_sizes", nargs="+", default=[8, 16, 32, 64], help="[8 16 32 64]")
    number(
        "--answers",
        default=0,
        help="prompts whose answers have given lengths, to measure refilling by [%(default)s]",
    )
    number("--answer_tokens", nargs=2, default=[16, 256], help="fewest and most tokens [16 256]")
    number("--repeats", default=3, help="timed runs per case [%(default)s]")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Prints the speed of all cases, and the ratios."""
    for name in ("prompts", "answers"):
        if getattr(args, name) < 0:
            raise UserError(f"--{name}: expected at least 0, got {getattr(args, name)}")
    for name in ("repeats", "max_new_tokens", "batch_sizes", "prompt_tokens", "answer_tokens"):
        if np.min(getattr(args, name)) < 1:
            raise UserError(f"--{name}: expected at least 1, got {getattr(args, name)}")
    folder = models.resolve(flags.read_config(args).model)
    cases = _cases(folder, args)
    for repeat in range(args.repeats):
        for case in cases:
            case.time()
            text = f"{case.name}, batch {case.batch_size}: {case.speeds[-1]:.1f} tokens/s"
            print(f"{repeat + 1}/{args.repeats}  {text}", file=sys.stderr, flush=True)
    setting = f"greedy, {args.dtype}"
    records = [
        Record(
            "sample",
            setting,
            f"{case.name}, batch {case.batch_size}",
            {"median_tokens_per_s": case.median, "fastest_tokens_per_s": max(case.speeds)},
            args.dtype,
        )
        for case in cases
    ]
    for one, other in ((OURS, TORCH), (REFILLED, BATCHES)):
        if {one, other} <= {case.name for case in cases}:
            ratio = best(cases, one).median / best(cases, other).median
            name = f"{one} ÷ {other}, each at its best batch"
            records.append(Record("sample", setting, name, {"÷": ratio}, args.dtype))
    show(records, as_json=args.json)
    return 0


def best(cases: Sequence[Case], name: str) -> Case:
    """The fastest case of a name, by the median.

    Example:
      >>> cases = [Case("a", size, lambda: 0, [float(size)]) for size in (8, 16)]
      >>> best(cases, "a").batch_size
      16
    """
    return max((case for case in cases if case.name == name), key=lambda case: case.median)


def _cases(folder: pathlib.Path, args: argparse.Namespace) -> list[Case]:
    model = models.load_pretrained(folder, dtype=args.dtype, param_dtype=args.dtype)
    rng = np.random.default_rng(0)

    def prompts(count: int) -> list[list[int]]:
        sizes = spread(rng, count, args.prompt_tokens)
        return [rng.integers(0, model.vocab_size, size).tolist() for size in sizes]

    ends = model.config.eos_token_id
    stop_ids = [] if ends is None else list(np.atleast_1d(ends).tolist())
    asked = prompts(args.prompts)
    torch = None
    if asked and importlib.util.find_spec("torch") is None:
        print("torch is not installed (extra `parity`): no comparison with it", file=sys.stderr)
    elif asked:
        torch = _torch_writer(folder, asked, args.max_new_tokens, stop_ids, args.dtype)
    cases = []
    ours = functools.partial(write, model, asked, args.max_new_tokens, stop_ids=stop_ids)
    for size in args.batch_sizes if asked else []:
        cases.append(Case(OURS, size, functools.partial(ours, batch_size=size)))
        if torch is not None:
            cases.append(Case(TORCH, size, functools.partial(torch, size)))
    answers = prompts(args.answers)
    limits = spread(rng, args.answers, args.answer_tokens)

    def one_after_another(size: int) -> int:
        starts = range(0, len(answers), size)
        parts = [(answers[i : i + size], limits[i : i + size]) for i in starts]
        return sum(write(model, *part, stop_ids=(), batch_size=size) for part in parts)

    for size in args.batch_sizes if answers else []:
        refilled = functools.partial(write, model, answers, limits, stop_ids=(), batch_size=size)
        cases.append(Case(REFILLED, size, refilled))
        cases.append(Case(BATCHES, size, functools.partial(one_after_another, size)))
    return cases


def spread(rng: np.random.Generator, count: int, bounds: Sequence[int]) -> list[int]:
    """Numbers whose logarithms are spread evenly."""
    low, high = np.log(bounds)
    return [round(number) for number in np.exp(rng.uniform(low, high, count)).tolist()]


def write(
    model: models.Decoder,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int | Sequence[int],
    *,
    stop_ids: Sequence[int],
    batch_size: int,
) -> int:
    """Writes greedy completions, and returns the number of their tokens."""
    completions = evals.generate(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        stop_ids=stop_ids,
        batch_size=batch_size,
        cache_gb=8.0,
    )
    return sum(len(completion.tokens) for completion in completions)


def _torch_writer(
    folder: pathlib.Path,
    prompts: list[list[int]],
    max_new_tokens: int,
    stop_ids: list[int],
    dtype: str,
) -> Callable[[int], int]:
    """Writes with transformers, in batches of prompts of similar lengths."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    prompts = sorted(prompts, key=len)
    pad = stop_ids[0] if stop_ids else 0

    def write(size: int) -> int:
        count = 0
        for start in range(0, len(prompts), size):
            batch = prompts[start : start + size]
            width = len(batch[-1])
            tokens = torch.tensor([[pad] * (width - len(p)) + p for p in batch])
            lengths = torch.tensor([len(p) for p in batch])
            written = model.generate(
                tokens,
                attention_mask=(torch.arange(width) >= width - lengths[:, None]).long(),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=stop_ids or None,
                pad_token_id=pad,
            )[:, width:].tolist()
            for row in written:
                ends = [i for i, token in enumerate(row) if token in stop_ids]
                count += ends[0] if ends else len(row)
        return count

    return write
