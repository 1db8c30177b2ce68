"""Gemma 3: what its configs on the hub say, its rounding, its windows, its multimodal folders."""

import dataclasses
import json
import logging
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig

from ranktuner_jax import models
from ranktuner_jax.errors import UserError
from tests.models import tiny
from tests.tolerances import HF_LOGITS

# What is on the hub beside the shape: transformers has had other keys since.
HUB = {
    "model_type": "gemma3_text",
    "rope_theta": 1_000_000,
    "rope_local_base_freq": 10_000,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "query_pre_attn_scalar": 168,
    "num_hidden_layers": 13,
}


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "model"
    path.mkdir()
    tiny.write_checkpoint("gemma3", path)
    return path


def make_multimodal(folder: pathlib.Path) -> None:
    """Makes the folder's model the text model of a multimodal one."""
    text = json.loads((folder / "config.json").read_text())
    outer = AutoConfig.for_model("gemma3", text_config=text, vision_config={"hidden_size": 8})
    outer.save_pretrained(folder)
    tensors = {
        f"language_model.{name}": value
        for name, value in load_file(folder / "model.safetensors").items()
    }
    for name in ("vision_tower.embeddings.weight", "multi_modal_projector.mm_soft_emb_norm.weight"):
        tensors[name] = np.zeros(3, np.float32)
    save_file(tensors, folder / "model.safetensors")


def test_configs_on_the_hub_give_each_layer_its_window_and_rotary_embedding(
    tmp_path: pathlib.Path,
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(HUB))
    config = models.read_config(tmp_path)
    everywhere = models.RopeConfig("linear", 1e6, (("factor", 8.0),))
    local = models.RopeConfig("default", 1e4)
    period: list[tuple[int | None, models.RopeConfig]] = [(512, local)] * 5 + [(None, everywhere)]
    assert list(zip(config.windows, config.ropes, strict=True)) == [*period, *period, (512, local)]
    assert config.attention_scale == 168**-0.5
    assert config.activation == "gelu_pytorch_tanh"
    again = models.DecoderConfig.from_hf(config.to_hf())
    assert again == config


@pytest.mark.parametrize(
    "change",
    [
        {"final_logit_softcapping": 30.0},
        {"attn_logit_softcapping": 50.0},
        {"use_bidirectional_attention": True},
    ],
)
def test_options_that_would_change_the_arithmetic_are_refused(
    change: dict[str, Any], folder: pathlib.Path
) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=f"gemma3_text: {next(iter(change))} is not supported"):
        models.load_pretrained(folder)


def test_the_text_model_of_a_multimodal_folder_is_read_alone_and_says_so(
    folder: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    golden = models.load_pretrained(folder)
    assert not caplog.records
    make_multimodal(folder)
    with caplog.at_level(logging.WARNING):
        model = models.load_pretrained(folder)
    assert "multi_modal_projector, vision_tower left aside" in caplog.text
    assert model.config == golden.config
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), nnx.state(golden))
    models.save_pretrained(model, folder.parent / "out")
    written = json.loads((folder.parent / "out" / "config.json").read_text())
    assert (written["model_type"], written["architectures"]) == (
        "gemma3_text",
        ["Gemma3ForCausalLM"],
    )
    assert not any(
        name.startswith("language_model")
        for name in load_file(folder.parent / "out" / "model.safetensors")
    )


def test_embeddings_are_scaled_by_a_root_that_is_rounded_first() -> None:
    config = models.DecoderConfig(
        family="gemma3_text",
        vocab_size=31,
        hidden_size=3072,
        num_layers=0,
        scale_embeddings=True,
        norm_eps=1e6,  # Far above the squares: the norm then is a constant factor, 1e-3.
    )
    model = models.Decoder(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    hidden = np.asarray(model(jnp.asarray(tiny.TOKENS)), np.float32)
    embeddings = np.asarray(model.embed[...].astype(jnp.bfloat16))[tiny.TOKENS]
    # 55.4256 is 55.5 in bfloat16, whose product is rounded again.
    scaled = (embeddings * jnp.bfloat16(55.5)).astype(np.float32)
    np.testing.assert_array_equal(hidden, (scaled / 1e3).astype(jnp.bfloat16).astype(np.float32))


def test_norms_scale_by_one_more_than_their_parameters_before_rounding() -> None:
    config = models.DecoderConfig(
        num_layers=0, vocab_size=31, norm_offset=1.0, norm_rounds_last=True
    )
    model = models.Decoder(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    assert not np.asarray(model.final_norm[...]).any()
    param = jax.random.normal(jax.random.key(1), (config.hidden_size,))
    model.final_norm.set_value(param)
    x = np.asarray(model.embed[...].astype(jnp.bfloat16), np.float64)[tiny.TOKENS]
    exact = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + config.norm_eps)
    exact *= 1 + np.asarray(param, np.float64)
    same = np.asarray(model(jnp.asarray(tiny.TOKENS))) == exact.astype(jnp.bfloat16)
    assert same.mean() > 0.99


def test_a_cache_gives_the_same_across_the_edge_of_a_window(folder: pathlib.Path) -> None:
    model = models.load_pretrained(folder)
    assert model.config.windows.count(4) == 6
    whole = model(jnp.asarray(tiny.TOKENS))
    step = nnx.jit(lambda model, tokens, cache: model(tokens, cache=cache))
    # The prompt ends within the first window; what follows lies across its edge, and beyond it.
    hidden, cache = step(model, tiny.TOKENS[:, :3], model.init_cache(2, 12))
    got = [hidden]
    for i in range(3, 12):
        hidden, cache = step(model, tiny.TOKENS[:, i : i + 1], cache)
        got.append(hidden)
    # As near as another program comes: seven layers whose norms double what they are given.
    np.testing.assert_allclose(np.concatenate(got, axis=1), whole, **HF_LOGITS)
    endless = dataclasses.replace(model.config, windows=())
    graph, _ = nnx.split(nnx.eval_shape(lambda: models.Decoder(endless, rngs=nnx.Rngs(0))))
    unlike = nnx.merge(graph, nnx.state(model))(jnp.asarray(tiny.TOKENS))
    np.testing.assert_allclose(unlike[:, :4], whole[:, :4], **HF_LOGITS)
    assert np.abs(unlike[:, 4:] - whole[:, 4:]).max() > 0.1


@pytest.mark.parity
def test_the_text_model_of_transformers_multimodal_one_agrees(tmp_path: pathlib.Path) -> None:
    import torch
    import transformers

    text = tiny.hf_config("gemma3").to_dict()
    sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers")
    vision = {**dict.fromkeys(sizes, 2), "image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=30
    )
    torch.manual_seed(0)
    theirs = transformers.Gemma3ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    theirs.save_pretrained(tmp_path / "theirs")
    tokens = np.minimum(tiny.TOKENS, 29)  # No image.
    ours = models.load_pretrained(tmp_path / "theirs")
    logits = np.asarray(ours.logits(ours(jnp.asarray(tokens))))
    models.save_pretrained(ours, tmp_path / "ours")
    alone = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    for model in (theirs, alone):
        with torch.no_grad():
            expected = model(torch.tensor(tokens).long()).logits.numpy()
        np.testing.assert_allclose(logits, expected, **HF_LOGITS)
