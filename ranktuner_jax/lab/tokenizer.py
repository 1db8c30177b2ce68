"""A tokenizer of whole words and single digits, trained on the laboratory's own text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ordinary_ids", "train_tokenizer"]

_SPECIAL = ("<|pad|>", "<|unk|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
# A word, a digit or a mark, each with the space before it. Any tokens one after another are cut
# into the same tokens again: no word without a space begins with a small letter.
_PIECES = r" ?[A-Z]?[a-z]+| ?[0-9]| ?[^A-Za-z0-9\s]|\s"
_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|' + message.role + '|>' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{ message.content + '<|end|>' }}{% endgeneration %}
    {%- else %}
        {{- message.content }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}
"""


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerBase:
    """A tokenizer whose vocabulary is what occurs in the texts, with a chat template.

    Text without unknown words and any sequence of its ordinary tokens survive a round trip.

    Args:
      texts: The questions and answers.

    Example:
      >>> tokenizer = train_tokenizer(["What is 12 + 7?", "12 + 7 = 19."])
      >>> tokenizer.tokenize("What is 21 = 7?")
      ['What', ' is', ' 2', '1', ' =', ' 7', '?']
    """
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_PIECES), "isolated")
    tokenizer.decoder = decoders.Fuse()
    digits = [space + str(digit) for digit in range(10) for space in ("", " ")]
    trainer = trainers.WordLevelTrainer(special_tokens=list(_SPECIAL), show_progress=False)
    tokenizer.train_from_iterator(["".join(digits), *texts], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=_TEMPLATE,
        pad_token="<|pad|>",
        unk_token="<|unk|>",
        eos_token="<|end|>",
        additional_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"],
        clean_up_tokenization_spaces=False,
    )


def ordinary_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that are text, ascending.

    Example:
      >>> len(ordinary_ids(train_tokenizer(["What is it?"])))
      24
    """
    special = set(tokenizer.all_special_ids)
    return [i for i in range(len(tokenizer)) if i not in special]
