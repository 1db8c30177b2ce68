"""The benchmark of plans takes the steps that it plans, and says which leave their range."""

import json
import pathlib

import pytest

from ranktuner_jax import cli

SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}


def test_steps_of_a_model_without_weights_are_measured_beside_their_plans(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SHAPE), encoding="utf-8")
    keys = [f"--config.model={tmp_path}", "--config.data.row_length=32"]
    code = cli.main(["bench", "plan", *keys, "--repeats=3", "--json"])
    shown = capsys.readouterr()
    records = json.loads(shown.out)
    assert [one["case"] for one in records] == [
        "2 rows of 32, bfloat16, remat full, 1 micro-batch",
        "4 rows of 32, float32, remat none, 1 micro-batch",
        "2 rows of 32, float32, remat dots, 2 micro-batches",
    ]
    for one in records:
        low, median, high = (one["figures"][f"{n}_s"] for n in ("shortest", "median", "longest"))
        taken = [float(line.split()[-2]) for line in shown.err.splitlines() if one["case"] in line]
        assert len(taken) == 3
        assert median == pytest.approx(sorted(taken)[1], rel=0.01)
        assert 0 < low < high <= 1.6 * low
        assert bool(one["failed"]) == (not low <= median <= high)
    assert code == int(any(one["failed"] for one in records))


def test_no_repeat_is_a_user_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "plan", "--repeats=0"]) == 2
    assert "--repeats: expected at least 1, got 0" in capsys.readouterr().err
