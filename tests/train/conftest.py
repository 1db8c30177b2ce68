"""A tiny model with a byte tokenizer, and a tiny data set of sums."""

import json
import pathlib
from collections.abc import Callable, Iterator

import pytest
import tokenizers
import transformers
from flax import nnx

from ranktuner_jax import models
from ranktuner_jax.train import TrainConfig, load_config

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

TINY_CONFIG = """
from ml_collections import ConfigDict


def get_config():
    return ConfigDict({config!r})
"""


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A Hugging Face folder: two layers, random weights, one token per byte."""
    folder = tmp_path_factory.mktemp("tiny")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder / "tokenizer")
    config = models.DecoderConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=32,
        num_layers=2,
        num_heads=2,
        num_kv_heads=2,
        head_dim=8,
    )
    model = models.Decoder(config, rngs=nnx.Rngs(0))
    models.save_pretrained(model, folder / "model", tokenizer_from=folder / "tokenizer")
    return folder / "model"


@pytest.fixture(scope="session")
def sums(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A path with `{split}` in it: 40 sums to train on, 8 held out."""
    folder = tmp_path_factory.mktemp("sums")
    questions = [(a, b) for a in range(8) for b in range(6)]
    for split, chosen in (("train", questions[:40]), ("test", questions[40:])):
        records = [
            {"prompt": f"{a}+{b}", "completion": str(a + b) * (1 + a), "answer": str(a + b)}
            for a, b in chosen
        ]
        text = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{split}.jsonl").write_text(text)
    return str(folder / "{split}.jsonl")


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of the tests' own, in this process and in those that it starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANKTUNER_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny_config_file(
    tiny_model: pathlib.Path, sums: str, tmp_path_factory: pytest.TempPathFactory
) -> pathlib.Path:
    """A config that trains the tiny model on the sums within seconds."""
    config = {
        "model": str(tiny_model),
        "data": {"source": sums, "row_length": 64},
        "loss": {"options": {"base": "one"}},
        "optimizer": {"learning_rate": 1e-2},
        "train": {"steps": 6, "batch_size": 8},
        "mesh": {"data": 8},
        "checkpoint": {"every_steps": 2, "keep_last": 3},
        "eval": {"task": "exact", "rows": 8, "batch_size": 8, "examples": 8, "max_new_tokens": 4},
    }
    path = tmp_path_factory.mktemp("config") / "tiny.py"
    path.write_text(TINY_CONFIG.format(config=config))
    return path


@pytest.fixture(scope="session")
def tiny_config(tiny_config_file: pathlib.Path) -> Callable[..., TrainConfig]:
    """Makes that config; keyword arguments are overrides, with "__" for the dot."""

    def make(**overrides: object) -> TrainConfig:
        arguments = [f"--config.{k.replace('__', '.')}={v}" for k, v in overrides.items()]
        return load_config(str(tiny_config_file), arguments)

    return make
