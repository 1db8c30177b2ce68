"""Every family against transformers: frozen logits for everyone, live ones with torch."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from flax import nnx
from safetensors.numpy import load_file
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ranktuner_jax import models
from tests.models import tiny
from tests.tolerances import HF_LOGITS

GOLDEN = pathlib.Path(__file__).parent / "golden"


def _logits(model: models.Decoder) -> np.ndarray:
    return np.asarray(nnx.jit(lambda m, t: m.logits(m(t)))(model, tiny.TOKENS))


@pytest.mark.parametrize("case", tiny.CASES)
def test_logits_match_the_frozen_ones_of_transformers(case: str, tmp_path: pathlib.Path) -> None:
    tiny.write_checkpoint(case, tmp_path)
    golden = np.load(GOLDEN / f"{case}.npz")["logits"]
    assert golden.std() > 0.1  # and tells positions apart:
    assert np.ptp(golden.argmax(-1)) > 0
    np.testing.assert_allclose(_logits(models.load_pretrained(tmp_path)), golden, **HF_LOGITS)


@pytest.mark.parametrize("case", tiny.CASES)
def test_saving_and_loading_gives_the_same_folder(case: str, tmp_path: pathlib.Path) -> None:
    config = tiny.write_checkpoint(case, tmp_path)
    model = models.load_pretrained(tmp_path)
    models.save_pretrained(model, tmp_path / "saved", max_shard_bytes=6000)
    again = models.load_pretrained(tmp_path / "saved")
    assert again.config == config
    written: dict[str, np.ndarray] = {}
    files = sorted((tmp_path / "saved").glob("*.safetensors"))
    assert len(files) > 2
    for file in files:
        assert sum(x.nbytes for x in load_file(file).values()) <= 6000
        written |= load_file(file)
    original = load_file(tmp_path / "model.safetensors")
    assert written.keys() == original.keys()
    for name, value in original.items():
        np.testing.assert_array_equal(written[name], value)


@pytest.mark.parametrize("name", models.FAMILIES)
def test_a_family_is_the_one_that_transformers_has_under_its_name(name: str) -> None:
    theirs = transformers.AutoConfig.for_model(name)
    config = models.DecoderConfig.from_hf(theirs)
    assert config.family == name
    written = config.to_hf()
    assert type(written) is type(theirs)
    assert written.architectures == [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name]]
    assert models.DecoderConfig.from_hf(written) == config


def test_every_family_has_a_tiny_checkpoint() -> None:
    assert {model_type for model_type, _ in tiny.CASES.values()} == set(models.FAMILIES)


def test_what_a_family_has_not_is_neither_read_nor_written() -> None:
    # As in transformers, whose Mistral has no biases and whose Llama no window.
    options = {"attention_bias": True, "mlp_bias": True, "sliding_window": 4}

    def read(name: str) -> models.DecoderConfig:
        return models.DecoderConfig.from_hf(transformers.AutoConfig.for_model(name, **options))

    llama, mistral = read("llama"), read("mistral")
    assert (llama.qkv_bias, llama.output_bias, llama.mlp_bias, llama.windows) == (True,) * 3 + ((),)
    assert (mistral.qkv_bias, mistral.output_bias, mistral.mlp_bias) == (False,) * 3
    assert mistral.windows == (4,) * mistral.num_layers
    assert "sliding_window" not in llama.to_hf().to_dict()
    assert "attention_bias" not in mistral.to_hf().to_dict()


def test_turn_ends_are_those_of_all_families_each_once() -> None:
    assert models.turn_ends() == (
        "<|im_end|>",
        "<|eot_id|>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "</s>",
        "<end_of_turn>",
        "<eos>",
    )
    for family in models.FAMILIES.values():
        assert set(family.turn_ends) <= set(models.turn_ends())


@pytest.mark.parity
@pytest.mark.parametrize("case", tiny.CASES)
def test_transformers_agrees_in_both_directions(case: str, tmp_path: pathlib.Path) -> None:
    from tests.models.make_golden import torch_logits

    config = tiny.write_checkpoint(case, tmp_path)
    theirs = torch_logits(tmp_path)
    np.testing.assert_allclose(_logits(models.load_pretrained(tmp_path)), theirs, **HF_LOGITS)
    # A model of ours, which transformers has not seen.
    ours = models.Decoder(config, rngs=nnx.Rngs(3))
    for i, (_, parameter) in enumerate(nnx.to_flat_state(nnx.state(ours, nnx.Param))):
        noise = jax.random.normal(jax.random.key(i), parameter.shape)
        parameter.set_value(parameter.get_value() + 0.2 * noise)
    models.save_pretrained(ours, tmp_path / "ours", max_shard_bytes=6000)
    np.testing.assert_allclose(torch_logits(tmp_path / "ours"), _logits(ours), **HF_LOGITS)


@pytest.mark.parametrize("case", ["llama3", "qwen2", "olmo2"])
def test_bfloat16_stays_near_float32(case: str, tmp_path: pathlib.Path) -> None:
    tiny.write_checkpoint(case, tmp_path)
    model = models.load_pretrained(tmp_path, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    hidden = model(jnp.asarray(tiny.TOKENS))
    assert hidden.dtype == jnp.bfloat16
    assert model.logits(hidden).dtype == jnp.float32
    golden = np.load(GOLDEN / f"{case}.npz")["logits"]
    error = np.abs(np.asarray(model.logits(hidden)) - golden)
    # Three layers of roundings of 2^-9, logits of size 1.
    assert error.mean() < 0.02
    assert error.max() < 0.2
