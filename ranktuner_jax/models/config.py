"""What a decoder looks like: one frozen dataclass for every family."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ranktuner_jax.errors import UserError
from ranktuner_jax.models.rope import RopeConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["ARCHITECTURES", "DecoderConfig"]

# Hugging Face's model_type, and the class that a config.json names.
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The shape and the options of one decoder.

    Attributes:
      family: Hugging Face's `model_type`, one of `ARCHITECTURES`.
      vocab_size: Real vocabulary rows.
      windows: Attention window of each layer in tokens, `None` where it sees everything;
        an empty tuple means that no layer has one.
      vocab_multiple: The embedding's rows are padded to a multiple of this many, so that
        they divide over the `tensor` axis of a mesh. Padded rows are zero and never exported.

    Example:
      >>> config = DecoderConfig(vocab_size=101, hidden_size=8, num_layers=2, vocab_multiple=4)
      >>> config.padded_vocab_size
      104
    """

    family: str = "llama"
    vocab_size: int = 49152
    hidden_size: int = 576
    intermediate_size: int = 1536
    num_layers: int = 30
    num_heads: int = 9
    num_kv_heads: int = 3
    head_dim: int = 64
    norm_eps: float = 1e-5
    rope: RopeConfig = dataclasses.field(default_factory=RopeConfig)
    max_positions: int = 8192
    windows: tuple[int | None, ...] = ()
    tie_embeddings: bool = True
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    initializer_range: float = 0.02
    vocab_multiple: int = 1
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        if self.family not in ARCHITECTURES:
            raise UserError(
                f"architecture {self.family!r} is not supported; "
                f"supported: {', '.join(ARCHITECTURES)}"
            )
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"num_heads must be a multiple of num_kv_heads, "
                f"got {self.num_heads} and {self.num_kv_heads}"
            )
        if self.windows and len(self.windows) != self.num_layers:
            raise UserError(
                f"windows must name one for each of {self.num_layers} layers, "
                f"got {len(self.windows)}"
            )

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding, padding included."""
        return math.ceil(self.vocab_size / self.vocab_multiple) * self.vocab_multiple

    def window_runs(self) -> Iterator[tuple[int, int, int | None]]:
        """Runs of equal layers as `(start, stop, window)`, each scanned at once."""
        windows = self.windows or (None,) * self.num_layers
        start = 0
        for window, run in itertools.groupby(windows):
            stop = start + len(list(run))
            yield start, stop, window
            start = stop

    @classmethod
    def from_hf(cls, hf: PretrainedConfig) -> DecoderConfig:
        """Reads a transformers config.

        Raises:
          UserError: If the architecture, the rope type or the activation is not supported.
        """
        family = hf.model_type
        if family not in ARCHITECTURES:
            raise UserError(
                f"architecture {family!r} is not supported; supported: {', '.join(ARCHITECTURES)}"
            )
        if hf.hidden_act != "silu":
            raise UserError(f"hidden_act {hf.hidden_act!r} is not supported; supported: silu")
        layers = hf.num_hidden_layers
        window = getattr(hf, "sliding_window", None)
        kinds = getattr(hf, "layer_types", None) or ["sliding_attention"] * layers
        windows = tuple(window if kind == "sliding_attention" else None for kind in kinds)
        eos = hf.eos_token_id
        bias = bool(getattr(hf, "attention_bias", False))
        return cls(
            family=family,
            vocab_size=hf.vocab_size,
            hidden_size=hf.hidden_size,
            intermediate_size=hf.intermediate_size,
            num_layers=layers,
            num_heads=hf.num_attention_heads,
            num_kv_heads=hf.num_key_value_heads,
            head_dim=getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
            norm_eps=hf.rms_norm_eps,
            rope=RopeConfig.from_parameters(hf.rope_parameters),
            max_positions=hf.max_position_embeddings,
            windows=windows if any(windows) else (),
            tie_embeddings=bool(hf.tie_word_embeddings),
            qkv_bias=bias or family == "qwen2",
            output_bias=bias,
            mlp_bias=bool(getattr(hf, "mlp_bias", False)),
            qk_norm=family == "qwen3",
            initializer_range=hf.initializer_range,
            bos_token_id=hf.bos_token_id,
            eos_token_id=tuple(eos) if isinstance(eos, list) else eos,
            pad_token_id=hf.pad_token_id,
        )

    def to_hf(self) -> PretrainedConfig:
        """The transformers config that `from_hf` reads back as this one."""
        from transformers import AutoConfig

        eos = self.eos_token_id
        options: dict[str, Any] = {
            "architectures": [ARCHITECTURES[self.family]],
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "rms_norm_eps": self.norm_eps,
            "rope_parameters": self.rope.to_parameters(),
            "max_position_embeddings": self.max_positions,
            "tie_word_embeddings": self.tie_embeddings,
            "hidden_act": "silu",
            "initializer_range": self.initializer_range,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": list(eos) if isinstance(eos, tuple) else eos,
            "pad_token_id": self.pad_token_id,
        }
        if self.family in ("llama", "qwen3"):
            options["attention_bias"] = self.output_bias
        if self.family == "llama":
            options["mlp_bias"] = self.mlp_bias
        if self.family != "llama":
            window = next((w for w in self.windows if w), None)
            options["sliding_window"] = window
            if self.family != "mistral":
                kind = {True: "sliding_attention", False: "full_attention"}
                options["use_sliding_window"] = window is not None
                options["layer_types"] = [
                    kind[w is not None] for w in self.windows or (None,) * self.num_layers
                ]
        return AutoConfig.for_model(self.family, **options)
