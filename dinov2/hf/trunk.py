"""Embeddings, blocks and final norm: what models and backbones are made of, under the names of transformers."""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from dinov2.hf.arguments import fitting

__all__ = ["Trunk"]


class Trunk:
    """A mix-in in front of a `PreTrainedModel`: builds `embeddings`, `encoder` and `layernorm` from a config."""

    _embeddings_class: ClassVar[type[nn.Module]]
    _encoder_class: ClassVar[type[nn.Module]]

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        self.embeddings = self._embeddings_class(config)
        self.encoder = self._encoder_class(config)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.prune_as_configured()  # type: ignore[attr-defined]
        self.post_init()  # type: ignore[attr-defined]

    def fits(self: Any, pixel_values: Any, labels: int = 0) -> Mapping[str, Any]:
        """What positional values may look like for these images."""
        images = self.required(pixel_values)
        rows, columns = self.embeddings.patch_embeddings.patch_size
        patches = (images.shape[-2] // rows) * (images.shape[-1] // columns)
        return fitting(
            batch=images.shape[0],
            tokens=1 + self.embeddings.num_register_tokens + patches,
            heads=self.config.num_attention_heads,
            layers=self.config.num_hidden_layers,
            labels=labels,
        )
