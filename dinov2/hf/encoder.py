"""Embeddings (patches, masks, class token, positions, registers) and the encoder's blocks."""

import math
import warnings
from collections.abc import Sequence
from typing import ClassVar, TypedDict

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from dinov2.hf.configuration import Config
from dinov2.hf.layers import Dinov2Layer, Dinov2WithRegistersLayer, prepare_mask
from dinov2.layers.kernels import cuts_patches, is_untouched, patch_products
from dinov2.layers.packing import PackedLayout, pack, unpack
from dinov2.layers.patch_embed import patch_grid
from dinov2.layers.pos_embed import resize_pos_embed
from dinov2.layers.recording import is_recording

__all__ = [
    "Dinov2Embeddings",
    "Dinov2Encoder",
    "Dinov2PatchEmbeddings",
    "Dinov2WithRegistersEmbeddings",
    "Dinov2WithRegistersEncoder",
    "Dinov2WithRegistersPatchEmbeddings",
    "States",
    "encode_images",
    "state_indices",
]

States = bool | int | Sequence[int] | None
"""Requested hidden states: all, none, or their indices."""


class Dinov2PatchEmbeddings(nn.Module):
    """Images `[B, C, H, W]` -> patch tokens `[B, N, D]`; what is left of a side beyond whole patches is not seen."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.image_size = _pair(config.image_size)
        self.patch_size = _pair(config.patch_size)
        self.grid = (self.image_size[0] // self.patch_size[0], self.image_size[1] // self.patch_size[1])
        self.num_patches = self.grid[0] * self.grid[1]
        self.num_channels = config.num_channels
        self.projection = nn.Conv2d(
            config.num_channels, config.hidden_size, kernel_size=self.patch_size, stride=self.patch_size
        )

    def forward(self, pixel_values: Tensor) -> Tensor:
        """`[B, C, H, W]` -> `[B, N, D]`. Raises `ValueError` for other channels, or images below one patch."""
        self._check(pixel_values)
        layer = self.projection
        # Quantised weights have no type that pixels could take.
        dtypes = [parameter.dtype for parameter in layer.parameters() if parameter.is_floating_point()]
        pixels = pixel_values.to(dtypes[0]) if dtypes else pixel_values
        if is_untouched(layer, nn.Conv2d) and cuts_patches(layer):
            rows, columns = layer.kernel_size
            height, width = pixels.shape[-2] // rows * rows, pixels.shape[-1] // columns * columns
            pixels = pixels[..., :height, :width]
        return patch_products(layer, pixels).flatten(2).transpose(1, 2)

    def _check(self, pixel_values: Tensor) -> None:
        if pixel_values.ndim != 4:
            raise ValueError(
                f"pixel_values has shape {list(pixel_values.shape)}; give a batch [B, C, H, W], "
                "for one image pixel_values[None]"
            )
        if is_recording():
            return
        if pixel_values.shape[1] != self.num_channels:
            raise ValueError(
                f"expected {self.num_channels} channels (config.num_channels) but got {pixel_values.shape[1]}; "
                "pixel_values is [B, C, H, W]"
            )
        sides = pixel_values.shape[-2:]
        for side, pixels, patch, patches in zip(
            ("height", "width"),
            sides,
            self.patch_size,
            patch_grid(self.projection, self.patch_size, *sides),
            strict=True,
        ):
            if patches < 1:
                raise ValueError(f"image {side} {pixels} is smaller than a patch of {patch} pixels; resize the images")


class _PositionRule(TypedDict):
    offset: float
    antialias: bool


class Dinov2Embeddings(nn.Module):
    """Pixels and masks -> tokens `[B, T, D]`: class token, registers (where the family has them), patches."""

    _patch_embeddings_class: ClassVar[type[Dinov2PatchEmbeddings]] = Dinov2PatchEmbeddings
    _has_registers: ClassVar[bool] = False

    def __init__(self, config: Config) -> None:
        super().__init__()
        width = config.hidden_size
        self.config = config
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        self.use_mask_token = self._has_registers or getattr(config, "use_mask_token", True)
        self.mask_token = nn.Parameter(torch.zeros(1, width)) if self.use_mask_token else None
        self.num_register_tokens = config.num_register_tokens if self._has_registers else 0
        if self._has_registers:
            self.register_tokens = nn.Parameter(torch.zeros(1, self.num_register_tokens, width))
        self.patch_embeddings = self._patch_embeddings_class(config)
        self.native_grid = self.patch_embeddings.grid
        self.position_embeddings = nn.Parameter(torch.randn(1, 1 + self.patch_embeddings.num_patches, width))
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.patch_size = config.patch_size

    def forward(self, pixel_values: Tensor, bool_masked_pos: Tensor | None = None) -> Tensor:
        """`[B, C, H, W]` -> `[B, T, D]`; patches where the mask `[B, N]` is True (or not 0) become the mask token."""
        patches = self.patch_embeddings(pixel_values)  # [B, N, D]
        if bool_masked_pos is not None:
            patches = self._masked(patches, bool_masked_pos)
        cls_token: Tensor = self.cls_token
        if self.mask_token is not None and self.training and bool_masked_pos is None and not is_recording():
            # A gradient of zero for the mask token: processes that train together expect one for every parameter.
            cls_token = cls_token + 0.0 * self.mask_token
        tokens = torch.cat([cls_token.expand(patches.shape[0], -1, -1), patches], dim=1)
        if self.position_embeddings is not None:
            tokens = tokens + self.interpolate_pos_encoding(tokens, *pixel_values.shape[-2:])
        if self._has_registers:
            registers = self.register_tokens.expand(patches.shape[0], -1, -1)
            tokens = torch.cat([tokens[:, :1], registers, tokens[:, 1:]], dim=1)
        embedded: Tensor = self.dropout(tokens)
        return embedded

    def interpolate_pos_encoding(self, embeddings: Tensor, height: int, width: int) -> Tensor:
        """Position embeddings `[1, 1+N, D]` for images of `height` x `width` pixels, of the type of `embeddings`."""
        position: Tensor = self.position_embeddings
        grid = self.patch_grid(height, width)
        resized = resize_pos_embed(position, self._position_grid(), grid, **self._position_rule())
        return resized.to(embeddings.dtype)

    def patch_grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches in images of `height` x `width` pixels."""
        patch_size = getattr(self.patch_embeddings, "patch_size", None) or self.patch_size
        return patch_grid(getattr(self.patch_embeddings, "projection", None), patch_size, height, width)

    def _position_grid(self) -> tuple[int, int]:
        """The grid of `position_embeddings`: that of the config, or a square one where they were replaced."""
        if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            with warnings.catch_warnings():  # a trace takes sizes for tensors, and warns that this one is a constant
                warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
                n_positions = int(self.position_embeddings.shape[1]) - 1
        else:
            n_positions = self.position_embeddings.shape[1] - 1
        rows, columns = self.native_grid
        if rows * columns == n_positions:
            return rows, columns
        side = math.isqrt(n_positions)
        if side * side != n_positions:
            raise ValueError(
                f"position_embeddings has {n_positions} patches, which is neither the grid {rows} x {columns} of the "
                "config nor a square; set config.image_size and build the model again"
            )
        return side, side

    def _position_rule(self) -> _PositionRule:
        """Offset and antialias of the resize: those of the stock class, or (`original`) of the weights' training."""
        registers = self._has_registers
        if getattr(self.config, "position_interpolation", "hf") == "hf":  # a config of transformers does not have it
            return {"offset": 0.0, "antialias": registers}
        return {
            "offset": float(getattr(self.config, "interpolate_offset", 0.0 if registers else 0.1)),
            "antialias": bool(getattr(self.config, "interpolate_antialias", registers)),
        }

    def _masked(self, patches: Tensor, mask: Tensor) -> Tensor:
        if self.mask_token is None:
            raise ValueError(
                "bool_masked_pos was given, but this model has no mask token (use_mask_token=False in its config); "
                "build it with use_mask_token=True or leave the mask out"
            )
        if mask.shape != patches.shape[:2]:
            raise ValueError(
                f"bool_masked_pos has shape {list(mask.shape)}; give [B, N] = {list(patches.shape[:2])}, "
                "patches row by row"
            )
        return torch.where((mask.to(patches.device) != 0)[..., None], self.mask_token.to(patches.dtype)[None], patches)


