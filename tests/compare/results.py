"""A comparison as `ranktuner compare` leaves it, with known differences."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from ranktuner_jax.compare.outcome import Outcome

HOSTILE = '</script><script>alert(1)</script><img src=x onerror="alert(2)">'
PRIMARY = "target/pass@1"
METHODS = {"sft": 0.4, "dft": 0.41, "ranktuner:base=one:scale=exact": 0.6}
RATES = (1e-4, 3e-4, 1e-3)
STEPS = 120


def outcome(
    method: str,
    seed: int,
    share: float,
    *,
    rate: float = 3e-4,
    role: Literal["main", "search"] = "main",
    normalize: Literal["tokens", "weights"] = "tokens",
    crossed: bool = True,
    questions: int = 120,
) -> Outcome:
    """A run that answers about a share of the questions."""
    rng = np.random.default_rng([seed, *map(ord, method), round(1e6 * rate)])
    hard = np.random.default_rng(7 if crossed else [7, seed]).random(questions)
    # Most questions are answered alike by all methods and seeds.
    right = hard + 0.1 * rng.standard_normal(questions) < share
    four = np.maximum(right, hard < share + 0.1)
    nll = 2 - share + 0.05 * seed
    return Outcome(
        method,
        normalize,
        rate,
        seed,
        role,
        {
            "nll": nll,
            "token_accuracy": 0.5 + 0.1 * share + 0.01 * (seed % 2),
            "retention_nll": 3.0 + 0.01 * rng.standard_normal(),
            "grad_norm": 1.5 - share + 0.1 * rng.random(),
            "clip_share": 0.25 * rng.random(),
            "seconds": 60 + rng.random(),
            "memory_gb": 1.25,
        },
        {
            PRIMARY: tuple(map(float, right)),
            "target/pass@4": tuple(map(float, four)),
            "ood/pass@1": tuple(map(float, right & (hard < 0.3))),
        },
        {task: f"{task} {'' if crossed else seed}" for task in ("target", "ood")},
        {
            "step": tuple(float(step) for step in range(1, STEPS + 1)),
            "nll": tuple(float(3 - share * step / STEPS + 0.1 * seed) for step in range(STEPS)),
        },
    )


def comparison(
    seeds: Sequence[int] = range(5), *, weights: bool = True, searched: bool = True, **options: Any
) -> list[Outcome]:
    """All runs: DFT about as good as SFT, RankTuner much better."""
    runs = [
        outcome(method, seed, share, **options)
        for seed in seeds
        for method, share in METHODS.items()
    ]
    if weights:
        runs += [outcome("dft", s, 0.3, normalize="weights", **options) for s in seeds]
    if searched:
        runs += [
            outcome(
                method,
                1000 + seed,
                share - 0.1 * abs(np.log10(rate / 3e-4)),
                rate=rate,
                role="search",
            )
            for seed in range(2)
            for rate in RATES
            for method, share in METHODS.items()
        ]
    return runs


def write_results(
    folder: pathlib.Path, outcomes: Sequence[Outcome], **settings: Any
) -> pathlib.Path:
    """The folder of a finished comparison."""
    content = {
        "settings": {
            "primary": PRIMARY,
            "baseline": "sft",
            "config": {"model": "tiny", "data": {"source": HOSTILE}},
            "before": {PRIMARY: 0.05, "nll": 3.2},
            **settings,
        },
        "outcomes": [one.to_json() for one in outcomes],
        "analysis": {},
    }
    folder.mkdir(exist_ok=True)
    (folder / "results.json").write_text(json.dumps(content))
    return folder
