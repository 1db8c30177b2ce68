"""What a family says of itself, and how that translates `config.json` both ways."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ranktuner_jax.models.rope import RopeConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from ranktuner_jax.models.config import DecoderConfig

__all__ = ["Family"]

# Fields of `DecoderConfig` -> keys of config.json, the same in every family.
_SHARED = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "norm_eps": "rms_norm_eps",
    "max_positions": "max_position_embeddings",
    "tie_embeddings": "tie_word_embeddings",
    "activation": "hidden_act",
    "initializer_range": "initializer_range",
    "bos_token_id": "bos_token_id",
    "pad_token_id": "pad_token_id",
}


@dataclasses.dataclass(frozen=True)
class Family:
    """How checkpoints of one family map to a decoder.

    A family whose config.json is laid out in another way overrides methods.

    Attributes:
      name: Hugging Face's `model_type`.
      architecture: The class that config.json names.
      turn_ends: Tokens that end a turn in the family's chat templates.
      tensors: Our parameter -> Hugging Face's tensor, `{}` standing for the layer. Which of
        them a checkpoint has follows from its config.
      keys: Fields of `DecoderConfig` -> keys of config.json, beside those of every family.
      fixed: Fields of `DecoderConfig` that are the same in all of the family's models.
      window_keys: The keys of config.json that say which layers have a sliding window.
      multimodal: The `model_type` of checkpoints that hold a model of this family as their
        text model; empty if there are none.
      text_prefix: What precedes the names of its tensors there. Other tensors are left aside.
    """

    name: str
    architecture: str
    turn_ends: tuple[str, ...]
    tensors: Mapping[str, str]
    keys: Mapping[str, str] = dataclasses.field(default_factory=dict)
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    window_keys: tuple[str, ...] = ()
    multimodal: str = ""
    text_prefix: str = ""

    def from_hf(self, hf: PretrainedConfig) -> dict[str, Any]:
        """The fields of `DecoderConfig` that a transformers config of this family stands for."""
        eos = hf.eos_token_id
        windows: list[int | None] = []
        if "layer_types" in self.window_keys:
            sliding = [kind == "sliding_attention" for kind in hf.layer_types]
            windows = [hf.sliding_window if slides else None for slides in sliding]
        elif self.window_keys:
            windows = [hf.sliding_window] * hf.num_hidden_layers
        return {
            "family": self.name,
            **{field: getattr(hf, key) for field, key in {**_SHARED, **self.keys}.items()},
            **self.fixed,
            "head_dim": getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
            **self.read_ropes(hf),
            "windows": tuple(windows) if any(windows) else (),
            "eos_token_id": tuple(eos) if isinstance(eos, list) else eos,
        }

    def to_hf(self, config: DecoderConfig) -> dict[str, Any]:
        """The options of the transformers config that `from_hf` reads back."""
        eos = config.eos_token_id
        window = next((window for window in config.windows if window), None)
        windows = {
            "sliding_window": window,
            "use_sliding_window": window is not None,
            "layer_types": [
                "full_attention" if window is None else "sliding_attention"
                for window in config.windows or (None,) * config.num_layers
            ],
        }
        return {
            "architectures": [self.architecture],
            **{key: getattr(config, field) for field, key in {**_SHARED, **self.keys}.items()},
            **{key: windows[key] for key in self.window_keys},
            "head_dim": config.head_dim,
            **self.write_ropes(config),
            "eos_token_id": list(eos) if isinstance(eos, tuple) else eos,
        }

    def read_ropes(self, hf: PretrainedConfig) -> dict[str, Any]:
        """The fields `rope` and `ropes` of `DecoderConfig`."""
        return {"rope": RopeConfig.from_parameters(hf.rope_parameters)}

    def write_ropes(self, config: DecoderConfig) -> dict[str, Any]:
        """The keys of config.json that `read_ropes` reads back."""
        return {"rope_parameters": config.rope.to_parameters()}
