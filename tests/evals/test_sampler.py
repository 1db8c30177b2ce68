"""The sampler against the plain forward pass."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ranktuner_jax.errors import UserError
from ranktuner_jax.evals.sampler import Completion, Progress, generate
from ranktuner_jax.models import Decoder, DecoderConfig, param_shardings
from tests.evals.near_ties import near_ties

VOCAB = 23
PROMPTS = [[3, 5, 7], [2], [9, 9, 1, 4, 12, 6, 8, 10, 11, 13], [4, 4], [20, 3, 8, 17, 1]]
WIDTH = 96
DRAWN: dict[str, Any] = {"temperature": 1.5, "top_k": 12, "top_p": 0.9}


def forward(model: Decoder) -> Callable[[Sequence[int]], np.ndarray]:
    """The logits of the token after a text: the whole text anew, padded on the right."""
    logits = jax.jit(
        lambda tokens, ids, last: model.logits(model(tokens, segment_ids=ids)[0, last])
    )

    def after(text: Sequence[int]) -> np.ndarray:
        padded = np.zeros((1, WIDTH), np.int32)
        padded[0, : len(text)] = text
        ids = (np.arange(WIDTH) < len(text)).astype(np.int32)[None]
        return np.asarray(logits(padded, ids, len(text) - 1))

    return after


def greedy(
    after: Callable[[Sequence[int]], np.ndarray],
    prompt: Sequence[int],
    steps: int,
    stop_ids: Sequence[int] = (),
) -> Completion:
    """The definition of a greedy completion."""
    text = list(prompt)
    while len(text) < len(prompt) + steps:
        token = int(after(text).argmax())
        if token in stop_ids:
            return Completion(text[len(prompt) :], True)
        text.append(token)
    return Completion(text[len(prompt) :], False)


@pytest.fixture(scope="module")
def expected(model: Decoder) -> list[list[int]]:
    after = forward(model)
    return [greedy(after, prompt, 8).tokens for prompt in PROMPTS]


@pytest.fixture(scope="module")
def many() -> list[list[int]]:
    """Prompts of 1 to 30 tokens."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, VOCAB, rng.integers(1, 31)).tolist() for _ in range(20)]


