"""The memory of adapters' steps on a GPU, compiled without one, against arithmetic."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import pathlib

import pytest

from ranktuner_jax import losses, models
from ranktuner_jax.models import partition
from ranktuner_jax.plan import make_plan
from ranktuner_jax.train import load_config

# What config.json says of them.
_COMMON = {
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "eos_token_id": 151643,
}
_MODELS = {
    "Qwen2.5-7B": _COMMON
    | {
        "model_type": "qwen2",
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
    },
    "Qwen3-8B": _COMMON
    | {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
}
_BYTES = {"bfloat16": 2, "int8": 1 + 4 / 64, "nf4": 1 / 2 + 4 / 64}
_LENGTH = 2048


def expected_gb(config: models.DecoderConfig, lora: models.Lora, base: str) -> dict[str, float]:
    """What the step of one row needs, by kind."""
    sizes = {name: math.prod(axes.values()) for name, axes in partition.param_axes(config).items()}
    matrices = sum(sizes[name] for name in partition.PROJECTIONS)
    adapters = sum(map(math.prod, models.adapter_shapes(config, lora).values()))
    shape = _LENGTH, config.hidden_size, config.padded_vocab_size
    chunk = losses.default_chunk_size(*shape, backend="gpu")
    # A layer's products in float32 and bfloat16, forward and backward, and matrices in bfloat16.
    wide = config.intermediate_size
    layer = _LENGTH * wide * (2 * 4 + 4 * 2) + 2 * 2 * wide * config.hidden_size
    logits = chunk * config.padded_vocab_size * (4 + 2)
    kinds = {
        "frozen": matrices * _BYTES[base] + 2 * (sum(sizes.values()) - matrices),
        "adapters, two moments and gradients": 4 * 4 * adapters,
        "inputs of the layers": config.num_layers * _LENGTH * config.hidden_size * 2,
        "a chunk of logits, or a layer": max(logits, layer),
    }
    return {name: size / 1e9 for name, size in kinds.items()}


@pytest.mark.drill
@pytest.mark.skipif(
    importlib.util.find_spec("jax_plugins.xla_cuda12") is None
    if importlib.util.find_spec("jax_plugins")
    else True,
    reason="needs JAX's CUDA plugin (pip install 'ranktuner-jax[cuda]'; no GPU)",
)
@pytest.mark.parametrize("base", _BYTES)
@pytest.mark.parametrize("model", _MODELS)
def test_a_step_on_an_h100_needs_what_arithmetic_says(
    model: str, base: str, tmp_path: pathlib.Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(_MODELS[model]))
    keys = {"model": tmp_path, "lora.base": base, "data.row_length": _LENGTH}
    config = load_config("qwen3_8b_qlora", [f"--config.{key}={keys[key]}" for key in keys])
    plan = make_plan(config, "h100")
    assert config.lora.new_adapters is not None
    shape = dataclasses.replace(models.read_config(tmp_path), vocab_multiple=1)
    expected = expected_gb(shape, config.lora.new_adapters, base)
    found = plan.memory_gb
    print(
        f"\n| {model} | {base} |",
        " | ".join(f"{gb:.2f}" for gb in (*expected.values(), sum(expected.values()))),
        f"| {found['total']:.2f} |",
    )
    assert found["total"] <= {"bfloat16": 24, "int8": 16, "nf4": 12}[base]
    assert abs(found["total"] - sum(expected.values())) < 2
    assert found["activations"] < 1  # No stack of matrices, dequantised, beside the layers' inputs.
