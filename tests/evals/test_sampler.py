"""The sampler against the plain forward pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ranktuner_jax.evals import sampler
from ranktuner_jax.evals.sampler import generate
from ranktuner_jax.models import Decoder

VOCAB = 23
PROMPTS = [[3, 5, 7], [2], [9, 9, 1, 4, 12, 6, 8, 10, 11, 13], [4, 4], [20, 3, 8, 17, 1]]


def greedy_by_full_forward(
    model: Decoder, prompt: Sequence[int], steps: int, stop_ids: Sequence[int] = ()
) -> list[int]:
    """The definition: the whole text anew for each token, padded on the right."""
    text = list(prompt)
    forward = jax.jit(lambda tokens, ids: model.logits(model(tokens, segment_ids=ids)))
    while len(text) < len(prompt) + steps:
        padded = np.zeros((1, 24), np.int32)
        padded[0, : len(text)] = text
        ids = (np.arange(24) < len(text)).astype(np.int32)[None]
        text.append(int(jnp.argmax(forward(padded, ids)[0, len(text) - 1])))
        if text[-1] in stop_ids:
            break
    return text[len(prompt) :]


@pytest.fixture(scope="module")
def expected(model: Decoder) -> list[list[int]]:
    return [greedy_by_full_forward(model, prompt, 8) for prompt in PROMPTS]


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_greedy_with_cache_equals_greedy_by_full_forward(
    model: Decoder, expected: list[list[int]], batch_size: int
) -> None:
    assert len({tuple(tokens) for tokens in expected}) == len(expected)
    written = generate(model, PROMPTS, max_new_tokens=8, stop_ids=[], batch_size=batch_size)
    assert [c.tokens for c in written] == expected
    assert not any(c.finished for c in written)


def test_a_completion_ends_before_its_stop_token(model: Decoder, expected: list[list[int]]) -> None:
    stop = expected[0][2]
    written = generate(model, PROMPTS, max_new_tokens=8, stop_ids=[stop, VOCAB - 1])
    for completion, tokens in zip(written, expected, strict=True):
        ends = [i for i, token in enumerate(tokens) if token in (stop, VOCAB - 1)]
        assert completion.finished == bool(ends)
        assert completion.tokens == (tokens[: ends[0]] if ends else tokens)


def test_a_stop_token_as_the_first_gives_an_empty_completion(
    model: Decoder, expected: list[list[int]]
) -> None:
    [completion] = generate(model, PROMPTS[:1], max_new_tokens=8, stop_ids=[expected[0][0]])
    assert completion == ([], True)


def test_one_new_token_needs_no_step_of_the_loop(model: Decoder, expected: list[list[int]]) -> None:
    written = generate(model, PROMPTS, max_new_tokens=1, stop_ids=[])
    assert [c.tokens for c in written] == [tokens[:1] for tokens in expected]


def test_a_batch_ends_when_all_rows_have_stopped(model: Decoder) -> None:
    steps: list[int] = []

    class CountingDecoder(Decoder):
        def __call__(self, tokens: jax.Array, *args: Any, **kwargs: Any) -> Any:
            if tokens.shape[1] == 1:
                jax.debug.callback(lambda: steps.append(1))
            return super().__call__(tokens, *args, **kwargs)

    counting = CountingDecoder(model.config, rngs=nnx.Rngs(0))
    prompts = [[1, 2], [3, 4], [5, 6]]  # The second batch lacks a row.
    firsts = [c.tokens[0] for c in generate(model, prompts, max_new_tokens=1, stop_ids=[])]
    [filler] = generate(model, [[0]], max_new_tokens=1, stop_ids=[])
    assert filler.tokens[0] not in firsts
    generate(counting, prompts, max_new_tokens=7, stop_ids=firsts, batch_size=2)
    jax.effects_barrier()
    assert steps == []
    generate(counting, prompts[:2], max_new_tokens=7, stop_ids=[])
    jax.effects_barrier()
    assert len(steps) == 6


def test_a_low_temperature_is_greedy(model: Decoder, expected: list[list[int]]) -> None:
    written = generate(
        model, PROMPTS, max_new_tokens=8, stop_ids=[], temperature=1e-4, key=jax.random.key(1)
    )
    assert [c.tokens for c in written] == expected


def test_a_drawn_completion_depends_on_its_key_and_not_on_its_batch(model: Decoder) -> None:
    def draw(seed: int, batch_size: int) -> list[list[int]]:
        key = jax.random.key(seed)
        written = generate(
            model,
            PROMPTS,
            max_new_tokens=8,
            stop_ids=[],
            batch_size=batch_size,
            temperature=2.0,
            key=key,
        )
        return [c.tokens for c in written]

    assert draw(0, 2) == draw(0, 64)
    assert draw(0, 2) != draw(1, 2)


def test_equal_prompts_are_drawn_apart_as_the_model_says(model: Decoder) -> None:
    drawn = generate(
        model,
        [[3, 5, 7]] * 4096,
        max_new_tokens=1,
        stop_ids=[],
        batch_size=4096,
        temperature=1.5,
        key=jax.random.key(0),
    )
    shares = np.bincount([c.tokens[0] for c in drawn], minlength=VOCAB) / 4096
    logits = model.logits(model(jnp.array([[3, 5, 7]])))[0, -1]
    wanted = np.asarray(jax.nn.softmax(logits / 1.5))
    # Five standard errors of the likeliest share.
    np.testing.assert_allclose(shares, wanted, atol=5 * 0.5 / 4096**0.5)


def test_padded_vocabulary_rows_are_never_written(model: Decoder) -> None:
    config = dataclasses.replace(model.config, vocab_multiple=64)
    padded = Decoder(config, rngs=nnx.Rngs(0))
    padded.embed[...] = padded.embed[...].at[VOCAB:].set(100.0)
    [completion] = generate(
        padded, [[1, 2]], max_new_tokens=8, stop_ids=[], temperature=5.0, key=jax.random.key(0)
    )
    assert max(completion.tokens) < VOCAB


def test_two_widths_at_most_and_only_where_they_pay() -> None:
    assert sampler._widths([40, 41, 45, 48]) == [48] * 4
    assert sampler._widths([10, 12, 20, 200]) == [24, 24, 24, 200]
    assert sampler._widths([7]) == [8]


def test_a_second_call_of_the_same_shapes_compiles_nothing(
    model: Decoder, compiled: Callable[[Callable[[], object]], list[str]]
) -> None:
    other = Decoder(model.config, rngs=nnx.Rngs(7))
    backwards = [prompt[::-1] for prompt in PROMPTS]
    first = compiled(lambda: generate(model, PROMPTS, max_new_tokens=5, stop_ids=[0]))
    assert any("_decode" in message for message in first)
    second = compiled(lambda: generate(other, backwards, max_new_tokens=5, stop_ids=[1]))
    assert second == []


def test_progress_counts_prompts(model: Decoder) -> None:
    seen: list[int] = []
    generate(model, PROMPTS, max_new_tokens=1, stop_ids=[], batch_size=2, progress=seen.append)
    assert seen == [2, 4, 5]


def test_no_prompts_give_no_completions(model: Decoder) -> None:
    assert generate(model, [], max_new_tokens=3, stop_ids=[]) == []


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1]], {"batch_size": 0}, "at least 1: got 0"),
        ([[1]], {"max_new_tokens": 0}, "at least 1: got 64 and 0"),
        ([[1]], {"temperature": -1.0}, "temperature must be 0"),
        ([[1]], {"temperature": 1.0}, "positive with a key"),
    ],
)
def test_bad_arguments_are_named(
    model: Decoder, prompts: list[list[int]], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        generate(model, prompts, **{"max_new_tokens": 2, "stop_ids": [], **options})
