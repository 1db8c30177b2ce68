"""The tokenizer of a model's folder, with the chat template that a config names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ranktuner_jax.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["PLAIN_TEMPLATE", "load_tokenizer"]

# For base models. Each answer begins on a new line: if the prompt ended in a space, the answer's
# first word would lack the space before it that is part of its token in pretraining.
PLAIN_TEMPLATE = """\
{%- for message in messages %}
    {{- message.role.capitalize() + ':\\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{ message.content + eos_token }}{% endgeneration %}
    {%- else %}
        {{- message.content }}
    {%- endif %}
    {{- '\\n\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'Assistant:\\n' }}{% endif %}
"""


def load_tokenizer(folder: str | Path, chat_template: str = "") -> PreTrainedTokenizerBase:
    """Loads the fast tokenizer of a Hugging Face folder.

    Args:
      folder: A local folder with `tokenizer.json`.
      chat_template: As `DataConfig.chat_template`; it replaces the tokenizer's own.

    Raises:
      UserError: If there is no fast tokenizer in the folder, or no such template.

    Example:
      >>> load_tokenizer("no/such/folder")
      Traceback (most recent call last):
      ranktuner_jax.errors.UserError: model: expected a folder with a tokenizer, got no/such/...
    """
    from transformers import AutoTokenizer

    if not Path(folder).is_dir():
        raise UserError(
            f"model: expected a folder with a tokenizer, got {folder}, which is not a folder"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(
            f"model: could not load a tokenizer from {folder}: {str(error).splitlines()[0]}"
        ) from error
    if not tokenizer.is_fast:
        raise UserError(
            f"model: expected a fast tokenizer (tokenizer.json) in {folder}, got a slow one; "
            "convert it with transformers"
        )
    if chat_template == "plain":
        tokenizer.chat_template = _plain_template(tokenizer)
    elif chat_template:
        tokenizer.chat_template = _read_template(Path(chat_template))
    return tokenizer


def _plain_template(tokenizer: PreTrainedTokenizerBase) -> str:
    if tokenizer.eos_token is None:
        raise UserError(
            "data.chat_template=plain: expected a tokenizer with an eos_token, which ends the "
            f"assistant's turn; {tokenizer.name_or_path} names none in tokenizer_config.json"
        )
    # A tokenizer that begins every text with bos_token did so in pretraining.
    adds_bos = tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
    return "{{- bos_token }}\n" * adds_bos + PLAIN_TEMPLATE


def _read_template(path: Path) -> str:
    try:
        return path.expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"data.chat_template: expected nothing (the tokenizer's own), plain, or the path of a "
            f"Jinja file, got {str(path)!r}: {error}"
        ) from error
