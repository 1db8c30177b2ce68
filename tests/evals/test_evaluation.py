"""What an evaluation counts."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import transformers
from flax import nnx
from transformers import PreTrainedTokenizerBase

from ranktuner_jax.data import Batch, Example
from ranktuner_jax.errors import UserError
from ranktuner_jax.evals import (
    TASKS,
    EvalConfig,
    decoding,
    evaluate,
    evaluation,
    generate,
    stop_ids,
)
from ranktuner_jax.evals.choosing import Rule
from ranktuner_jax.models import Decoder, param_shardings, save_pretrained
from tests.tolerances import F32

Rows = list[Batch[np.ndarray]]
CONFIG = EvalConfig(rows=5, batch_size=2, examples=4, prompts_per_batch=3, max_new_tokens=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "sums"}, r"eval\.task: expected one of chain_sum"),
        ({"rows": 0}, r"eval\.rows: expected at least 1, got 0"),
        ({"every_steps": -1}, r"eval\.every_steps: expected at least 0, got -1"),
    ],
)
def test_impossible_settings_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        EvalConfig(**options)


def plain_sums(model: Decoder, rows: Rows) -> tuple[float, float, int]:
    """Mean nll, token accuracy and count, row by row in NumPy from the logits."""
    nll, correct, count = 0.0, 0, 0
    for row in rows:
        batch = jax.tree.map(lambda array: jnp.asarray(array)[None], row)
        hidden = model(batch.tokens, batch.positions, batch.segment_ids)
        logits = np.asarray(model.logits(hidden), np.float64)[0]
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        for t in np.flatnonzero(row.mask):
            nll -= log_p[t, row.labels[t]]
            correct += int(log_p[t].argmax() == row.labels[t])
            count += 1
    return nll / count, correct / count, count


def assert_close(actual: float, expected: float) -> None:
    np.testing.assert_allclose(actual, expected, rtol=F32["rtol"], atol=F32["atol"])


@pytest.mark.parametrize("batch_size", [1, 2, 5, 64])
def test_the_likelihood_is_the_plain_mean_over_supervised_tokens(
    model: Decoder, rows: Rows, batch_size: int
) -> None:
    config = dataclasses.replace(CONFIG, batch_size=batch_size)
    result = evaluate(model, rows=rows, config=config)
    nll, accuracy, count = plain_sums(model, rows[:5])
    assert_close(result.nll, nll)
    assert_close(result.token_accuracy, accuracy)
    assert result.tokens == count
    assert result.accuracy is None
    assert result.accuracy_interval is None


def test_answers_are_counted_scored_and_shown(
    model: Decoder, tokenizer: PreTrainedTokenizerBase, rows: Rows, examples: list[Example]
) -> None:
    config = dataclasses.replace(CONFIG, task="exact", previews=2)
    result = evaluate(model, tokenizer, rows=rows, examples=examples, config=config)
    assert (result.questions, result.correct) == (4, 2)
    assert result.accuracy == 0.5
    assert [preview.correct for preview in result.previews] == [True, False]
    assert result.previews[0].question == "a1"
    assert result.previews[0].completion == examples[0].row["answer"]
    numbers = result.metrics()
    assert numbers["accuracy_low"] < 0.5 < numbers["accuracy_high"]
    assert numbers["perplexity"] == pytest.approx(math.exp(result.nll))


def test_without_a_task_nothing_is_sampled(
    model: Decoder, tokenizer: PreTrainedTokenizerBase, rows: Rows, examples: list[Example]
) -> None:
    result = evaluate(model, tokenizer, rows=rows, examples=examples, config=CONFIG)
    assert result.questions == 0
    assert result.previews == ()
    assert "accuracy" not in result.metrics()


def test_without_settings_all_rows_are_scored_and_nothing_else(model: Decoder, rows: Rows) -> None:
    result = evaluate(model, rows=rows)
    nll, _, count = plain_sums(model, rows)
    assert_close(result.nll, nll)
    assert (result.tokens, result.questions) == (count, 0)


def test_questions_need_a_tokenizer(model: Decoder, rows: Rows, examples: list[Example]) -> None:
    config = dataclasses.replace(CONFIG, task="exact")
    with pytest.raises(ValueError, match="needs a tokenizer to ask questions: got 4 examples"):
        evaluate(model, rows=rows, examples=examples, config=config)
    assert evaluate(model, rows=rows, config=config).questions == 0
    assert evaluate(model, rows=rows, examples=examples, config=CONFIG).questions == 0


def test_a_registered_scorer_grades_the_completions(
    model: Decoder, tokenizer: PreTrainedTokenizerBase, rows: Rows, examples: list[Example]
) -> None:
    def my_scorer(completion: str, record: Mapping[str, Any]) -> bool:
        return (completion == record["answer"]) == (record["answer"] != "nonsense")

    TASKS["mine"] = lambda: my_scorer
    try:
        config = dataclasses.replace(CONFIG, task="mine")
        result = evaluate(model, tokenizer, rows=rows, examples=examples, config=config)
    finally:
        del TASKS["mine"]
    assert (result.questions, result.correct) == (4, 4)
    with pytest.raises(UserError, match=r"eval\.task: expected one of .*, got 'mine'"):
        dataclasses.replace(CONFIG, task="mine")


def test_progress_reaches_the_number_of_rows_and_questions(
    model: Decoder, tokenizer: PreTrainedTokenizerBase, rows: Rows, examples: list[Example]
) -> None:
    seen: list[tuple[int, int]] = []
    evaluate(
        model,
        tokenizer,
        rows=rows,
        examples=examples,
        config=dataclasses.replace(CONFIG, task="exact"),
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(2, 9), (4, 9), (5, 9), (8, 9), (9, 9)]


def test_rows_without_a_supervised_token_are_refused(model: Decoder, rows: Rows) -> None:
    for row in rows:
        row.mask[:] = False
    with pytest.raises(ValueError, match="the 5 held-out rows have no supervised token"):
        evaluate(model, rows=rows, config=CONFIG)


def test_a_second_evaluation_compiles_nothing(
    model: Decoder, rows: Rows, compiled: Callable[[Callable[[], object]], list[str]]
) -> None:
    other = Decoder(model.config, rngs=nnx.Rngs(1))
    config = dataclasses.replace(CONFIG, batch_size=3)  # Batches of a shape of their own.
    first = compiled(lambda: evaluate(model, rows=rows, config=config))
    assert any("score_rows" in message for message in first)
    assert compiled(lambda: evaluate(other, rows=rows[::-1], config=config)) == []


@pytest.mark.parametrize(
    "sizes",
    [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 2}, {"tensor": 4}],
    ids=str,
)
def test_a_model_on_several_devices_scores_the_same(
    sizes: dict[str, int],
    model: Decoder,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    examples: list[Example],
) -> None:
    config = dataclasses.replace(CONFIG, task="exact")
    expected = evaluate(model, tokenizer, rows=rows, examples=examples, config=config)
    result = evaluate(spread(model, sizes), tokenizer, rows=rows, examples=examples, config=config)
    assert_close(result.nll, expected.nll)
    assert dataclasses.replace(result, nll=0, seconds=0) == dataclasses.replace(
        expected, nll=0, seconds=0
    )


def spread(model: Decoder, sizes: dict[str, int]) -> Decoder:
    """The same model over a mesh."""
    devices = jax.devices()[: math.prod(sizes.values())]
    auto = (jax.sharding.AxisType.Auto,) * len(sizes)
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=auto, devices=devices)
    placed = Decoder(model.config, rngs=nnx.Rngs(0), mesh=mesh)
    params = nnx.state(placed)
    nnx.update(placed, jax.device_put(params, param_shardings(params, mesh)))
    return placed


def test_each_device_scores_its_own_rows_and_answers_its_own_questions(model: Decoder) -> None:
    batch = Batch.of({name: np.ones((16, 12)) for name in ("tokens", "labels", "mask")})
    asked = decoding.Asked(*(np.full(16, n, np.int32) for n in (4, 0, 0)))
    prompts = (np.ones((16, 8), np.int32), np.full(16, 8, np.int32), asked)
    stop_ids, seed, rule = np.zeros(1, np.int32), np.uint32(0), Rule.of()

    def flops(model: Decoder) -> list[float]:
        """Those of one device, for the rows, the questions and a step of their answers."""
        graph, params = nnx.split(model)
        weights = decoding.split(graph, params)
        written = decoding.empty(graph, params, batch_size=16, length=32)
        until = (np.int32(4), np.int32(16))
        programs = [
            evaluation.score_rows.lower(graph, params, batch),
            decoding.prefill.lower(graph, weights, *prompts, seed, rule),
            decoding.decode.lower(graph, weights, written, stop_ids, seed, rule, *until, buffer=4),
        ]
        costs = [program.compile().cost_analysis() for program in programs]
        return [float(cost["flops"]) for cost in costs if cost is not None]

    for whole, part in zip(flops(model), flops(spread(model, {"fsdp": 8})), strict=True):
        assert part < whole / 6


def test_turns_end_at_the_end_of_sequence_and_at_known_markers(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    assert stop_ids(tokenizer) == [0]

    class Llama:
        eos_token_id = None
        chat_template = None

        def get_added_vocab(self) -> dict[str, int]:
            return {"<|eot_id|>": 9, "<|end_of_text|>": 7, "<|start_header_id|>": 3}

    assert stop_ids(Llama()) == [7, 9]  # type: ignore[arg-type]


def test_the_token_that_ends_a_turn_in_the_template_ends_a_completion_and_is_exported(
    model: Decoder, rows: Rows, tmp_path: pathlib.Path
) -> None:
    prompt = [3, 1, 4]
    [completion] = generate(model, [prompt], max_new_tokens=3, stop_ids=[])
    end = completion.tokens[1]
    assert end not in (0, completion.tokens[0])
    # One word a token: word 0 is the end of the sequence, and the template ends turns otherwise.
    words = tokenizers.models.WordLevel({f"w{i}": i for i in range(23)}, unk_token="w0")
    backend = tokenizers.Tokenizer(words)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="w0",
        additional_special_tokens=[f"w{end}"],
        chat_template="{% for m in messages %}{{ m.content + ' w" + str(end) + " ' }}{% endfor %}",
    )
    assert stop_ids(tokenizer) == [0, end]

    turns = ({"role": "user", "content": "?"},)
    answer = f"w{completion.tokens[0]}"
    example = Example(0, turns, tuple(prompt), (5, end), row={"answer": answer})
    config = dataclasses.replace(CONFIG, task="exact")
    result = evaluate(model, tokenizer, rows=rows, examples=[example], config=config)
    assert (result.finished, result.correct) == (1, 1)

    tokenizer.save_pretrained(tmp_path / "tokenizer")
    save_pretrained(
        model,
        tmp_path / "model",
        tokenizer_from=tmp_path / "tokenizer",
        stop_ids=stop_ids(tokenizer),
    )
    exported = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert set(exported["eos_token_id"]) >= {0, end}