class Dinov2WithRegistersPatchEmbeddings(Dinov2PatchEmbeddings):
    """The same for models with registers."""


class Dinov2WithRegistersEmbeddings(Dinov2Embeddings):
    """The same for models with registers, which stand between class token and patches and have no position."""

    _patch_embeddings_class = Dinov2WithRegistersPatchEmbeddings
    _has_registers = True


class Dinov2Encoder(nn.Module):
    """Holds the blocks as `layer`; `[B, T, D]` -> `BaseModelOutput`."""

    _layer_class: ClassVar[type[nn.Module]] = Dinov2Layer

    def __init__(self, config: Config) -> None:
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
        output_hidden_states: States = None,
        *,
        layout: PackedLayout | None = None,
        depth: int | None = None,
    ) -> BaseModelOutput:
        """Tokens `[B, T, D]` (packed rows with a `layout`) through the first `depth` blocks, all by default.

        Returns `last_hidden_state` before the final norm; `hidden_states`, the input of each block and the output of
        the last one, with None in the place of a state that was not asked for; `attentions` `[B, heads, T, T]`.
        """
        mask = prepare_mask(attention_mask, hidden_states)
        # Nothing is passed that a block put in place by the user need not know.
        options: dict[str, object] = {} if mask is None else {"attention_mask": mask}
        if layout is not None:
            options["layout"] = layout
        head_masks = self._head_masks(head_mask)
        indices = state_indices(output_hidden_states, len(self.layer) + 1)
        states: list[Tensor | None] = [hidden_states if 0 in indices else None]
        attentions: list[Tensor] = []
        if output_attentions:
            options["attentions"] = attentions
        for index, layer in enumerate(self.layer[:depth]):
            given = options if head_masks is None else {**options, "head_mask": head_masks[index]}
            hidden_states = layer(hidden_states, **given)
            states.append(hidden_states if index + 1 in indices else None)
        return BaseModelOutput(
            last_hidden_state=hidden_states,
            hidden_states=tuple(states) if indices else None,
            attentions=tuple(attentions) if output_attentions else None,
        )

    def _head_masks(self, head_mask: Tensor | None) -> list[Tensor] | None:
        if head_mask is None:
            return None
        n_layers, n_heads = len(self.layer), self.config.num_attention_heads
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
        pruned = [getattr(layer.get_submodule("attention"), "pruned_heads", ()) for layer in self.layer]
        present = [[head for head in range(n_heads) if head not in gone] for gone in pruned]
        return [mask[heads] for mask, heads in zip(masks, present, strict=True)]


class Dinov2WithRegistersEncoder(Dinov2Encoder):
    """The same for models with registers."""

    _layer_class = Dinov2WithRegistersLayer


def encode_images(
    embeddings: nn.Module,
    encoder: nn.Module,
    images: Sequence[Tensor],
    masks: Tensor | Sequence[Tensor | None] | None,
    *,
    attention_mask: Tensor | None = None,
    output_attentions: bool = False,
    **options: object,
) -> list[BaseModelOutput]:
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
        outputs.append(BaseModelOutput(last_hidden_state=group, hidden_states=group_states))
    return outputs


def state_indices(asked: States, n_states: int) -> set[int]:
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


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    height, width = size
    return int(height), int(width)
