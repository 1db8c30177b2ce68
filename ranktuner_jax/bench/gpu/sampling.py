"""Tokens per second that a Qwen3-0.6B shape samples."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import numpy as np
from flax import nnx

from ranktuner_jax import models
from ranktuner_jax.bench import sample
from ranktuner_jax.bench.gpu import shapes
from ranktuner_jax.bench.gpu.case import Case

__all__ = ["cases"]

# The model, prompts, tokens of a prompt at most, tokens of a completion.
SHAPE = {False: (shapes.QWEN3_06B, 128, 256, 128), True: (shapes.TINY, 4, 8, 4)}
BATCHES = {False: (16, 128), True: (2,)}
REPEATS = 2


def cases(small: bool) -> Iterator[Case]:
    """Batches of two sizes."""
    config, prompts, longest, written = SHAPE[small]

    @functools.cache
    def model() -> models.Decoder:
        return models.Decoder(config, rngs=nnx.Rngs(0), dtype="bfloat16", param_dtype="bfloat16")

    for size in BATCHES[small]:
        yield Case(
            f"{config.num_layers} layers, D {config.hidden_size}, {prompts} prompts of up to "
            f"{longest} tokens, {written} written, bfloat16",
            f"batch {size}",
            "bfloat16",
            functools.partial(_measure, model, size, small),
        )


def _measure(make: Callable[[], models.Decoder], size: int, small: bool) -> dict[str, float | None]:
    config, count, longest, written = SHAPE[small]
    rng = np.random.default_rng(0)
    lengths = sample.spread(rng, count, (longest // 4, longest))
    prompts = [rng.integers(0, config.vocab_size, length).tolist() for length in lengths]
    write = functools.partial(sample.write, make(), prompts, written, stop_ids=(), batch_size=size)
    case = sample.Case(sample.OURS, size, write)
    for _ in range(REPEATS):
        case.time()
    return {"median_tokens_per_s": case.median, "fastest_tokens_per_s": max(case.speeds)}
