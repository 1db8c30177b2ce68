"""The tensors of a checkpoint: their names, and how our parameters are flattened to them."""

from __future__ import annotations

import math

from ranktuner_jax.models import partition
from ranktuner_jax.models.config import DecoderConfig
from ranktuner_jax.models.families import FAMILIES

__all__ = ["INDEX", "tensor_names"]

INDEX = "model.safetensors.index.json"


def tensor_names(config: DecoderConfig) -> dict[str, tuple[str, int | None, tuple[int, ...]]]:
    """Every tensor of a checkpoint: `{its name: (our parameter, layer, its shape)}`.

    Example:
      >>> tensor_names(DecoderConfig())["model.layers.3.mlp.up_proj.weight"]
      ('up', 3, (1536, 576))
    """
    names: dict[str, tuple[str, int | None, tuple[int, ...]]] = {}
    for name, axes in partition.param_axes(config).items():
        sizes = [
            config.vocab_size if axis == "vocab" else size
            for axis, size in axes.items()
            if axis != "layers"
        ]
        outputs = partition.OUTPUTS.get(name, len(sizes))
        parts = [part for part in (sizes[:outputs], sizes[outputs:]) if part]
        shape = tuple(map(math.prod, parts))
        template = FAMILIES[config.family].tensors[name]
        layers = range(config.num_layers) if "layers" in axes else (None,)
        names |= {template.format(layer): (name, layer, shape) for layer in layers}
    return names
