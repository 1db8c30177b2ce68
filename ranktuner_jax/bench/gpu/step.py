"""A whole training step of a Qwen3-0.6B shape."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Iterator

from ranktuner_jax.bench.gpu import shapes
from ranktuner_jax.bench.gpu.case import Case
from ranktuner_jax.bench.train import FUSED, SFT, SharedState, jax_cases
from ranktuner_jax.train import StepConfig, TrainConfig
from ranktuner_jax.train.telemetry.utilisation import step_flops

__all__ = ["cases"]

# The model, rows of a step, tokens of a row.
SHAPE = {False: (shapes.QWEN3_06B, 8, 2048), True: (shapes.TINY, 8, 64)}
REPEATS = 5


def cases(small: bool) -> Iterator[Case]:
    """RankTuner, and plain SFT."""
    model, rows, length = SHAPE[small]
    layers, width, vocab = model.num_layers, model.hidden_size, model.vocab_size
    for name in (FUSED, SFT):
        yield Case(
            f"one step of {rows} rows of {length}, {layers} layers, D {width}, V {vocab}, bfloat16",
            name,
            "bfloat16",
            functools.partial(_measure, name, small),
        )


def _measure(name: str, small: bool) -> dict[str, float | None]:
    model, rows, length = SHAPE[small]
    train = StepConfig(steps=100, batch_size=rows, compute_dtype="bfloat16", remat="full")
    shared = SharedState(shapes.random_run(model, TrainConfig(train=train)))
    [case] = jax_cases(shared, shapes.random_batch(model, rows, length), [name])
    for _ in range(REPEATS):
        case.time()
    seconds, tokens = statistics.median(case.seconds), rows * length
    flops = step_flops(model, tokens, tokens, seen=tokens * (length + 1) / 2)
    return {
        "median_s": seconds,
        "tokens_per_s": tokens / seconds,
        "temp_bytes": case.temp_bytes,
        "flops_per_s": flops / seconds,
    }
