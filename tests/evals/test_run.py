"""What an evaluation counts, and what it remembers."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import shutil
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import transformers
from flax import nnx

from ranktuner_jax.data import Example
from ranktuner_jax.errors import UserError
from ranktuner_jax.evals import (
    EvalConfig,
    EvalResult,
    cache,
    cached_evaluation,
    evaluate,
    fingerprint,
    generate,
    sampler,
    stop_ids,
    wilson_interval,
)
from ranktuner_jax.evals import run as run_module
from ranktuner_jax.models import Decoder, param_shardings, save_pretrained
from tests.tolerances import F32

Row = dict[str, np.ndarray]
CONFIG = EvalConfig(rows=5, batch_size=2, examples=4, prompts_per_batch=3, max_new_tokens=3)


@pytest.fixture
def rows() -> list[Row]:
    """Seven rows: two conversations and padding, a third of the real tokens supervised."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(7):
        segment_ids = np.repeat(np.int32([1, 2, 0]), [5, 4, 3])
        made.append(
            {
                "tokens": rng.integers(1, 23, 12).astype(np.int32),
                "labels": rng.integers(1, 23, 12).astype(np.int32),
                "mask": (rng.random(12) < 0.4) & (segment_ids > 0),
                "positions": np.concatenate([np.arange(5), np.arange(4), np.arange(3)]).astype(
                    np.int32
                ),
                "segment_ids": segment_ids,
                "token_weights": rng.random(12).astype(np.float32),
            }
        )
    return made


def make_examples(model: Decoder, tokenizer: object, prompts: Sequence[str]) -> list[Example]:
    """Questions; every second one expects what the model writes, the others nonsense."""
    tokens = [tokenizer.encode(prompt) for prompt in prompts]  # type: ignore[attr-defined]
    written = generate(model, tokens, max_new_tokens=3, stop_ids=[0])
    made = []
    for i, (prompt, completion) in enumerate(zip(prompts, written, strict=True)):
        text = tokenizer.decode(completion.tokens, True)  # type: ignore[attr-defined]
        answer = text if i % 2 == 0 else "nonsense"
        made.append(
            Example(
                index=i,
                messages=[
                    {"role": "user", "content": prompt},
                    {"role": "assistant", "content": answer},
                ],
                prompt_tokens=tokens[i],
                completion_tokens=[*completion.tokens, 0],
                row={"answer": answer},
            )
        )
    return made


@pytest.fixture
def examples(model: Decoder, tokenizer: object) -> list[Example]:
    return make_examples(model, tokenizer, ["a1", "b22", "c", "d4", "e55"])


def plain_sums(model: Decoder, rows: Sequence[Row]) -> tuple[float, float, int]:
    """Mean nll, token accuracy and count, row by row in NumPy from the logits."""
    nll, correct, count = 0.0, 0, 0
    for row in rows:
        batch = {key: jnp.asarray(value)[None] for key, value in row.items()}
        hidden = model(batch["tokens"], batch["positions"], batch["segment_ids"])
        logits = np.asarray(model.logits(hidden), np.float64)[0]
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        for t in np.flatnonzero(row["mask"]):
            nll -= log_p[t, row["labels"][t]]
            correct += int(log_p[t].argmax() == row["labels"][t])
            count += 1
    return nll / count, correct / count, count


@pytest.mark.parametrize("batch_size", [1, 2, 5, 64])
def test_the_likelihood_is_the_plain_mean_over_supervised_tokens(
    model: Decoder, tokenizer: object, rows: list[Row], batch_size: int
) -> None:
    config = dataclasses.replace(CONFIG, batch_size=batch_size)
    result = evaluate(model, tokenizer, rows=rows, examples=[], config=config)
    nll, accuracy, count = plain_sums(model, rows[:5])
    np.testing.assert_allclose(result.nll, nll, **F32)
    np.testing.assert_allclose(result.token_accuracy, accuracy, **F32)
    assert result.tokens == count
    assert result.accuracy is None
    assert result.accuracy_interval is None


def test_answers_are_counted_scored_and_shown(
    model: Decoder, tokenizer: object, rows: list[Row], examples: list[Example]
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
    model: Decoder, tokenizer: object, rows: list[Row], examples: list[Example]
) -> None:
    result = evaluate(model, tokenizer, rows=rows, examples=examples, config=CONFIG)
    assert result.questions == 0
    assert result.previews == ()
    assert "accuracy" not in result.metrics()


