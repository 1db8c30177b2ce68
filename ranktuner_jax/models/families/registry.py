"""Every family that is supported, by name."""

from __future__ import annotations

from ranktuner_jax.errors import UserError
from ranktuner_jax.models.families import gemma3, llama, mistral, olmo2, qwen2, qwen3, smollm3
from ranktuner_jax.models.families.family import Family

__all__ = ["FAMILIES", "find_family", "turn_ends"]

FAMILIES: dict[str, Family] = {
    module.FAMILY.name: module.FAMILY
    for module in (llama, mistral, qwen2, qwen3, gemma3, olmo2, smollm3)
}


def turn_ends() -> tuple[str, ...]:
    """The tokens that end a turn in any family's chat templates, each once.

    A tokenizer knows which of them it has.

    Example:
      >>> "<|im_end|>" in turn_ends()
      True
    """
    return tuple(dict.fromkeys(end for family in FAMILIES.values() for end in family.turn_ends))


def find_family(name: str) -> Family:
    """The family with this `model_type`.

    Raises:
      UserError: If there is none.

    Example:
      >>> find_family("mistral").architecture
      'MistralForCausalLM'
    """
    if name not in FAMILIES:
        raise UserError(f"architecture {name!r} is not supported; supported: {', '.join(FAMILIES)}")
    return FAMILIES[name]
