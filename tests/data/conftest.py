"""Tokenizers of a few kilobytes, and chat templates of the forms that models ship with."""

import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "system user assistant You are a small test. Add the numbers and say what they make.",
    "What is 12 + 30? It is 42. So 7 - 9 = -2, and half of 48 is 24.\n\nThen again: yes, no.",
    "<think>\nfirst this, then that\n</think>\n\nThe answer is here. Today Date: 26 Jul 2024",
    "\n\n\nNew paragraph.\n\n\nAnd another.\n\n\nThe last.",
]

CHATML_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LLAMA_SPECIAL = [
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|finetune_right_pad_id|>",
]
MISTRAL_SPECIAL = ["<unk>", "<s>", "</s>"]
GEMMA_SPECIAL = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"]
# Whole tokens of Qwen3 that are text all the same.
QWEN3_ADDED = [
    f"<{slash}{name}>" for name in ("think", "tool_call", "tool_response") for slash in ("", "/")
]
TEMPLATES = pathlib.Path(__file__).parent / "templates"

# A default system prompt before a conversation that has none.
SMOLLM2 = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a small test.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# The same, and white space control, and a branch for each role.
QWEN25 = """{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are another test.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

# An answer's thinking is shown only until another question follows it, as an empty block if there
# is none. With enable_thinking=false the prompt ends in an empty block.
QWEN3 = """{%- set ns = namespace(last_query=0) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{%- set ns.last_query = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role != 'assistant' %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- else %}
        {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
        {%- set thinking = '' %}
        {%- if '</think>' in message.content %}
            {%- set thinking = message.content.split('</think>')[0].split('<think>')[-1] %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query %}
            {{- '<|im_start|>assistant\\n<think>\\n' + thinking.strip('\\n') }}
            {{- '\\n</think>\\n\\n' + content }}
        {%- else %}
            {{- '<|im_start|>assistant\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

# A date in the system prompt, today's unless one is given; contents trimmed.
LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") %}
{%- endif %}
{%- set system = '' %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" + system + "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

# No generation prompt, the system prompt inside the last question, and strictly by turns.
MISTRAL = """{%- set system = '' %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] + '\\n\\n' %}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- set ns = namespace(last=0) %}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate user/assistant') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}
        {{- '[INST] ' + (system if loop.index0 == ns.last else '') + message['content'] }}
        {{- '[/INST]' }}
    {%- else %}
        {{- ' ' + message['content'] + eos_token }}
    {%- endif %}
{%- endfor %}
"""

# Marks the assistant's turns, with and without the token that ends them.
MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED_WITHOUT_END = MARKED.replace(
    "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}",
    "{{ message['content'] }}{% endgeneration %}{{ '<|im_end|>' }}",
)


# How Llama 3 and Qwen cut text: newlines stay together, also before a word.
PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _byte_level(
    special: list[str], pieces: str | None = None, added: Sequence[str] = ()
) -> tokenizers.Tokenizer:
    """As GPT-2's and SmolLM2's, or with another expression for splitting text."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pieces:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(tokenizers.Regex(pieces), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([*added])
    return tokenizer


def _metaspace(special: list[str]) -> tokenizers.Tokenizer:
    """As SentencePiece's: a space is part of the following word, and one precedes the text."""
    tokenizer = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=[*special, *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    # Split here only: without pieces the trainer would learn whole sentences.
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    tokenizer.train_from_iterator(
        [*CORPUS, "[INST] [/INST] Yes[/INST] It", "So?[/INST]Straddle"], trainer
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] in special]
    return tokenizers.Tokenizer.from_str(json.dumps(state))


@pytest.fixture(scope="session")
def backends() -> dict[str, str]:
    """The tokenizer of each family, as the text of its tokenizer.json."""
    return {
        "smollm2": _byte_level(CHATML_SPECIAL).to_str(),
        "qwen": _byte_level(CHATML_SPECIAL, PIECES).to_str(),
        "llama": _byte_level(LLAMA_SPECIAL, PIECES).to_str(),
        "mistral": _metaspace(MISTRAL_SPECIAL).to_str(),
        "qwen3": _byte_level(CHATML_SPECIAL, PIECES, QWEN3_ADDED).to_str(),
        "gemma": _byte_level(GEMMA_SPECIAL, PIECES).to_str(),
    }


MakeTokenizer = Callable[..., PreTrainedTokenizerFast]


@pytest.fixture(scope="session")
def make_tokenizer(backends: dict[str, str]) -> MakeTokenizer:
    """Makes the tokenizer of a family (a key of `backends`) with a chat template."""
    tokens: dict[str, dict[str, Any]] = {
        "smollm2": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        "qwen": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        "llama": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
        "mistral": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
        "qwen3": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        "gemma": {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"},
    }

    def make(family: str, template: str | None) -> PreTrainedTokenizerFast:
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizers.Tokenizer.from_str(backends[family]),
            chat_template=template,
            **tokens[family],
        )

    return make


@pytest.fixture(scope="session")
def shipped(make_tokenizer: MakeTokenizer) -> Callable[[str], PreTrainedTokenizerFast]:
    """Makes a tokenizer with the chat template that a model ships with."""
    families = {
        "smollm2": "smollm2",
        "qwen2_5": "qwen3",
        "qwen3": "qwen3",
        "llama3_1": "llama",
        "gemma3": "gemma",
    }
    return lambda name: make_tokenizer(
        families[name], (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    )


@pytest.fixture(scope="session")
def tokenizer(make_tokenizer: MakeTokenizer) -> PreTrainedTokenizerFast:
    """A small tokenizer with SmolLM2's kind of template."""
    return make_tokenizer("smollm2", SMOLLM2)


@pytest.fixture
def cache(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """An empty user's cache."""
    monkeypatch.setenv("RANKTUNER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def write_jsonl(tmp_path: pathlib.Path) -> Callable[..., str]:
    """Writes rows (dicts, or raw lines) to a file and returns its path."""

    def write(*rows: dict[str, Any] | str | bytes, name: str = "rows.jsonl") -> str:
        lines = [
            row
            if isinstance(row, bytes)
            else (row if isinstance(row, str) else json.dumps(row)).encode()
            for row in rows
        ]
        path = tmp_path / name
        path.write_bytes(b"".join(line + b"\n" for line in lines))
        return str(path)

    return write


@pytest.fixture
def sums() -> Callable[..., list[dict[str, Any]]]:
    """Makes rows that ask for a sum, with answers of several lengths."""

    def make(count: int, seed: int = 0) -> list[dict[str, Any]]:
        pairs = np.random.default_rng(seed).integers(0, 99, (count, 2)).tolist()
        return [
            {
                "prompt": f"What is {a} + {b}?",
                "completion": f"It is {a + b}." * int(1 + a % 3),
                "id": i,
            }
            for i, (a, b) in enumerate(pairs)
        ]

    return make


@pytest.fixture
def path(write_jsonl: Callable[..., str], sums: Callable[..., list[dict[str, Any]]]) -> str:
    """A file of 40 such rows."""
    return write_jsonl(*sums(40))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "family_and_template" in metafunc.fixturenames:
        templates = {
            "smollm2": ("smollm2", SMOLLM2),
            "qwen25": ("qwen", QWEN25),
            "qwen3": ("qwen", QWEN3),
            "llama3": ("llama", LLAMA3),
            "mistral": ("mistral", MISTRAL),
            "marked": ("qwen", MARKED),
            "marked_without_end": ("qwen", MARKED_WITHOUT_END),
        }
        metafunc.parametrize("family_and_template", templates.values(), ids=templates)

    if "shipped_model" in metafunc.fixturenames:
        metafunc.parametrize(
            "shipped_model", sorted(path.stem for path in TEMPLATES.glob("*.jinja"))
        )


# Templates by name, for tests of one of them.
@pytest.fixture(scope="session")
def templates() -> dict[str, str]:
    return {
        "smollm2": SMOLLM2,
        "qwen25": QWEN25,
        "qwen3": QWEN3,
        "llama3": LLAMA3,
        "mistral": MISTRAL,
        "marked": MARKED,
        "marked_without_end": MARKED_WITHOUT_END,
    }