def test_progress_reaches_the_number_of_rows_and_questions(
    model: Decoder, tokenizer: object, rows: list[Row], examples: list[Example]
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


def test_rows_without_a_supervised_token_are_refused(
    model: Decoder, tokenizer: object, rows: list[Row]
) -> None:
    for row in rows:
        row["mask"][:] = False
    with pytest.raises(ValueError, match="the 5 held-out rows have no supervised token"):
        evaluate(model, tokenizer, rows=rows, examples=[], config=CONFIG)


def test_a_second_evaluation_compiles_nothing(
    model: Decoder, tokenizer: object, rows: list[Row]
) -> None:
    evaluate(model, tokenizer, rows=rows, examples=[], config=CONFIG)
    count = run_module._score_rows._cache_size()
    other = Decoder(model.config, rngs=nnx.Rngs(1))
    evaluate(other, tokenizer, rows=rows[::-1], examples=[], config=CONFIG)
    assert run_module._score_rows._cache_size() == count


@pytest.mark.parametrize(
    "sizes",
    [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 2}, {"tensor": 4}],
    ids=str,
)
def test_a_model_on_several_devices_scores_the_same(
    sizes: dict[str, int],
    model: Decoder,
    tokenizer: object,
    rows: list[Row],
    examples: list[Example],
) -> None:
    config = dataclasses.replace(CONFIG, task="exact")
    expected = evaluate(model, tokenizer, rows=rows, examples=examples, config=config)
    result = evaluate(spread(model, sizes), tokenizer, rows=rows, examples=examples, config=config)
    np.testing.assert_allclose(result.nll, expected.nll, **F32)
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
    rows = {key: np.ones((16, 12), np.int32) for key in run_module.ROW_KEYS}
    prompts = np.ones((16, 8), np.int32)
    keys = jax.random.split(jax.random.key(0), 16)

    def flops(model: Decoder) -> list[float]:
        """Those of one device, for the rows and for the questions."""
        parts = nnx.split(model)
        programs = [
            run_module._score_rows.lower(*parts, rows),
            sampler._decode.lower(
                *parts,
                prompts,
                np.full(16, 8, np.int32),
                np.zeros(1, np.int32),
                keys,
                np.float32(0),
                max_new_tokens=4,
                greedy=True,
            ),
        ]
        return [float(program.compile().cost_analysis()["flops"]) for program in programs]

    for whole, part in zip(flops(model), flops(spread(model, {"fsdp": 8})), strict=True):
        assert part < whole / 6


def test_turns_end_at_the_end_of_sequence_and_at_known_markers(tokenizer: object) -> None:
    assert stop_ids(tokenizer) == [0]  # type: ignore[arg-type]

    class Llama:
        eos_token_id = None
        chat_template = None

        def get_added_vocab(self) -> dict[str, int]:
            return {"<|eot_id|>": 9, "<|end_of_text|>": 7, "<|start_header_id|>": 3}

    assert stop_ids(Llama()) == [7, 9]  # type: ignore[arg-type]


