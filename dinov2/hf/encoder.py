"""The blocks one after the other, with the hidden states and attention weights that a call asks for."""

from collections.abc import Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from dinov2.hf.arguments import without_none
from dinov2.hf.attention import prepared_mask
from dinov2.hf.layers import Dinov2Layer, Dinov2WithRegistersLayer
from dinov2.layers.packing import Layout, pack, unpack

__all__ = ["Dinov2Encoder", "Dinov2WithRegistersEncoder", "encode_images", "state_indices"]


class Dinov2Encoder(nn.Module):
    """Holds the blocks as `layer`; `[B, T, D]` -> `BaseModelOutput`."""

    _layer_class: ClassVar[type[nn.Module]] = Dinov2Layer

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.layer = nn.ModuleList([self._layer_class(config) for _ in range(config.num_hidden_layers)])
        self.gradient_checkpointing = False

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        head_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | int | Sequence[int] | None = None,
        *,
        layout: Layout | None = None,
        depth: int | None = None,
    ) -> Any:
        """Tokens `[B, T, D]` (packed rows with a `layout`) through the first `depth` blocks, all by default.

        Returns `last_hidden_state` before the final norm; `hidden_states`, the input of each block and the output of
        the last one, with None in the place of a state that was not asked for; `attentions` `[B, heads, T, T]`.
        """
        options = {"attention_mask": prepared_mask(attention_mask, hidden_states), "layout": layout}
        head_masks = self._head_masks(head_mask)
        indices = state_indices(output_hidden_states, len(self.layer) + 1)
        states: list[Tensor | None] = [hidden_states if 0 in indices else None]
        attentions: list[Tensor] | None = [] if output_attentions else None
        for index, layer in enumerate(self.layer[:depth]):
            # Nothing is passed that a block put in place by the user need not know.
            given = without_none(**options, head_mask=head_masks[index], attentions=attentions)
            hidden_states = layer(hidden_states, **given)
            states.append(hidden_states if index + 1 in indices else None)
        return BaseModelOutput(
            last_hidden_state=cast(Any, hidden_states),
            hidden_states=cast(Any, tuple(states) if indices else None),
            attentions=cast(Any, None if attentions is None else tuple(attentions)),
        )

    def _head_masks(self, head_mask: Tensor | None) -> list[Tensor | None]:
        n_layers, n_heads = len(self.layer), self.config.num_attention_heads
        if head_mask is None:
            return [None] * n_layers
        head_mask = torch.as_tensor(head_mask)
        if head_mask.ndim == 5 and len(head_mask) == n_layers:  # prepared: [L, B, heads, T, T]
            return list(head_mask)
        if head_mask.shape == (n_heads,):
            head_mask = head_mask.expand(n_layers, n_heads)
        if head_mask.shape != (n_layers, n_heads):
            raise ValueError(
                f"head_mask has shape {list(head_mask.shape)}; give [{n_heads}] for all layers, or "
                f"[{n_layers}, {n_heads}]"
            )
        parameter = next(self.parameters())
        masks = head_mask.to(device=parameter.device, dtype=parameter.dtype)
        # A pruned layer has fewer heads; masks are numbered by those of the whole model.
        return [mask[self._present(index)] for index, mask in enumerate(masks)]

    def _present(self, index: int) -> list[int]:
        pruned: set[int] = cast(Any, self.layer[index]).attention.pruned_heads
        return [head for head in range(self.config.num_attention_heads) if head not in pruned]


class Dinov2WithRegistersEncoder(Dinov2Encoder):
    """The same for models with registers."""

    _layer_class = Dinov2WithRegistersLayer


def encode_images(
    embeddings: nn.Module,
    encoder: nn.Module,
    images: Sequence[Tensor],
    masks: Any,
    *,
    attention_mask: Any = None,
    output_attentions: bool = False,
    **options: Any,
) -> list[Any]:
    """Batches `[B, C, H, W]` or images `[C, H, W]` of different sizes in one packed pass, one output each."""
    if not images:
        raise ValueError("the list of images is empty; give at least one image [C, H, W] or batch [B, C, H, W]")
    if attention_mask is not None or output_attentions:
        raise ValueError(
            "images of different sizes are packed, which leaves no room for attention_mask and output_attentions; "
            "call the model image by image for these"
        )
    masks = [None] * len(images) if masks is None else list(masks)
    if len(masks) != len(images):
        raise ValueError(
            f"there are {len(images)} images and {len(masks)} masks; give one for each, None where none is meant"
        )
    batches = [image[None] if image.ndim == 3 else image for image in images]
    masks = [mask[None] if mask is not None and mask.ndim == 1 else mask for mask in masks]
    tokens, layout = pack([embeddings(batch, bool_masked_pos=mask) for batch, mask in zip(batches, masks, strict=True)])
    encoded = encoder(tokens, layout=layout, **options)
    states = None
    if encoded.hidden_states is not None:
        states = [None if state is None else unpack(state, layout) for state in encoded.hidden_states]
    outputs = []
    for index, group in enumerate(unpack(encoded.last_hidden_state, layout)):
        group_states = states and tuple(None if state is None else state[index] for state in states)
        outputs.append(BaseModelOutput(last_hidden_state=cast(Any, group), hidden_states=cast(Any, group_states)))
    return outputs


def state_indices(asked: bool | int | Sequence[int] | None, n_states: int) -> set[int]:
    """The hidden states that a value of `output_hidden_states` asks for; raises `ValueError` beyond the last."""
    if not asked:  # 0 is false, as in every version
        return set()
    if asked is True:
        return set(range(n_states))
    indices = [asked] if isinstance(asked, int) else list(asked)
    beyond = [index for index in indices if not -n_states <= index < n_states]
    if beyond:
        raise ValueError(f"output_hidden_states asks for {beyond}; there are {n_states} states, 0 to {n_states - 1}")
    return {index % n_states for index in indices}
