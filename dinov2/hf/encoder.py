"""The blocks one after the other, collecting on the way what a call asked for, and stopping where it needs no more."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from dinov2.hf.attention import AttentionCall, prepared_mask
from dinov2.hf.layers import Dinov2Layer, Dinov2WithRegistersLayer
from dinov2.layers.packing import Layout, pack, unpack

__all__ = ["Dinov2Encoder", "Dinov2WithRegistersEncoder", "Encoded", "passes"]


class Encoded(NamedTuple):
    """Tokens behind the last block that was run, and what was collected."""

    tokens: Tensor
    """[B, T, D]."""
    hidden_states: tuple[Tensor | None, ...] | None
    """The input of each block and the output of the last one; None in the place of one that was not wanted."""
    attentions: tuple[Tensor, ...] | None
    """[B, heads, T, T] of each block."""


class Dinov2Encoder(nn.Module):
    """Holds the blocks as `layer`; `[B, T, D]` -> `BaseModelOutput`."""

    _layer_class: ClassVar[type[nn.Module]] = Dinov2Layer

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.layer = nn.ModuleList([self._layer_class(config) for _ in range(config.num_hidden_layers)])
        self.gradient_checkpointing = False

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **wanted: Any) -> Any:
        """Tokens `[B, T, D]` -> the same behind all blocks, before the final norm; further arguments are `run`'s."""
        encoded = self.run(hidden_states, attention_mask=attention_mask, **wanted)
        return BaseModelOutput(
            last_hidden_state=encoded.tokens, hidden_states=encoded.hidden_states, attentions=encoded.attentions
        )

    def run(
        self,
        tokens: Tensor,
        *,
        attention_mask: Tensor | None = None,
        head_mask: Tensor | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool | int | Sequence[int] = False,
        layout: Layout | None = None,
        depth: int | None = None,
        collect: Callable[[int, Tensor], None] | None = None,
    ) -> Encoded:
        """Tokens `[B, T, D]` (packed rows with a `layout`) through the first `depth` blocks, all by default.

        `collect` is called with (0, tokens) and with (k, output of block k) for every block that was run.
        """
        call = AttentionCall(
            mask=prepared_mask(attention_mask, tokens), want_weights=bool(output_attentions), layout=layout
        )
        head_masks = self._head_masks(head_mask)
        wanted = _wanted_states(output_hidden_states, len(self.layer) + 1)
        states: list[Tensor | None] = [tokens if 0 in wanted else None]
        weights = []
        if collect is not None:
            collect(0, tokens)
        for index, layer in enumerate(self.layer[:depth]):
            tokens, attention = layer(tokens, head_mask=head_masks[index], call=call)
            states.append(tokens if index + 1 in wanted else None)
            weights.append(attention)
            if collect is not None:
                collect(index + 1, tokens)
        return Encoded(tokens, tuple(states) if wanted else None, tuple(weights) if output_attentions else None)

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


def passes(
    embeddings: nn.Module,
    encoder: Dinov2Encoder,
    images: Sequence[Tensor],
    masks: Any,
    *,
    attention_mask: Any = None,
    output_attentions: bool = False,
    output_hidden_states: bool | int | Sequence[int] = False,
    head_mask: Tensor | None = None,
) -> list[Encoded]:
    """Batches `[B, C, H, W]` or images `[C, H, W]` of different sizes in one packed pass, one result each."""
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
    encoded = encoder.run(tokens, head_mask=head_mask, output_hidden_states=output_hidden_states, layout=layout)
    states = None
    if encoded.hidden_states is not None:
        states = [None if state is None else unpack(state, layout) for state in encoded.hidden_states]
    results = []
    for index, part in enumerate(unpack(encoded.tokens, layout)):
        own = None if states is None else tuple(None if state is None else state[index] for state in states)
        results.append(Encoded(part, own, None))
    return results


def _wanted_states(asked: bool | int | Sequence[int], n_states: int) -> set[int]:
    if not asked:  # 0 is false, as in every version
        return set()
    if asked is True:
        return set(range(n_states))
    indices = [asked] if isinstance(asked, int) else list(asked)
    beyond = [index for index in indices if not -n_states <= index < n_states]
    if beyond:
        raise ValueError(f"output_hidden_states asks for {beyond}; there are {n_states} states, 0 to {n_states - 1}")
    return {index % n_states for index in indices}