def test_the_token_that_ends_a_turn_in_the_template_ends_a_completion_and_is_exported(
    model: Decoder, rows: list[Row], tmp_path: pathlib.Path
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

    turns = [{"role": "user", "content": "?"}]
    example = Example(0, turns, prompt, [5, end], row={"answer": f"w{completion.tokens[0]}"})
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


@pytest.mark.parametrize(("correct", "total"), [(0, 10), (10, 10), (3, 7), (100, 256)])
def test_the_interval_is_where_the_score_test_turns(correct: int, total: int) -> None:
    share = correct / total
    for bound in wilson_interval(correct, total):
        variance = bound * (1 - bound) / total
        assert (share - bound) ** 2 == pytest.approx(1.959964**2 * variance, abs=1e-12)


@pytest.mark.parametrize(("correct", "total"), [(-1, 5), (6, 5), (0, 0)])
def test_an_impossible_share_is_refused(correct: int, total: int) -> None:
    with pytest.raises(ValueError, match="expected 0 <= correct <= total"):
        wilson_interval(correct, total)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "sums"}, r"eval\.task: expected one of chain_sum"),
        ({"rows": 0}, r"eval\.rows: expected at least 1, got 0"),
        ({"every_steps": -1}, r"eval\.every_steps: expected at least 0, got -1"),
    ],
)
def test_impossible_settings_are_the_users_mistake(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        EvalConfig(**options)


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    # Sparse, and large enough to count as weights.
    with (folder / "model.safetensors").open("wb") as file:
        file.truncate(1 << 25)
    return folder


def test_a_cached_evaluation_is_found_again(
    model: Decoder,
    tokenizer: object,
    rows: list[Row],
    examples: list[Example],
    folder: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = {
        "rows": rows,
        "examples": examples,
        "config": dataclasses.replace(CONFIG, task="exact"),
        "model_folder": folder,
        "cache_dir": tmp_path / "cache",
    }
    first, was_cached = cached_evaluation(model, tokenizer, **options)
    assert not was_cached
    [path] = (tmp_path / "cache" / "evaluations").iterdir()

    with monkeypatch.context() as patch:
        patch.setattr(cache, "evaluate", lambda *_, **__: pytest.fail("evaluated twice"))
        assert cached_evaluation(model, tokenizer, **options) == (first, True)

    path.write_text(path.read_text()[:40])
    again, was_cached = cached_evaluation(model, tokenizer, **options)
    assert not was_cached
    assert dataclasses.replace(again, seconds=0) == dataclasses.replace(first, seconds=0)
    assert EvalResult.from_json(json.loads(path.read_text())) == again


@pytest.mark.parametrize("found", [True, False])
def test_of_several_processes_the_first_decides_for_all_and_alone_keeps(
    found: bool,
    model: Decoder,
    tokenizer: object,
    rows: list[Row],
    folder: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept = EvalResult(nll=1.5, token_accuracy=0.5, tokens=8)
    made = dataclasses.replace(kept, nll=2.5)
    text = json.dumps(kept.to_json()).encode() if found else b""
    said = iter([np.int32(len(text)), np.frombuffer(text, np.uint8)])

    def broadcast(mine: np.ndarray) -> np.ndarray:
        value = next(said)
        assert np.shape(mine) == value.shape  # Else the processes wait for each other forever.
        return value

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(cache.multihost_utils, "broadcast_one_to_all", broadcast)
    monkeypatch.setattr(cache, "evaluate", lambda *_, **__: made)
    options = {"rows": rows, "examples": [], "config": CONFIG}
    result = cached_evaluation(
        model, tokenizer, **options, model_folder=folder, cache_dir=tmp_path / "cache"
    )
    assert result == ((kept, True) if found else (made, False))
    assert not (tmp_path / "cache").exists()


def test_a_fingerprint_changes_with_all_that_is_looked_at_and_nothing_else(
    model: Decoder,
    tokenizer: object,
    rows: list[Row],
    examples: list[Example],
    folder: pathlib.Path,
) -> None:
    config = dataclasses.replace(CONFIG, task="exact")
    precision = "float32"

    def name() -> str:
        return fingerprint(folder, precision=precision, rows=rows, examples=examples, config=config)

    base = name()
    assert name() == base
    rows[6]["tokens"][0] += 1  # Beyond config.rows.
    config = dataclasses.replace(config, every_steps=7)
    assert name() == base

    seen = [base]
    rows[4]["mask"][0] ^= True
    seen.append(name())
    examples[3].row["answer"] = "other"
    seen.append(name())
    config = dataclasses.replace(config, max_new_tokens=4)
    seen.append(name())
    precision = "bfloat16"
    seen.append(name())
    (folder / "config.json").write_text("[]")
    seen.append(name())
    os.utime(folder / "model.safetensors", (1, 1))
    seen.append(name())
    assert len(set(seen)) == len(seen)


def test_a_fingerprint_changes_with_the_code_the_libraries_and_the_device(
    rows: list[Row], folder: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def name() -> str:
        return fingerprint(folder, precision="float32", rows=rows, examples=[], config=CONFIG)

    def copy(to: str) -> pathlib.Path:
        return pathlib.Path(shutil.copytree(cache.PACKAGE, tmp_path / to))

    base = name()
    monkeypatch.setattr(cache, "PACKAGE", copy("the same"))
    assert name() == base

    seen = [base]
    for room in ("losses", "models", "data", "evals"):
        changed = copy(room)
        with sorted((changed / room).glob("*.py"))[-1].open("a") as file:
            file.write("# Other code.")
        monkeypatch.setattr(cache, "PACKAGE", changed)
        seen.append(name())
    monkeypatch.setattr(jax, "devices", lambda: [Device()])
    seen.append(name())
    monkeypatch.setattr(cache, "_versions", lambda: {"jax": "9.9.9"})
    seen.append(name())
    assert len(set(seen)) == len(seen)


class Device:
    device_kind = "another device"


def test_a_package_that_is_not_installed_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {"jax", "jaxlib", "transformers"} <= cache._versions().keys()
    monkeypatch.setattr(cache, "LIBRARIES", ("jax", "no such library"))
    assert cache._versions() == {"jax": jax.__version__}
