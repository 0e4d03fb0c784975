"""The vision transformer of DINOv2 (arXiv 2304.07193), with registers on request (arXiv 2309.16588).

Attribute names are the keys of the released checkpoints. A list of images of different sizes goes through the blocks in
one packed pass (`dinov2.layers.packing`). Tokens are ordered class token, registers, patches row by row.
"""

import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from dinov2.layers.block import Block
from dinov2.layers.mlp import Mlp
from dinov2.layers.packing import PackedLayout, pack, unpack
from dinov2.layers.patch_embed import PatchEmbed, make_2tuple
from dinov2.layers.pos_embed import resize_pos_embed
from dinov2.layers.recording import is_recording
from dinov2.layers.swiglu_ffn import SwiGLUFFNFused

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "BlockChunk",
    "DinoVisionTransformer",
    "vit_base",
    "vit_giant2",
    "vit_large",
    "vit_micro",
    "vit_nano",
    "vit_small",
    "vit_tiny",
]


class Architecture(NamedTuple):
    """Size of a transformer; heads are 64 wide in all of them."""

    embed_dim: int
    depth: int
    num_heads: int


ARCHITECTURES = {
    "vit_nano": Architecture(128, 4, 2),
    "vit_micro": Architecture(192, 6, 3),
    "vit_tiny": Architecture(192, 12, 3),
    "vit_small": Architecture(384, 12, 6),
    "vit_base": Architecture(768, 12, 12),
    "vit_large": Architecture(1024, 24, 16),
    "vit_giant2": Architecture(1536, 40, 24),
}

_FEED_FORWARD: dict[str, Callable[..., nn.Module]] = {
    "mlp": Mlp,
    "swiglu": SwiGLUFFNFused,
    "swiglufused": SwiGLUFFNFused,
    "identity": lambda **_: nn.Identity(),
}


