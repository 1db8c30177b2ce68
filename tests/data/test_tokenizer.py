"""Tokenizers are loaded from a folder, chat templates from there or from the config."""

import pathlib
import types
from collections.abc import Callable
from typing import Any

import pytest
import tokenizers
import transformers

from ranktuner_jax.data import BadRowError, ChatEncoder, load_tokenizer
from ranktuner_jax.data.records import to_conversation
from ranktuner_jax.errors import UserError

MakeTokenizer = Callable[..., Any]

TURNS = [
    {"role": "system", "content": "Add the numbers."},
    {"role": "user", "content": "What is 12 + 30?"},
    {"role": "assistant", "content": "It is 42."},
    {"role": "user", "content": "Half of 48?"},
    {"role": "assistant", "content": "24, so it is."},
]
PLAIN = (
    "System:\nAdd the numbers.\n\nUser:\nWhat is 12 + 30?\n\nAssistant:\nIt is 42.{end}\n\n"
    "User:\nHalf of 48?\n\nAssistant:\n24, so it is.{end}\n\n"
)


@pytest.fixture(params=["qwen", "llama", "mistral"])
def base(request: pytest.FixtureRequest, make_tokenizer: MakeTokenizer, tmp_path: Any) -> str:
    """The folder of a base model's tokenizer, which has no template."""
    tokenizer = make_tokenizer(request.param, None)
    if tokenizer.bos_token:  # As Llama's and Mistral's, whose texts begin with it.
        tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{tokenizer.bos_token} $A",
            special_tokens=[(tokenizer.bos_token, tokenizer.bos_token_id)],
        )
    tokenizer.save_pretrained(tmp_path)
    return str(tmp_path)


def test_a_saved_tokenizer_is_loaded(tokenizer: Any, tmp_path: pathlib.Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).chat_template == tokenizer.chat_template


def test_the_plain_template_writes_turns_as_text_and_ends_answers_with_eos(base: str) -> None:
    tokenizer: Any = load_tokenizer(base, "plain")
    text = tokenizer.apply_chat_template(TURNS, tokenize=False)
    assert text == (tokenizer.bos_token or "") + PLAIN.format(end=tokenizer.eos_token)
    prompt = tokenizer.apply_chat_template(TURNS[:2], tokenize=False, add_generation_prompt=True)
    assert text.startswith(prompt)
    assert prompt.endswith("Assistant:\n")


def test_the_plain_template_supervises_each_answer_and_its_end(base: str) -> None:
    tokenizer: Any = load_tokenizer(base, "plain")
    [samples] = ChatEncoder(tokenizer).encode([to_conversation({"messages": TURNS})])
    assert not isinstance(samples, BadRowError)
    [sample] = samples
    decode = tokenizer.backend_tokenizer.decode
    supervised = decode(sample.tokens[sample.mask].tolist(), skip_special_tokens=False)
    assert supervised == f"It is 42.{tokenizer.eos_token}24, so it is.{tokenizer.eos_token}"
    assert sample.tokens[-1] == tokenizer.eos_token_id
    assert sample.tokens.tolist().count(tokenizer.bos_token_id) == (tokenizer.bos_token is not None)
    # The mask of transformers is the same.
    theirs = tokenizer.apply_chat_template(
        TURNS, return_dict=True, return_assistant_tokens_mask=True
    )
    assert theirs["input_ids"][: len(sample.tokens)] == sample.tokens.tolist()
    assert theirs["assistant_masks"][: len(sample.tokens)] == sample.mask.astype(int).tolist()


def test_a_template_that_the_config_names_replaces_the_tokenizers_own(
    tokenizer: Any, tmp_path: pathlib.Path
) -> None:
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "mine.jinja"
    file.write_text("{% for m in messages %}{{ m.content + eos_token + '≈' }}{% endfor %}", "utf-8")
    loaded = load_tokenizer(tmp_path, str(file))
    assert loaded.apply_chat_template(TURNS[1:2], tokenize=False) == "What is 12 + 30?<|im_end|>≈"
    assert load_tokenizer(tmp_path, "plain").chat_template != tokenizer.chat_template


def test_a_template_that_is_not_there_is_the_users_mistake(
    tokenizer: Any, tmp_path: pathlib.Path
) -> None:
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"chat_template: expected nothing .* got 'plane'"):
        load_tokenizer(tmp_path, "plane")


def test_the_plain_template_needs_an_eos_token(tmp_path: pathlib.Path) -> None:
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"?": 0}, unk_token="?"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="plain: expected a tokenizer with an eos_token"):
        load_tokenizer(tmp_path, "plain")


def test_a_missing_folder_is_the_users_mistake(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match="expected a folder with a tokenizer"):
        load_tokenizer(tmp_path / "none")


def test_a_folder_without_a_tokenizer_is_the_users_mistake(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match="could not load a tokenizer from"):
        load_tokenizer(tmp_path)


def test_a_slow_tokenizer_is_the_users_mistake(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = types.SimpleNamespace(is_fast=False)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: slow)
    with pytest.raises(UserError, match=r"expected a fast tokenizer \(tokenizer.json\)"):
        load_tokenizer(tmp_path)