def make(**changes: Any) -> Decoder:
    """A tiny decoder that is unlike the fixture in some ways."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 4,
        "initializer_range": 0.5,
    }
    return Decoder(DecoderConfig(**sizes | changes), rngs=nnx.Rngs(0))


@pytest.mark.parametrize("batch_size", [1, 2, None])
def test_greedy_with_cache_equals_greedy_by_full_forward(
    model: Decoder, expected: list[list[int]], batch_size: int | None
) -> None:
    assert len({tuple(tokens) for tokens in expected}) == len(expected)
    written = generate(model, PROMPTS, max_new_tokens=8, stop_ids=[], batch_size=batch_size)
    assert [c.tokens for c in written] == expected
    assert not any(c.finished for c in written)


@pytest.mark.parametrize(
    "changes", [{}, {"family": "mistral", "windows": (None, 5)}], ids=["plain", "one window"]
)
def test_rows_that_take_the_place_of_others_equal_the_full_forward(
    changes: dict[str, Any], many: list[list[int]]
) -> None:
    model = make(**changes)
    stops = [0, 1]
    after = forward(model)
    wanted = [greedy(after, prompt, 60, stops) for prompt in many]
    # Some stop early and some not at all, so that tokens move in the cache and it changes length.
    assert {c.finished for c in wanted} == {True, False}
    done: dict[int, Completion] = {}
    written = generate(
        model,
        many,
        max_new_tokens=60,
        stop_ids=stops,
        batch_size=4,
        done=lambda index, completion: done.update({index: completion}),
    )
    near_ties(written, wanted, many, after)
    assert [done[i] for i in range(len(many))] == written
    assert list(done) != sorted(done)


def spread(model: Decoder, sizes: dict[str, int]) -> Decoder:
    """The same model over a mesh."""
    devices = jax.devices()[: math.prod(sizes.values())]
    auto = (jax.sharding.AxisType.Auto,) * len(sizes)
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=auto, devices=devices)
    placed = type(model)(model.config, rngs=nnx.Rngs(0), mesh=mesh)
    params = nnx.state(placed)
    nnx.update(placed, jax.device_put(params, param_shardings(params, mesh)))
    return placed


@pytest.mark.parametrize("options", [{}, DRAWN], ids=["greedy", "drawn"])
def test_a_completion_is_the_same_in_any_batch_on_any_mesh_and_after_a_resume(
    model: Decoder, many: list[list[int]], options: dict[str, Any]
) -> None:
    keys = [(i // 2, i % 2) for i in range(len(many))]
    options = {"max_new_tokens": 40, "stop_ids": [0, 1], "seed": 3, **options}
    alone = generate(model, many, keys=keys, batch_size=1, **options)
    assert {c.finished for c in alone} == {True, False}
    assert generate(model, many, keys=keys, batch_size=5, **options) == alone
    mesh = spread(model, {"data": 2, "fsdp": 2, "tensor": 2})
    assert generate(mesh, many, keys=keys, batch_size=8, **options) == alone
    rest = [17, 4, 11]
    wanted = [many[i] for i in rest], [keys[i] for i in rest]
    again = generate(model, wanted[0], keys=wanted[1], **options)
    assert again == [alone[i] for i in rest]


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


def test_each_prompt_may_have_a_limit_of_its_own(model: Decoder, expected: list[list[int]]) -> None:
    limits = [8, 1, 3, 5, 2]
    written = generate(model, PROMPTS, max_new_tokens=limits, stop_ids=[], batch_size=2)
    wanted = [tokens[:limit] for tokens, limit in zip(expected, limits, strict=True)]
    assert [c.tokens for c in written] == wanted


class CountingDecoder(Decoder):
    """Notes the width of each call that runs."""

    def __call__(self, tokens: jax.Array, *args: Any, **kwargs: Any) -> Any:
        jax.debug.callback(widths.append, tokens.shape[1])
        return super().__call__(tokens, *args, **kwargs)

    def prefill(self, tokens: jax.Array, *args: Any) -> Any:
        jax.debug.callback(widths.append, tokens.shape[1])
        return super().prefill(tokens, *args)


widths: list[int] = []


def test_steps_end_when_all_rows_are_done_and_no_row_waits_for_another(model: Decoder) -> None:
    counting = CountingDecoder(model.config, rngs=nnx.Rngs(0))

    def steps(limits: list[int], batch_size: int) -> tuple[int, int]:
        """Prompts read and tokens written, in passes of the model."""
        widths.clear()
        prompts = [[1, 2]] * len(limits)
        generate(counting, prompts, max_new_tokens=limits, stop_ids=[], batch_size=batch_size)
        jax.effects_barrier()
        return sum(width > 1 for width in widths), sum(width == 1 for width in widths)

    # The first token comes with the prompt.
    assert steps([1, 1, 1], 2) == (3, 0)
    assert steps([7, 7], 2) == (2, 6)
    # One row writes 21 tokens, and the other meanwhile 5 · 4.
    assert steps([21, 5, 5, 5, 5], 2) == (5, 20)


def test_a_low_temperature_is_greedy(model: Decoder, expected: list[list[int]]) -> None:
    settings: list[dict[str, Any]] = [{"temperature": 1e-4}, {"temperature": 2.0, "top_k": 1}]
    for options in settings:
        written = generate(model, PROMPTS, max_new_tokens=8, stop_ids=[], **options)
        assert [c.tokens for c in written] == expected


def test_another_seed_or_key_draws_another_completion(model: Decoder) -> None:
    def draw(**options: Any) -> list[list[int]]:
        prompts = [PROMPTS[0]] * 2
        drawn = generate(model, prompts, max_new_tokens=8, stop_ids=[], temperature=2.0, **options)
        return [c.tokens for c in drawn]

    same = draw(seed=0, keys=[(5, 1), (5, 1)])
    assert same[0] == same[1]
    others = [
        *draw(seed=0, keys=[(5, 0), (1, 5)]),
        *draw(seed=1, keys=[(5, 1), (6, 1)]),
        same[0],
    ]
    assert len({tuple(tokens) for tokens in others}) == 5


def share_of_each(model: Decoder, **options: Any) -> np.ndarray:
    drawn = generate(model, [[3, 5, 7]] * 4096, max_new_tokens=1, stop_ids=[], **options)
    return np.bincount([c.tokens[0] for c in drawn], minlength=VOCAB) / 4096


@pytest.mark.parametrize(
    ("top_k", "top_p"), [(0, 1.0), (5, 1.0), (0, 0.6), (5, 0.6), (VOCAB + 9, 1.0)], ids=str
)
def test_tokens_are_drawn_as_the_model_the_temperature_top_k_and_top_p_say(
    model: Decoder, top_k: int, top_p: float
) -> None:
    logits = np.asarray(forward(model)([3, 5, 7]), np.float64)
    wanted = np.exp(logits / 1.5) / np.exp(logits / 1.5).sum()
    if top_k:
        wanted[np.argsort(-wanted)[top_k:]] = 0
        wanted /= wanted.sum()
    order = np.argsort(-wanted)
    before = np.cumsum(wanted[order]) - wanted[order]
    wanted[order[before >= top_p]] = 0
    wanted /= wanted.sum()
    shares = share_of_each(model, temperature=1.5, top_k=top_k, top_p=top_p)
    # Five standard errors of the likeliest share.
    np.testing.assert_allclose(shares, wanted, atol=5 * 0.5 / 4096**0.5)
    assert not shares[wanted == 0].any()


def test_padded_vocabulary_rows_are_never_written(model: Decoder) -> None:
    config = dataclasses.replace(model.config, vocab_multiple=64)
    padded = Decoder(config, rngs=nnx.Rngs(0))
    padded.embed[...] = padded.embed[...].at[VOCAB:].set(100.0)
    [completion] = generate(padded, [[1, 2]], max_new_tokens=8, stop_ids=[], temperature=5.0)
    assert max(completion.tokens) < VOCAB


def test_parameters_of_another_type_are_cast_once_and_give_the_same(model: Decoder) -> None:
    narrow = Decoder(model.config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    cast = Decoder(model.config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    nnx.update(
        cast,
        jax.tree_util.tree_map_with_path(
            lambda path, x: x if "norm" in str(path) else x.astype(jnp.bfloat16), nnx.state(narrow)
        ),
    )
    one, two = (generate(each, PROMPTS, max_new_tokens=8, stop_ids=[]) for each in (narrow, cast))
    assert one == two


def test_a_second_call_of_the_same_shapes_compiles_nothing(
    model: Decoder, compiled: Callable[[Callable[[], object]], list[str]]
) -> None:
    other = Decoder(model.config, rngs=nnx.Rngs(7))
    backwards = [prompt[::-1] for prompt in PROMPTS]
    options: dict[str, Any] = {"max_new_tokens": 5, "batch_size": 4}
    first = compiled(lambda: generate(model, PROMPTS, stop_ids=[0], **options))
    assert any("decode" in message for message in first)
    assert compiled(lambda: generate(other, backwards, stop_ids=[1], **options)) == []


def test_programs_are_compiled_for_few_sizes_and_not_for_each_way_to_divide_their_arguments(
    many: list[list[int]], compiled: Callable[[Callable[[], object]], list[str]]
) -> None:
    model = spread(make(), {"data": 2, "fsdp": 2, "tensor": 2})
    prompts = [prompt * 3 for prompt in many]
    options: dict[str, Any] = {"max_new_tokens": 60, "stop_ids": [0, 1], "batch_size": 8}
    messages = compiled(lambda: generate(model, prompts, **options))
    for program, most in (("prefill", 8), ("decode", 4)):
        assert 1 < sum(f"jit({program})" in message for message in messages) <= most


def test_progress_counts_prompts_and_tokens(model: Decoder) -> None:
    seen: list[Progress] = []
    limits = [3, 1, 1, 2, 1]
    generate(model, PROMPTS, max_new_tokens=limits, stop_ids=[], batch_size=2, progress=seen.append)
    assert (seen[-1].done, seen[-1].total, seen[-1].tokens, seen[-1].share) == (5, 5, 8, 1.0)
    assert [p.done for p in seen] == sorted(p.done for p in seen)
    assert 0 < seen[0].share < 1
    assert seen[-1].tokens_per_second == 8 / seen[-1].seconds


def test_no_prompts_give_no_completions(model: Decoder) -> None:
    assert generate(model, [], max_new_tokens=3, stop_ids=[]) == []


@pytest.mark.parametrize("sizes", [{}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_the_memory_for_the_cache_says_how_many_rows_are_written_together(
    model: Decoder, sizes: dict[str, int]
) -> None:
    model = CountingDecoder(model.config, rngs=nnx.Rngs(0))
    # Keys and values of 2 layers and 2 heads of 4 float32, in 64 slots: 32 + 2, rounded up.
    row = 2 * 2 * 2 * 4 * 4 * 64
    if sizes:  # Each device has one of the two heads, and a row of every four.
        row, model = row // 2, spread(model, sizes)

    def passes(rows: float) -> int:
        widths.clear()
        prompts, gb = [[1] * 18] * 8, rows * row / 1e9
        generate(model, prompts, max_new_tokens=2, stop_ids=[], cache_gb=gb)
        jax.effects_barrier()
        return widths.count(1)

    shards = 4 if sizes else 1
    assert passes(1.01) == 8 // shards
    assert passes(2.01) == 4 // shards
    with pytest.raises(UserError, match=r"cache_gb: expected at least 0\.001 for a prompt of 18"):
        passes(0.99)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1]], {"batch_size": 0}, "at least 1: got 0"),
        ([[1]], {"max_new_tokens": 0}, "at least 1: got None and 0"),
        ([[1]], {"max_new_tokens": [1, 2]}, "as many as prompts, which are 1: got 2 and 1"),
        ([[1]], {"keys": []}, "as many as prompts, which are 1: got 1 and 0"),
    ],
)
def test_bad_arguments_are_named(
    model: Decoder, prompts: list[list[int]], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        generate(model, prompts, **{"max_new_tokens": 2, "stop_ids": [], **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature: expected 0"),
        ({"temperature": 1.0, "top_k": -1}, "top_k: expected 0"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p: expected more than 0"),
    ],
)
def test_settings_out_of_range_are_mistakes_of_users(
    model: Decoder, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        generate(model, [[1]], max_new_tokens=2, stop_ids=[], **options)
