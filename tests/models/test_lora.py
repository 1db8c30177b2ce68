"""Adapters: what they compute, their gradients, and PEFT's folders in and out."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from ranktuner_jax import evals, losses, models
from ranktuner_jax.errors import UserError
from ranktuner_jax.models.lora import drop_inputs
from ranktuner_jax.models.partition import PROJECTIONS, TARGETS
from tests.models import tiny
from tests.tolerances import BF16, F32, HF_LOGITS, LOSS_GRADIENT

TOKENS = jnp.asarray(tiny.TOKENS)
# As small as an oracle of loops and differences likes it: one layer, heads that share keys.
SMALL = models.DecoderConfig(
    vocab_size=13,
    hidden_size=8,
    intermediate_size=12,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    initializer_range=0.4,
)


def randomise(model: models.Decoder) -> None:
    """Gives the B of every adapter, which are zero at first, values from a seed."""
    for i, (path, factor) in enumerate(nnx.to_flat_state(nnx.state(model, nnx.Param))):
        if str(path[-1]).endswith("_lora_b"):
            factor.set_value(0.2 * jax.random.normal(jax.random.key(i), factor.shape, factor.dtype))


def adapted(model: models.Decoder, lora: models.Lora, **options: Any) -> models.Decoder:
    """The model, with adapters that change it."""
    models.add_adapters(model, lora, rngs=nnx.Rngs(5), **options)
    randomise(model)
    return model


def logits(model: models.Decoder) -> np.ndarray:
    # As one program, which compiles sooner than each operation.
    return np.asarray(jax.jit(lambda tokens: model.logits(model(tokens)))(TOKENS))


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    tiny.write_checkpoint("qwen2", tmp_path / "base")
    return tmp_path / "base"


def test_new_adapters_change_no_bit_and_leave_everything_else_frozen(folder: pathlib.Path) -> None:
    model = models.load_pretrained(folder)
    before = logits(model)
    models.add_adapters(model, models.Lora(rank=4, alpha=8.0, targets=TARGETS), rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(logits(model), before)
    factors = nnx.to_flat_state(nnx.state(model, nnx.Param))
    assert len(factors) == 18
    for path, value in factors:
        if path[-1] == "embed_lora_a":  # As PEFT begins: normal,
            assert 0.7 < value[...].std() < 1.3
        elif str(path[-1]).endswith("_lora_a"):  # and uniform within ±1/√inputs.
            stack = "layers" in path
            limit = np.prod(value.shape[1 + stack :]) ** -0.5
            assert 0.9 * limit < np.abs(value[...]).max() <= limit
    with pytest.raises(ValueError, match="must not have adapters yet"):
        models.add_adapters(model, models.Lora(rank=2, alpha=8.0), rngs=nnx.Rngs(0))


@pytest.mark.parametrize("case", ["llama3", "gemma3"])
def test_a_merged_model_computes_the_same(case: str, tmp_path: pathlib.Path) -> None:
    tiny.write_checkpoint(case, tmp_path)
    model = models.load_pretrained(tmp_path)
    before = logits(model)
    targets = ("q_proj", "v", "o", "down", "embed_tokens", "lm_head")
    adapted(model, models.Lora(rank=4, alpha=8.0, targets=targets))
    changed = logits(model)
    assert np.abs(changed - before).max() > 0.1
    models.merge_adapters(model)
    np.testing.assert_allclose(logits(model), changed, **HF_LOGITS)
    assert not model.config.tie_embeddings  # Gemma 3's are tied before.
    assert not jax.tree.leaves(nnx.state(model, models.Frozen))
    with pytest.raises(ValueError, match="must have adapters: got none"):
        models.merge_adapters(model)


def test_the_sampler_writes_what_the_merged_model_writes(folder: pathlib.Path) -> None:
    lora = models.Lora(rank=4, alpha=8.0, targets=TARGETS)
    model = adapted(models.load_pretrained(folder), lora)
    prompts = [[3, 4, 5], [7, 8]]

    def written(model: models.Decoder) -> list[list[int]]:
        completions = evals.generate(model, prompts, max_new_tokens=6, stop_ids=[])
        return [list(completion.tokens) for completion in completions]

    ours = written(model)
    models.merge_adapters(model)
    assert written(model) == ours


class Oracle:
    """A model of one layer in float64 NumPy: its loss as a function of its parameters."""

    def __init__(self, model: models.Decoder, tokens: np.ndarray, labels: np.ndarray) -> None:
        flat = nnx.to_flat_state(nnx.state(model))
        self.params = {str(path[-1]): np.asarray(v[...], np.float64) for path, v in flat}
        lora = model.layers.lora
        assert lora is not None
        self.config, self.lora, self.tokens, self.labels = model.config, lora, tokens, labels

    def matrix(self, name: str, outputs: int) -> np.ndarray:
        p, rank = self.params, self.lora.rank
        # Those of the only layer; and the head is the embeddings' matrix.
        matrix = p["embed" if name == "head" else name].reshape(outputs, -1)
        a, b = p[f"{name}_lora_a"].reshape(rank, -1), p[f"{name}_lora_b"].reshape(-1, rank)
        return matrix + self.lora.alpha / rank * b @ a

    def norm(self, x: np.ndarray, scale: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x**2).mean() + self.config.norm_eps) * scale

    def rotate(self, x: np.ndarray, position: int) -> np.ndarray:
        half = len(x) // 2
        angle = position * self.config.rope.rope_theta ** -(np.arange(half) / half)
        first, second = x[:half], x[half:]
        return np.concatenate(
            [
                first * np.cos(angle) - second * np.sin(angle),
                second * np.cos(angle) + first * np.sin(angle),
            ]
        )

    def loss(self) -> float:
        c, p = self.config, self.params
        heads, width, kv = c.num_heads, c.head_dim, c.num_kv_heads
        wq, wk, wv = (self.matrix(n, h * width) for n, h in (("q", heads), ("k", kv), ("v", kv)))
        wo, gate, up, down = (
            self.matrix(name, size)
            for name, size in (
                ("o", c.hidden_size),
                ("gate", c.intermediate_size),
                ("up", c.intermediate_size),
                ("down", c.hidden_size),
            )
        )
        embed, unembed = (self.matrix(name, c.vocab_size) for name in ("embed", "head"))
        total = 0.0
        for row, labels in zip(self.tokens, self.labels, strict=True):
            keys, values = [], []
            for position, (token, label) in enumerate(zip(row, labels, strict=True)):
                x = embed[token]
                y = self.norm(x, p["attention_norm"][0])
                keys.append([self.rotate(k, position) for k in (wk @ y).reshape(kv, width)])
                values.append((wv @ y).reshape(kv, width))
                mixed = []
                for head, q in enumerate((wq @ y).reshape(heads, width)):
                    shared = head // (heads // kv)
                    score = [self.rotate(q, position) @ k[shared] / width**0.5 for k in keys]
                    share = np.exp(score - np.max(score))
                    mixed.append(share / share.sum() @ np.array([v[shared] for v in values]))
                x = x + wo @ np.concatenate(mixed)
                y = self.norm(x, p["mlp_norm"][0])
                z = gate @ y
                x = x + down @ (z / (1 + np.exp(-z)) * (up @ y))
                scores = unembed @ self.norm(x, p["final_norm"])
                total += np.log(np.exp(scores - scores.max()).sum()) + scores.max() - scores[label]
        return total

    def gradient(self, name: str, step: float = 1e-5) -> np.ndarray:
        """Central differences, whose error is some 1e-10."""
        param = self.params[name]
        grad = np.zeros_like(param)
        for index in np.ndindex(param.shape):
            value, sides = param[index], []
            for side in (step, -step):
                param[index] = value + side
                sides.append(self.loss())
            param[index] = value
            grad[index] = (sides[0] - sides[1]) / (2 * step)
        return grad


def test_loss_and_gradients_agree_with_a_float64_oracle() -> None:
    model = models.Decoder(SMALL, rngs=nnx.Rngs(0), remat="full")
    adapted(model, models.Lora(rank=2, alpha=3.0, targets=TARGETS))
    rows = np.random.default_rng(0).integers(13, size=(2, 5))
    tokens, labels = rows[:, :-1], rows[:, 1:]
    graph, _ = nnx.split(model)
    params, base = nnx.state(model, nnx.Param, ...)

    def total(params: nnx.State) -> jax.Array:
        model = nnx.merge(graph, params, base)
        hidden = model(jnp.asarray(tokens))
        return losses.fused_weighted_nll(
            *model.unembedding(hidden), jnp.asarray(labels), weighting=losses.SFT()
        ).total

    loss, grads = jax.jit(jax.value_and_grad(total))(params)
    oracle = Oracle(model, tokens, labels)
    np.testing.assert_allclose(float(loss), oracle.loss(), **F32)
    found = {str(path[-1]): np.asarray(v[...]) for path, v in nnx.to_flat_state(grads)}
    assert len(found) == 18
    for name, ours in found.items():
        theirs = oracle.gradient(name)
        largest = np.abs(theirs).max()
        assert largest > 1e-3
        np.testing.assert_allclose(ours / largest, theirs / largest, **LOSS_GRADIENT, err_msg=name)


def test_dropout_leaves_out_inputs_of_adapters_by_step_row_layer_and_projection() -> None:
    config = dataclasses.replace(SMALL, num_layers=2)
    model = models.Decoder(config, rngs=nnx.Rngs(0))
    lora = models.Lora(rank=2, alpha=3.0, targets=(*PROJECTIONS, "head"), dropout=0.25)
    adapted(model, lora)
    tokens = jnp.array([[3, 4, 5, 6]] * 2)

    def hidden(step: int, rows: list[int]) -> np.ndarray:
        keys = models.dropout_keys(model, jnp.array(step), jnp.array(rows))
        return np.asarray(forward(tokens, keys))

    def head(step: int, rows: list[int]) -> np.ndarray:
        keys = models.dropout_keys(model, jnp.array(step), jnp.array(rows))
        return np.asarray(model.unembedding(jnp.ones((2, 4, SMALL.hidden_size)), keys)[0])

    forward = jax.jit(lambda tokens, keys: model(tokens, dropout=keys))
    first = hidden(0, [7, 8])
    np.testing.assert_array_equal(hidden(0, [8, 7]), first[::-1])
    for other in (first[1], hidden(1, [7, 8])[0], np.asarray(forward(tokens, None))[0]):
        assert np.abs(first[0] - other).max() > 1e-3
    first = head(0, [7, 8])
    np.testing.assert_array_equal(head(0, [8, 7]), first[::-1])
    for other in (first[1], head(1, [7, 8])[0]):
        assert np.abs(first[0] - other).max() > 1e-3
    np.testing.assert_array_equal(first[..., : SMALL.hidden_size], 1)  # Of the adapter's alone.
    # Each adapter sees its inputs on average: the same numbers would be dropped together.
    x = jnp.ones((1, 100, 200))
    keys = jax.random.split(jax.random.key(0), 1)
    dropped = [np.asarray(drop_inputs(x, 0.25, keys, name)) for name in "qkv"]
    for one in dropped:
        np.testing.assert_allclose(np.unique(one), [0, 4 / 3], rtol=1e-6)
        assert abs(one.mean() - 1) < 4 * (0.25 / 0.75 / x.size) ** 0.5
    for i in range(3):
        both = np.mean((dropped[i] == 0) & (dropped[i - 1] == 0))
        assert abs(both - 0.25**2) < 4 * (0.25**2 / x.size) ** 0.5
    model.layers.lora = models.Lora(rank=2, alpha=3.0)
    assert models.dropout_keys(model, jnp.array(0), jnp.array([7, 8])) is None


def test_the_frozen_model_may_be_bfloat16_below_float32_adapters(folder: pathlib.Path) -> None:
    lora = models.Lora(rank=4, alpha=8.0)
    wide = logits(adapted(models.load_pretrained(folder), lora))
    narrow = adapted(models.load_pretrained(folder, param_dtype=jnp.bfloat16), lora)
    types = {leaf.dtype for leaf in jax.tree.leaves(nnx.state(narrow, nnx.Param))}
    assert types == {jnp.dtype(jnp.float32)}
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(narrow, models.Frozen))} == {
        jnp.dtype(jnp.bfloat16)
    }
    np.testing.assert_allclose(
        logits(narrow) / np.abs(wide).max(), wide / np.abs(wide).max(), **BF16
    )


def test_a_saved_adapter_is_loaded_to_the_same_bits_on_any_mesh(folder: pathlib.Path) -> None:
    targets = ("k", "o", "up", "embed", "head")
    lora = models.Lora(rank=4, alpha=6.0, rslora=True, targets=targets)
    model = adapted(models.load_pretrained(folder), lora)
    models.save_adapter(model, folder / "adapter", base=str(folder))
    again = models.load_pretrained(folder)
    models.load_adapter(again, folder / "adapter")
    np.testing.assert_array_equal(logits(again), logits(model))
    auto = (jax.sharding.AxisType.Auto,) * 3
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=auto)
    divided = models.load_pretrained(folder, mesh=mesh)
    models.load_adapter(divided, folder / "adapter")
    shards = {
        str(path[-1]): value.get_value().sharding.spec
        for path, value in nnx.to_flat_state(nnx.state(divided, nnx.Param))
    }
    assert tuple(shards["up_lora_a"]) == (None, None, "fsdp")
    assert tuple(shards["up_lora_b"]) == (None, "tensor", None)
    for name in ("embed", "head"):  # Of 31 rows, which are padded.
        assert tuple(shards[f"{name}_lora_a"]) == (None, "fsdp")
        assert tuple(shards[f"{name}_lora_b"]) == ("tensor", None)
    np.testing.assert_allclose(logits(divided), logits(model), **HF_LOGITS)
    models.save_adapter(divided, folder / "again", base=str(folder))
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (folder / "again" / name).read_bytes() == (folder / "adapter" / name).read_bytes()
    with pytest.raises(UserError, match="exists already"):
        models.save_adapter(model, folder / "adapter")
    with pytest.raises(ValueError, match="use save_adapter, or merge_adapters first"):
        models.save_pretrained(model, folder / "whole")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, r"use_dora=True is not supported, expected False; merge the adapter"),
        ({"ensure_weight_tying": True}, "ensure_weight_tying=True is not supported"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\] is not supported"),
        ({"peft_type": "IA3"}, "peft_type='IA3' is not supported, expected 'LORA'"),
        ({"r": None}, "expected r and lora_alpha of an adapter"),
        ({"r": 3}, r"q_proj.lora_A.weight \(expected \(3, 16\), got \(4, 16\)\).*, and \d+ more"),
    ],
    ids=str,
)
def test_an_adapter_that_would_compute_something_else_is_refused(
    changes: dict[str, Any], message: str, tmp_path: pathlib.Path
) -> None:
    tiny.write_checkpoint("qwen3", tmp_path / "base")
    model = models.load_pretrained(tmp_path / "base")
    models.add_adapters(model, models.Lora(rank=4, alpha=8.0), rngs=nnx.Rngs(0))
    models.save_adapter(model, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(UserError, match=message):
        models.load_adapter(models.load_pretrained(tmp_path / "base"), tmp_path / "adapter")


def test_tensors_that_do_not_belong_to_the_model_are_named(tmp_path: pathlib.Path) -> None:
    tiny.write_checkpoint("qwen3", tmp_path)
    model = models.load_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"expected PEFT's adapter, found no adapter_config\.json"):
        models.load_adapter(model, tmp_path)
    adapted(model, models.Lora(rank=4, alpha=8.0, targets=("q",)))
    models.save_adapter(model, tmp_path / "adapter")
    with pytest.raises(UserError, match="an adapter, expected a whole model; name the model"):
        models.load_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    first = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert tensors[first].shape == (4, 16)
    extra = "base_model.model.model.norm.lora_A.weight"
    save_file(tensors | {extra: np.zeros((4, 16), np.float32)}, file)
    other = models.load_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"does not fit the model: .*norm.lora_A.* \(not exp"):
        models.load_adapter(other, tmp_path / "adapter")
    del tensors[first]
    save_file(tensors, file)
    with pytest.raises(UserError, match=r"layers.0.*lora_A.weight \(expected \(4, 16\), got none"):
        models.load_adapter(other, tmp_path / "adapter")
    save_file({extra: np.zeros((4, 16), np.float32)}, file)
    with pytest.raises(UserError, match="expected adapters of the model's matrices, such as"):
        models.load_adapter(other, tmp_path / "adapter")
    file.write_bytes(b"torn")
    with pytest.raises(UserError, match="not a safetensors file"):
        models.load_adapter(other, tmp_path / "adapter")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "lora.rank: expected more than 0, got 0"),
        ({"alpha": -1.0}, "lora.alpha: expected more than 0, got -1.0"),
        ({"targets": ("q", "norm")}, r"lora.targets: expected all, or .*head, got 'norm'"),
        ({"dropout": 1.0}, "lora.dropout: expected at least 0 and below 1, got 1.0"),
        ({"targets": ()}, "lora.targets: expected at least one matrix, got none"),
    ],
    ids=str,
)
def test_options_without_meaning_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        models.Lora(**{"rank": 4, "alpha": 8.0} | options)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")
@pytest.mark.parametrize(("rslora", "ends"), [(False, ()), (True, ("embed_tokens", "lm_head"))])
@pytest.mark.parametrize("case", ["llama3", "qwen2", "qwen3", "gemma3"])
def test_peft_agrees_in_both_directions(
    case: str, rslora: bool, ends: tuple[str, ...], tmp_path: pathlib.Path
) -> None:
    import peft
    import torch
    import transformers

    tiny.write_checkpoint(case, tmp_path / "base")

    def base() -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", dtype=torch.float32, attn_implementation="eager"
        )

    def theirs(model: Any) -> np.ndarray:
        with torch.no_grad():
            return model(torch.tensor(np.asarray(TOKENS), dtype=torch.long)).logits.numpy()

    # Ours, loaded by PEFT.
    model = models.load_pretrained(tmp_path / "base")
    before = logits(model)
    tied = model.config.tie_embeddings
    adapted(model, models.Lora(rank=4, alpha=6.0, rslora=rslora, targets=(*PROJECTIONS, *ends)))
    models.save_adapter(model, tmp_path / "ours", base=str(tmp_path / "base"))
    loaded = peft.PeftModel.from_pretrained(base(), tmp_path / "ours")
    np.testing.assert_allclose(theirs(loaded), logits(model), **HF_LOGITS)
    assert np.abs(logits(model) - before).max() > 0.1
    # Merged by us and by PEFT.
    models.merge_adapters(model)
    models.save_pretrained(model, tmp_path / "merged")
    whole = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.float32, attn_implementation="eager"
    )
    np.testing.assert_allclose(theirs(whole), logits(model), **HF_LOGITS)
    if not (tied and ends):  # PEFT would add both products to the one matrix.
        np.testing.assert_allclose(theirs(loaded.merge_and_unload()), logits(model), **HF_LOGITS)
    # PEFT's, loaded by us.
    torch.manual_seed(0)
    options = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        use_rslora=rslora,
        target_modules=["q_proj", "o_proj", "down_proj", *ends],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    fresh = peft.get_peft_model(base(), options).eval()
    fresh.save_pretrained(tmp_path / "theirs")
    again = models.load_pretrained(tmp_path / "base")
    models.load_adapter(again, tmp_path / "theirs")
    np.testing.assert_allclose(logits(again), theirs(fresh), **HF_LOGITS)
    assert np.abs(logits(again) - before).max() > 0.01
