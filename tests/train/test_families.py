"""Training from a user's own checkpoint: every family, with and without a chat template."""

import json
import pathlib
import shutil
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from transformers import AutoConfig, AutoTokenizer, BatchEncoding, GenerationConfig

from ranktuner_jax import cli, data
from ranktuner_jax.train import read_config
from tests.tolerances import MEAN_NLL

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 1e4,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
    "mistral": {"sliding_window": 8},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 12},
    "gemma3_text": {
        "head_dim": 12,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 8.0},
        },
    },
    "olmo2": {},
    "smollm3": {"no_rope_layers": [1, 0]},
}
QUESTION = [{"role": "user", "content": "1+2"}]


def train(config: pathlib.Path, workdir: pathlib.Path, *overrides: str) -> int:
    keys = [f"--config.{override}" for override in overrides]
    return cli.main(["train", f"--config={config}", f"--workdir={workdir}", *keys])


@pytest.fixture(params=FAMILIES)
def own_folder(
    request: pytest.FixtureRequest, tiny_model: pathlib.Path, tmp_path: pathlib.Path
) -> pathlib.Path:
    """A checkpoint as transformers writes it: random, with nothing at its initial 0 or 1."""
    import torch
    from transformers import AutoModelForCausalLM

    config = AutoConfig.for_model(
        request.param,
        vocab_size=259,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
        **FAMILIES[request.param],
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.15)
    folder = tmp_path / request.param
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


def mean_nll_of_transformers(folder: pathlib.Path, rows: data.Rows) -> float:
    """The same held-out conversations, each alone and not in a row with others."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    losses = []
    for row in map(rows.__getitem__, range(len(rows))):
        for segment in range(1, row.segment_ids.max() + 1):
            here = row.segment_ids == segment
            tokens, labels, mask = row.tokens[here], row.labels[here], row.mask[here]
            with torch.no_grad():
                logits = model(torch.tensor(tokens[None]).long()).logits[0]
            nll = torch.nn.functional.cross_entropy(
                logits, torch.tensor(labels).long(), reduction="none"
            )
            losses.append(nll.numpy()[mask])
    return float(np.concatenate(losses).mean(dtype=np.float64))


@pytest.mark.parity
def test_a_model_trained_from_a_folder_is_the_same_in_transformers(
    own_folder: pathlib.Path, tiny_config_file: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    workdir = tmp_path / "run"
    short = ("train.steps=2", "eval.task=", "eval.rows=64")
    assert train(tiny_config_file, workdir, f"model={own_folder}", *short) == 0

    result = json.loads((workdir / "result.json").read_text())
    exported = workdir / "model"
    rows = data.load_rows(
        read_config(workdir).data, data.load_tokenizer(exported), split="test", seed=0
    )
    assert rows.summary.tokens < rows.summary.rows * rows.row_length
    for when, folder in (("before", own_folder), ("after", exported)):
        theirs = mean_nll_of_transformers(folder, rows)
        np.testing.assert_allclose(result[when]["nll"], theirs, **MEAN_NLL)

    before, after = (load_file(f / "model.safetensors") for f in (own_folder, exported))
    assert before.keys() == after.keys()
    # Attention does not depend on key biases, so their gradient is rounding; all else was trained.
    unchanged = [name for name in before if np.array_equal(before[name], after[name])]
    assert all(name.endswith("k_proj.bias") for name in unchanged)
    options = json.loads((exported / "config.json").read_text())
    for name in FAMILIES[own_folder.name]:
        assert options[name] == json.loads((own_folder / "config.json").read_text())[name]


# --- a base model ---


@pytest.fixture(scope="module")
def base_model(tiny_model: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("base") / "model"
    shutil.copytree(tiny_model, folder)
    (folder / "chat_template.jinja").unlink()
    return folder


@pytest.fixture(scope="module")
def plain_run(
    base_model: pathlib.Path,
    tiny_config_file: pathlib.Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> pathlib.Path:
    """A base model that has learnt to answer every question with 7, and to stop there."""
    folder = tmp_path_factory.mktemp("plain")
    lines = [{"prompt": f"{i}+0", "completion": "7", "answer": "7"} for i in range(16)]
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    overrides = (f"model={base_model}", f"data.source={folder}/{{split}}.jsonl")
    learn = ("data.packing=False", "train.steps=40", "data.chat_template=plain")
    assert train(tiny_config_file, folder / "run", *overrides, *learn) == 0
    return folder / "run"


def test_a_base_model_without_a_template_is_an_error_that_names_the_key_to_set(
    base_model: pathlib.Path,
    tiny_config_file: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert train(tiny_config_file, tmp_path / "run", f"model={base_model}") == 2
    said = capsys.readouterr().err
    assert "has no chat template; set data.chat_template to plain" in said
    assert said.count("\n") == 1


def test_generation_stops_where_the_plain_template_ends_the_answer(
    plain_run: pathlib.Path,
) -> None:
    after = json.loads((plain_run / "result.json").read_text())["after"]
    assert after["questions"] == after["correct"] == after["finished"] == 8
    stops = GenerationConfig.from_pretrained(plain_run / "model").eos_token_id
    assert AutoTokenizer.from_pretrained(plain_run / "model").eos_token_id in stops


def test_the_export_contains_the_template_of_the_config(
    plain_run: pathlib.Path, base_model: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    exported = plain_run / "model"
    tokenizer = AutoTokenizer.from_pretrained(exported)
    prompt = tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    assert prompt == "User:\n1+2\n\nAssistant:\n"
    again = tmp_path / "again"
    assert cli.main(["export", f"--workdir={plain_run}", f"--output={again}"]) == 0
    for file in exported.iterdir():
        assert (again / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parity
def test_transformers_generates_what_was_learnt_and_stops(plain_run: pathlib.Path) -> None:
    from transformers import AutoModelForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(plain_run / "model")
    model = AutoModelForCausalLM.from_pretrained(plain_run / "model")
    prompt = tokenizer.apply_chat_template(
        QUESTION, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    assert isinstance(prompt, BatchEncoding)
    written = model.generate(**prompt, max_new_tokens=8)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(written) == "7" + tokenizer.eos_token


def test_eval_and_inspect_use_the_template_of_the_config(
    base_model: pathlib.Path,
    tiny_config_file: pathlib.Path,
    sums: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = [f"--config={tiny_config_file}", f"--model={base_model}", "--config.eval.task="]
    assert cli.main(["eval", *arguments, "--config.data.chat_template=plain"]) == 0
    assert "token accuracy" in capsys.readouterr().out
    keys = (f"model={base_model}", f"data.source={sums}", "data.chat_template=plain")
    assert cli.main(["data", "inspect", "--rows=1", *(f"--config.{key}" for key in keys)]) == 0
    assert "Assistant:\n⟦" in capsys.readouterr().out


def test_a_template_of_the_config_overrides_the_tokenizers_own(
    tiny_model: pathlib.Path,
    tiny_config_file: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    template = tmp_path / "mine.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.role + '=' + m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant={% endif %}"
    )
    workdir = tmp_path / "run"
    short = ("train.steps=1", "eval.task=", f"data.chat_template={template}")
    assert train(tiny_config_file, workdir, *short) == 0
    assert f"chat template: {template}, not the tokenizer's own" in capsys.readouterr().err
    assert (workdir / "model" / "chat_template.jinja").read_text() == template.read_text()
