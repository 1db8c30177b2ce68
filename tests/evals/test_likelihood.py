"""How likely continuations are, against a plain loop over the uncached model."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import transformers
from flax import nnx

from ranktuner_jax.evals import LocalEngine, Question, log_likelihoods
from ranktuner_jax.evals.engines import Choice
from ranktuner_jax.evals.likelihood import encode_continuation
from ranktuner_jax.models import Decoder, DecoderConfig
from tests.tolerances import F32


def pairs(count: int = 21) -> list[tuple[list[int], list[int]]]:
    rng = np.random.default_rng(0)

    def text(longest: int) -> list[int]:
        return [int(token) for token in rng.integers(1, 23, rng.integers(1, longest + 1))]

    # Contexts and continuations across the widths that are compiled.
    return [(text(70 if i % 5 == 0 else 9), text(45 if i % 7 == 0 else 6)) for i in range(count)]


@functools.partial(jax.jit, static_argnames="graphdef")
def logits_of(graphdef: nnx.GraphDef[Decoder], params: nnx.State, tokens: np.ndarray) -> jax.Array:
    model = nnx.merge(graphdef, params)
    return model.logits(model(jnp.asarray(tokens)))


def expected(model: Decoder, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    # Of one width, for one compilation: no token sees what follows it.
    tokens = np.zeros((1, 128), np.int32)
    tokens[0, : len(context) + len(continuation)] = [*context, *continuation]
    logits = np.asarray(logits_of(*nnx.split(model), tokens), np.float64)[0]
    total, greedy = 0.0, True
    for position, token in enumerate(continuation, len(context) - 1):
        z = logits[position]
        total += z[token] - z.max() - np.log(np.exp(z - z.max()).sum())
        greedy &= int(z.argmax()) == token
    return total, greedy


def test_each_continuation_is_as_likely_as_the_uncached_model_says(model: Decoder) -> None:
    asked = pairs()
    found = log_likelihoods(model, asked, batch_size=4)
    for (context, continuation), value in zip(asked, found, strict=True):
        total, greedy = expected(model, context, continuation)
        np.testing.assert_allclose(value.total, total, **F32)
        assert value.greedy == greedy


def test_what_the_model_would_write_is_greedy(model: Decoder) -> None:
    context = [3, 1, 4, 1, 5]
    written: list[int] = []
    for _ in range(4):
        tokens = np.zeros((1, 128), np.int32)
        tokens[0, : 5 + len(written)] = [*context, *written]
        logits = logits_of(*nnx.split(model), tokens)
        written.append(int(jnp.argmax(logits[0, 4 + len(written)])))
    other = [*written[:-1], written[-1] % 22 + 1]
    assert [v.greedy for v in log_likelihoods(model, [(context, written), (context, other)])] == [
        True,
        False,
    ]


def test_a_mesh_gives_the_same(model: Decoder) -> None:
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AUTO,) * 3)
    on_mesh = Decoder(model.config, rngs=nnx.Rngs(0), mesh=mesh)
    nnx.update(on_mesh, nnx.state(model))
    one, other = (log_likelihoods(each, pairs(9)) for each in (model, on_mesh))
    for a, b in zip(one, other, strict=True):
        np.testing.assert_allclose(a.total, b.total, **F32)


AUTO = jax.sharding.AxisType.Auto


def test_a_pair_without_tokens_is_named(model: Decoder) -> None:
    with pytest.raises(ValueError, match="pair 1 has 0 and 1 tokens"):
        log_likelihoods(model, [([1], [2]), ([], [3])])
    with pytest.raises(ValueError, match="pair 0 has 1 and 0 tokens"):
        log_likelihoods(model, [([1], [])])
    assert log_likelihoods(model, []) == []


def test_the_choice_begins_with_the_space_that_its_first_token_has() -> None:
    words = {"<s>": 0, "Is": 1, "▁hot": 2, "▁": 3, "?": 4}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="?"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")
    assert encode_continuation(tokenizer, "Is", " hot") == ([1], [2])
    assert encode_continuation(tokenizer, "Is ", "hot") == ([1], [2])
    assert encode_continuation(tokenizer, "", "Is") == ([0], [1])


def test_a_base_model_without_a_chat_template_is_scored_on_choices(model: Decoder) -> None:
    words = {"?": 0, "Fire": 1, "is": 2, "hot": 3, "cold": 4}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="?"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
    found: dict[int, Choice] = {}
    question = Question(0, "Fire is", (), 0, (" hot", " cold"))
    LocalEngine(model, tokenizer).choose([question], found.__setitem__)
    one, other = (expected(model, [1, 2], [token])[0] for token in (3, 4))
    np.testing.assert_allclose(found[0].log_likelihoods, (one, other), **F32)


def test_a_sliding_window_is_kept() -> None:
    config = DecoderConfig(
        vocab_size=23,
        hidden_size=16,
        intermediate_size=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=4,
        windows=(3, None),
        initializer_range=0.5,
    )
    model = Decoder(config, rngs=nnx.Rngs(1))
    for pair, value in zip(pairs(5), log_likelihoods(model, pairs(5)), strict=True):
        np.testing.assert_allclose(value.total, expected(model, *pair)[0], **F32)