class DinoVisionTransformer(nn.Module):
    """Images `[B, C, H, W]` -> class token `[B, D]` by call, all tokens by `forward_features`.

    `img_size` (int or height and width) fixes the size of the learned position grid; other sizes resize it by the rule
    of `interpolate_offset` and `interpolate_antialias`, which belongs to the weights. `block_chunks=0` keeps the blocks
    in a flat list, as released; n groups them as training files do. A state dict of either form loads into both.
    Raises `ValueError` for images whose sides are no multiple of the patch size.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        ffn_bias: bool = True,
        proj_bias: bool = True,
        drop_path_rate: float = 0.0,
        drop_path_uniform: bool = False,
        init_values: float | None = None,
        embed_layer: Callable[..., PatchEmbed] = PatchEmbed,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        block_fn: Callable[..., nn.Module] = Block,
        ffn_layer: str = "mlp",
        block_chunks: int = 1,
        num_register_tokens: int = 0,
        interpolate_antialias: bool = False,
        interpolate_offset: float = 0.1,
        drop_path_per_sample: bool = False,
    ) -> None:
        super().__init__()
        if ffn_layer not in _FEED_FORWARD:
            raise ValueError(f"ffn_layer is {ffn_layer!r}; choose one of {', '.join(_FEED_FORWARD)}")
        if num_register_tokens < 0:
            raise ValueError(f"num_register_tokens is {num_register_tokens}; write 0 for none")
        if block_chunks < 0 or (block_chunks and depth % block_chunks):
            raise ValueError(
                f"block_chunks is {block_chunks}; it must divide the depth {depth}, or be 0 for a flat list"
            )
        self.num_features = self.embed_dim = embed_dim
        self.num_tokens = 1
        self.n_blocks = depth
        self.num_heads = num_heads
        self.patch_size = make_2tuple(patch_size)[0]
        self.num_register_tokens = num_register_tokens
        self.interpolate_antialias = interpolate_antialias
        self.interpolate_offset = interpolate_offset
        self.chunked_blocks = block_chunks > 0

        self.patch_embed = embed_layer(img_size=img_size, patch_size=patch_size, in_chans=in_chans, embed_dim=embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.patch_embed.num_patches, embed_dim))
        self.register_tokens = (
            nn.Parameter(torch.zeros(1, num_register_tokens, embed_dim)) if num_register_tokens else None
        )
        # Declared before the blocks: the order of the released state dicts.
        self.mask_token = nn.Parameter(torch.zeros(1, embed_dim))

        drop_path_rates = [drop_path_rate] * depth if drop_path_uniform else _linear_rates(drop_path_rate, depth)
        # Only when asked for: a block of somebody else's knows the release's arguments alone.
        per_sample = {"drop_path_per_sample": True} if drop_path_per_sample else {}
        blocks = [
            block_fn(
                dim=embed_dim,
                num_heads=num_heads,
                mlp_ratio=mlp_ratio,
                qkv_bias=qkv_bias,
                proj_bias=proj_bias,
                ffn_bias=ffn_bias,
                drop_path=rate,
                norm_layer=partial(nn.LayerNorm, eps=1e-6),
                act_layer=act_layer,
                ffn_layer=_FEED_FORWARD[ffn_layer],
                init_values=init_values,
                **per_sample,
            )
            for rate in drop_path_rates
        ]
        self._packs_crops = all(isinstance(block, Block) for block in blocks)
        self.blocks = nn.ModuleList(_chunks(blocks, block_chunks) if block_chunks else blocks)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = nn.Identity()
        self.init_weights()

    def init_weights(self) -> None:
        """Starting values of a fresh model; the patch projection keeps the framework's."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        if self.register_tokens is not None:
            nn.init.normal_(self.register_tokens, std=1e-6)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @property
    def block_list(self) -> list[Block]:
        """The blocks in order, whether they are held in chunks or not."""
        chunks = self.blocks.children() if self.chunked_blocks else [self.blocks]
        return [
            cast(Block, block) for chunk in chunks for block in chunk.children() if not isinstance(block, nn.Identity)
        ]

    def forward(self, x: Any, masks: Any = None, is_training: bool = False) -> Any:
        """The normalised class token `[B, D]`, or what `forward_features` gives with `is_training=True`.

        A list of images gives a list. `is_training` only selects the result and has nothing to do with training mode.
        """
        features = self.forward_features(x, masks)
        if is_training:
            return features
        if isinstance(features, list):
            return [self.head(image["x_norm_clstoken"]) for image in features]
        return self.head(features["x_norm_clstoken"])

    def forward_features(self, x: Any, masks: Any = None) -> Any:
        """All tokens of images `[B, C, H, W]`, as a dict.

        `x_norm_clstoken` `[B, D]`, `x_norm_regtokens` `[B, R, D]`, `x_norm_patchtokens` `[B, N, D]` after the final
        norm, `x_prenorm` `[B, 1+R+N, D]` before it, and the `masks` `[B, N]` given. Where a mask is True the patch is
        replaced by the mask token. A list of image tensors, with a list of masks (or None for each), gives a list of
        dicts from one packed pass.
        """
        if isinstance(x, (list, tuple)):
            return self.forward_features_list(x, masks)
        tokens = self._run_blocks(self.prepare_tokens_with_masks(x, masks))
        return self._features(tokens, self.norm(tokens), masks)

    def forward_features_list(
        self, x_list: Sequence[Tensor], masks_list: Sequence[Tensor | None] | None = None
    ) -> list[dict[str, Tensor | None]]:
        """`forward_features` of several image tensors in one packed pass, one dict for each."""
        masks = _check_masks(masks_list, len(x_list))
        groups = [self.prepare_tokens_with_masks(x, m) for x, m in zip(x_list, masks, strict=True)]
        if not self._packs_crops:
            groups = [self._run_blocks(group) for group in groups]
            return [self._features(group, self.norm(group), mask) for group, mask in zip(groups, masks, strict=True)]
        tokens, layout = pack(groups)
        tokens = self._run_blocks(tokens, layout)
        outputs = zip(unpack(tokens, layout), unpack(self.norm(tokens), layout), masks, strict=True)
        return [self._features(prenorm, normed, mask) for prenorm, normed, mask in outputs]

    def _run_blocks(self, tokens: Tensor, layout: PackedLayout | None = None) -> Tensor:
        for block in self.blocks:
            tokens = block(tokens) if layout is None else block(tokens, layout)
        return tokens

    def _features(self, prenorm: Tensor, normed: Tensor, masks: Tensor | None) -> dict[str, Tensor | None]:
        patches_from = 1 + self.num_register_tokens
        return {
            "x_norm_clstoken": normed[:, 0],
            "x_norm_regtokens": normed[:, 1:patches_from],
            "x_norm_patchtokens": normed[:, patches_from:],
            "x_prenorm": prenorm,
            "masks": masks,
        }

    def prepare_tokens_with_masks(self, x: Tensor, masks: Tensor | None = None) -> Tensor:
        """Images `[B, C, H, W]` -> tokens `[B, 1+R+N, D]` in front of the first block."""
        height, width = x.shape[-2:]
        patches = self.patch_embed(x)  # [B, N, D]
        cls_token: Tensor = self.cls_token
        if masks is not None:
            _check_mask(masks, patches)
            patches = torch.where(masks[..., None], self.mask_token.to(patches.dtype)[None], patches)
        elif torch.is_grad_enabled() and self.mask_token.requires_grad and not is_recording():
            # A part of the graph with weight zero: DistributedDataParallel wants a gradient for every parameter.
            cls_token = cls_token + 0.0 * self.mask_token.sum()
        tokens = torch.cat([cls_token.expand(patches.shape[0], -1, -1), patches], dim=1)
        tokens = tokens + self.interpolate_pos_encoding(tokens, height, width)
        if self.register_tokens is not None:
            registers = self.register_tokens.expand(patches.shape[0], -1, -1)
            tokens = torch.cat([tokens[:, :1], registers, tokens[:, 1:]], dim=1)
        return tokens

    def interpolate_pos_encoding(self, x: Tensor, h: int, w: int) -> Tensor:
        """Position embedding `[1, 1+N, D]` for images of `h` x `w` pixels, in the type of the tokens `x`."""
        position = resize_pos_embed(
            self.pos_embed,
            self._native_grid(),
            self.patch_grid(h, w),
            offset=self.interpolate_offset,
            antialias=self.interpolate_antialias,
        )
        return position.to(x.dtype)

    def patch_grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patch tokens for images of `height` x `width` pixels."""
        if isinstance(self.patch_embed, PatchEmbed):
            return self.patch_embed.grid(height, width)
        return height // self.patch_size, width // self.patch_size

    def set_stride(self, stride: int) -> None:
        """Distance between patches in pixels: less than the patch size gives overlapping patches, denser features.

        Weights stay as they are, cost grows with the number of tokens. Raises `ValueError` for a stride that is no
        divisor of the patch size.
        """
        if stride < 1 or self.patch_size % stride:
            divisors = [str(step) for step in range(1, self.patch_size + 1) if self.patch_size % step == 0]
            raise ValueError(f"stride is {stride}; choose a divisor of the patch size, one of {', '.join(divisors)}")
        self.patch_embed.proj.stride = (stride, stride)

    def _native_grid(self) -> tuple[int, int]:
        """Grid of the learned positions; square when they were replaced by others than the patch embedding knows."""
        rows, columns = getattr(self.patch_embed, "patches_resolution", (0, 0))
        # A recorded graph takes the number of positions for a variable, on which nothing may depend.
        if (is_recording() and rows) or rows * columns == self.pos_embed.shape[1] - 1:
            return rows, columns
        return (math.isqrt(self.pos_embed.shape[1] - 1),) * 2

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_class_token: bool = False,
        norm: bool = True,
        return_register_tokens: bool = False,
    ) -> tuple[Any, ...]:
        """Patch tokens of the last `n` blocks, or of the blocks with the given indices, in ascending order.

        Each is `[B, N, D]`, or `[B, D, h, w]` with `reshape`, after the model's final norm unless `norm=False`.
        `return_class_token` makes pairs with `[B, D]`; `return_register_tokens` appends `[B, R, D]`. Negative indices
        count from the end; blocks behind the last one asked for are not run.
        """
        chosen = _check_intermediate_layers(n, self.n_blocks)
        tokens = self.prepare_tokens_with_masks(x)
        outputs = []
        for index, block in enumerate(self.block_list[: max(chosen, default=-1) + 1]):
            tokens = block(tokens)
            if index in chosen:
                outputs.append(self.norm(tokens) if norm else tokens)
        grid = self.patch_grid(*x.shape[-2:])
        patches_from = 1 + self.num_register_tokens
        layers: list[Any] = []
        for output in outputs:
            patches = output[:, patches_from:]
            if reshape:
                patches = patches.unflatten(1, grid).permute(0, 3, 1, 2).contiguous()
            parts = (patches,)
            parts += (output[:, 0],) if return_class_token else ()
            parts += (output[:, 1:patches_from],) if return_register_tokens else ()
            layers.append(parts if len(parts) > 1 else patches)
        return tuple(layers)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        _rename_blocks(state_dict, prefix, self.n_blocks // len(self.blocks) if self.chunked_blocks else 0)
        super()._load_from_state_dict(state_dict, prefix, *rest)
        errors: list[str] = rest[-1]
        name = f"{prefix}pos_embed"
        for index, error in enumerate(errors):
            if error.startswith(f"size mismatch for {name}:") and state_dict[name].shape[2:] == (self.embed_dim,):
                errors[index] = self._explain_positions(name, state_dict[name].shape[1] - 1)

    def _explain_positions(self, name: str, n_positions: int) -> str:
        side = math.isqrt(n_positions)
        pixels = side * self.patch_size if side**2 == n_positions else "(height, width)"
        return (
            f"{name} holds the positions of {n_positions} patches, this model has {self.pos_embed.shape[1] - 1}: build "
            f"it with img_size={pixels}, the size that the weights were made for; images of any size can be given then"
        )


class BlockChunk(nn.ModuleList):
    """Consecutive blocks under the keys of training files; a call runs them in order."""

    def forward(self, x: object, layout: PackedLayout | None = None) -> object:
        """Apply the blocks to tokens `[B, T, D]`, a list of them, or packed rows with their layout."""
        for block in self:
            if not isinstance(block, nn.Identity):
                x = block(x) if layout is None else block(x, layout)
        return x


def _chunks(blocks: list[nn.Module], n_chunks: int) -> list[BlockChunk]:
    """Groups of equal size; identities in front keep the global index of each block in its key."""
    size = len(blocks) // n_chunks
    return [
        BlockChunk([*(nn.Identity() for _ in range(start)), *blocks[start : start + size]])
        for start in range(0, len(blocks), size)
    ]


def _rename_blocks(state_dict: dict[str, object], prefix: str, chunk_size: int) -> None:
    """Rewrites `blocks.<i>.` and `blocks.<chunk>.<i>.` keys in place to the wanted form; 0 means flat."""
    pattern = re.compile(re.escape(prefix) + r"blocks\.(?:\d+\.)?(\d+)\.(\D.*)")
    for key in list(state_dict):
        if match := pattern.fullmatch(key):
            index, rest = int(match[1]), match[2]
            chunk = f"{index // chunk_size}." if chunk_size else ""
            state_dict[f"{prefix}blocks.{chunk}{index}.{rest}"] = state_dict.pop(key)


def _check_mask(mask: Tensor, patches: Tensor) -> None:
    """A mask for patch tokens `[B, N, D]` is boolean `[B, N]`; raises `ValueError` for another."""
    if not is_recording() and (mask.dtype != torch.bool or mask.shape != patches.shape[:2]):
        raise ValueError(
            f"masks are {mask.dtype} of the shape {list(mask.shape)}; give booleans [B, N] = {list(patches.shape[:2])}"
        )


def _check_masks(masks: Sequence[Tensor | None] | None, n_images: int) -> list[Tensor | None]:
    """One mask (or None) for each image tensor of a list; raises `ValueError` when the counts differ."""
    if masks is None:
        return [None] * n_images
    if isinstance(masks, Tensor) or len(masks) != n_images:
        got = "one tensor" if isinstance(masks, Tensor) else f"{len(masks)} masks"
        raise ValueError(f"{n_images} image tensors came with {got}; give a list with a mask or None for each")
    return list(masks)


def _check_intermediate_layers(n: int | Sequence[int], depth: int) -> set[int]:
    """Block indices meant by `n`: its last `n`, or the ones listed; raises `ValueError` when one does not exist."""
    if isinstance(n, int):
        if not 0 <= n <= depth:
            raise ValueError(f"n is {n}; this model has {depth} blocks")
        return set(range(depth - n, depth))
    chosen = {index + depth if index < 0 else index for index in n}
    if len(chosen) != len(list(n)) or not chosen <= set(range(depth)):
        raise ValueError(f"only distinct blocks 0 to {depth - 1} exist in this model, got n={list(n)}")
    return chosen


def _linear_rates(rate: float, depth: int) -> list[float]:
    """`numpy.linspace(0, rate, depth)` bit for bit: one rounding more changes how many samples a block keeps."""
    step = rate / max(depth - 1, 1)
    return [*(step * index for index in range(depth - 1)), rate if depth > 1 else 0.0]


def vit_nano(patch_size: int = 16, num_register_tokens: int = 0, **options: object) -> DinoVisionTransformer:
    """128 wide, 4 blocks, 2 heads: learns on a laptop within minutes."""
    return _build("vit_nano", patch_size, num_register_tokens, options)


def vit_micro(patch_size: int = 16, num_register_tokens: int = 0, **options: object) -> DinoVisionTransformer:
    """192 wide, 6 blocks, 3 heads."""
    return _build("vit_micro", patch_size, num_register_tokens, options)


def vit_tiny(patch_size: int = 16, num_register_tokens: int = 0, **options: object) -> DinoVisionTransformer:
    """192 wide, 12 blocks, 3 heads."""
    return _build("vit_tiny", patch_size, num_register_tokens, options)


def vit_small(patch_size: int = 16, num_register_tokens: int = 0, **options: object) -> DinoVisionTransformer:
    """ViT-S: 384 wide, 12 blocks, 6 heads."""
    return _build("vit_small", patch_size, num_register_tokens, options)


def vit_base(patch_size: int = 16, num_register_tokens: int = 0, **options: object) -> DinoVisionTransformer:
    """ViT-B: 768 wide, 12 blocks, 12 heads."""
    return _build("vit_base", patch_size, num_register_tokens, options)


def vit_large(patch_size: int = 16, num_register_tokens: int = 0, **options: object) -> DinoVisionTransformer:
    """ViT-L: 1024 wide, 24 blocks, 16 heads."""
    return _build("vit_large", patch_size, num_register_tokens, options)


def vit_giant2(patch_size: int = 16, num_register_tokens: int = 0, **options: object) -> DinoVisionTransformer:
    """ViT-g: 1536 wide, 40 blocks, 24 heads; the releases use it with `ffn_layer="swiglufused"`."""
    return _build("vit_giant2", patch_size, num_register_tokens, options)


def _build(arch: str, patch_size: int, num_register_tokens: int, options: dict[str, object]) -> DinoVisionTransformer:
    settings = {**ARCHITECTURES[arch]._asdict(), "mlp_ratio": 4.0, **options}
    return DinoVisionTransformer(patch_size=patch_size, num_register_tokens=num_register_tokens, **settings)
