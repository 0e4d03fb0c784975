"""Architecture of a backbone as typed, validated values: from a `model` table, a model, or bare tensors.

Files written here carry the table (position rule and normalisation included), so that nobody has to remember with which
options weights were trained. A table from a file is never trusted: each entry is checked before anything is built.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from torch import Tensor

from dinov2.errors import WeightsError, short_repr
from dinov2.models.vision_transformer import DinoVisionTransformer

__all__ = ["BackboneConfig", "ratio_for"]

_TABLE_VERSION = 1

_FEED_FORWARD = ("mlp", "swiglu", "swiglufused", "identity")
# Far beyond any model, and small enough that a module on the meta device is built at once.
_LARGEST = 1 << 20
_DEEPEST = 1000
_HEAD_WIDTH = 64
# Flat or chunked: the last number is the index among all blocks.
_BLOCK = re.compile(r"(blocks\.(?:[0-9]{1,9}\.)?([0-9]{1,9})\.)norm1\.weight")


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """Architecture of a backbone. Raises `WeightsError` for values that no backbone can have."""

    img_size: tuple[int, int]
    """Height and width in pixels of the images that the position embeddings were made for."""
    patch_size: int
    in_chans: int
    embed_dim: int
    depth: int
    num_heads: int
    mlp_ratio: float
    ffn_layer: str
    qkv_bias: bool
    proj_bias: bool
    ffn_bias: bool
    layerscale: bool
    num_register_tokens: int
    interpolate_offset: float
    interpolate_antialias: bool
    mean: tuple[float, ...] | None = None
    """Normalisation of the images, one value or one for each channel; None where it is not known."""
    std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for key in ("patch_size", "in_chans", "embed_dim", "depth", "num_heads"):
            self._check(key, _is_whole(getattr(self, key), 1, _DEEPEST if key == "depth" else _LARGEST))
        self._check("num_register_tokens", _is_whole(self.num_register_tokens, 0, _LARGEST))
        is_pair = isinstance(self.img_size, tuple) and len(self.img_size) == 2
        self._check("img_size", is_pair and all(_is_whole(side, self.patch_size, _LARGEST) for side in self.img_size))
        self._check("num_heads", self.embed_dim % self.num_heads == 0)
        self._check("ffn_layer", self.ffn_layer in _FEED_FORWARD)
        self._check("mlp_ratio", _is_number(self.mlp_ratio) and 1 <= self.embed_dim * self.mlp_ratio <= _LARGEST)
        for key in ("qkv_bias", "proj_bias", "ffn_bias", "layerscale", "interpolate_antialias"):
            self._check(key, isinstance(getattr(self, key), bool))
        self._check("interpolate_offset", _is_number(self.interpolate_offset) and self.interpolate_offset >= 0)
        for key in ("mean", "std"):
            values = getattr(self, key)
            lowest = 1e-6 if key == "std" else -math.inf
            self._check(
                key,
                values is None
                or (
                    isinstance(values, tuple)
                    and len(values) in (1, self.in_chans)
                    and all(_is_number(value) and value >= lowest for value in values)
                ),
            )

    @classmethod
    def from_table(
        cls, table: Mapping[str, object], *, source: str = "the model table of this file"
    ) -> "BackboneConfig":
        """The architecture in a `model` table; raises `WeightsError`, naming `source`, for a table of none."""
        if table.get("version") != _TABLE_VERSION:
            raise WeightsError(
                f"{source} has version {short_repr(table.get('version'))}, this package reads {_TABLE_VERSION}; "
                "update the package"
            )
        values: dict[str, Any] = {"mean": None, "std": None}
        values |= {field.name: table[field.name] for field in fields(cls) if field.name in table}
        for key in ("img_size", "mean", "std"):
            if isinstance(values.get(key), list):
                values[key] = tuple(values[key])
        try:
            if missing := [field.name for field in fields(cls) if field.name not in values]:
                raise WeightsError(f"{missing[0]!r} is missing")
            return cls(**values)
        except WeightsError as error:
            raise WeightsError(f"{source} describes no model ({error}); copy the file again") from error

    @classmethod
    def from_state_dict(
        cls, state: Mapping[str, Tensor], *, source: str = "the file", **known: object
    ) -> "BackboneConfig":
        """The architecture of backbone tensors under the release's keys.

        Two facts are in no tensor and follow the releases: heads are 64 wide, and models with registers resize
        positions by the size rule with antialias, those without by the offset rule. `known` overrides any value.
        Raises `WeightsError` where a tensor is missing that tells the architecture.
        """
        try:
            _, channels, _, patch = state["patch_embed.proj.weight"].shape
            _, tokens, dim = state["pos_embed"].shape
        except KeyError as error:
            linear = "; it looks like a linear head" if set(state) <= {"weight", "bias"} and state else ""
            raise WeightsError(
                f"{source} holds no vision transformer of this kind: {error.args[0]} is missing{linear}; "
                "give the weights of a DINOv2 backbone"
            ) from error
        except ValueError as error:
            raise WeightsError(
                f"{source} has patch or position weights of another shape; give a DINOv2 backbone"
            ) from error
        side = math.isqrt(max(tokens - 1, 0))
        if side * side != tokens - 1 and "img_size" not in known:
            raise WeightsError(
                f"{source} has a grid of {tokens - 1} positions, which is not square, and does not say its height and "
                "width; write a file that does with: dinov2 convert FILE NEW.pth --to original --img-size HEIGHT WIDTH"
            )
        if dim % _HEAD_WIDTH and "num_heads" not in known:
            raise WeightsError(
                f"{source} is {dim} wide, which heads of {_HEAD_WIDTH} channels do not fill; give a configuration with "
                "student.num_heads"
            )
        blocks = {int(match[2]): match[1] for key in state if (match := _BLOCK.fullmatch(key))}
        if 0 not in blocks:
            raise WeightsError(f"{source} holds no transformer blocks, or not the first one; copy or download it again")
        if len(blocks) != max(blocks) + 1:
            raise WeightsError(f"{source} holds {len(blocks)} of {max(blocks) + 1} transformer blocks; copy it again")
        first = blocks[0]
        try:
            registers = state["register_tokens"].shape[1] if "register_tokens" in state else 0
            feed_forward = _feed_forward(state, first, dim)
        except (IndexError, ZeroDivisionError) as error:
            raise WeightsError(
                f"{source} has weights of another shape than a DINOv2 backbone; copy it again"
            ) from error
        table = {
            "version": _TABLE_VERSION,
            "img_size": [side * patch, side * patch],
            "patch_size": patch,
            "in_chans": channels,
            "embed_dim": dim,
            "depth": max(blocks) + 1,
            "num_heads": max(dim // _HEAD_WIDTH, 1),
            **feed_forward,
            "qkv_bias": f"{first}attn.qkv.bias" in state,
            "proj_bias": f"{first}attn.proj.bias" in state,
            "layerscale": f"{first}ls1.gamma" in state,
            "num_register_tokens": registers,
            "interpolate_offset": 0.0 if registers else 0.1,
            "interpolate_antialias": bool(registers),
            **known,
        }
        return cls.from_table(table, source=source)

    @classmethod
    def from_model(
        cls, model: DinoVisionTransformer, *, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
    ) -> "BackboneConfig":
        """The architecture of a model, and the normalisation of its images where it is given."""
        block: Any = model.block_list[0]
        gated = hasattr(block.mlp, "w12")
        plain = getattr(getattr(block.mlp, "fc1", None), "out_features", 0)
        height, width = model.patch_embed.img_size
        hidden = block.mlp.w12.out_features // 2 if gated else plain
        return cls(
            img_size=(height, width),
            patch_size=model.patch_size,
            in_chans=model.patch_embed.in_chans,
            embed_dim=model.embed_dim,
            depth=model.n_blocks,
            num_heads=model.num_heads,
            mlp_ratio=ratio_for(hidden * 3 // 2 if gated else hidden, model.embed_dim) if hidden else 4.0,
            ffn_layer="swiglufused" if gated else "mlp" if hidden else "identity",
            qkv_bias=block.attn.qkv.bias is not None,
            proj_bias=block.attn.proj.bias is not None,
            ffn_bias=_last_linear_has_bias(block.mlp),
            layerscale=hasattr(block.ls1, "gamma"),
            num_register_tokens=model.num_register_tokens,
            interpolate_offset=model.interpolate_offset,
            interpolate_antialias=model.interpolate_antialias,
            mean=None if mean is None else tuple(mean),
            std=None if std is None else tuple(std),
        )

    @property
    def is_gated(self) -> bool:
        """Whether the feed-forward networks are SwiGLU."""
        return self.ffn_layer in ("swiglu", "swiglufused")

    def table(self) -> dict[str, Any]:
        """Plain values, as files hold them."""
        values = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        return {"version": _TABLE_VERSION, **values}

    def build(self) -> DinoVisionTransformer:
        """A fresh model of this architecture; blocks in a flat list."""
        return DinoVisionTransformer(
            img_size=self.img_size,
            patch_size=self.patch_size,
            in_chans=self.in_chans,
            embed_dim=self.embed_dim,
            depth=self.depth,
            num_heads=self.num_heads,
            mlp_ratio=self.mlp_ratio,
            ffn_layer=self.ffn_layer,
            qkv_bias=self.qkv_bias,
            proj_bias=self.proj_bias,
            ffn_bias=self.ffn_bias,
            init_values=1.0 if self.layerscale else None,
            block_chunks=0,
            num_register_tokens=self.num_register_tokens,
            interpolate_offset=self.interpolate_offset,
            interpolate_antialias=self.interpolate_antialias,
        )

    def _check(self, key: str, holds: bool) -> None:
        if not holds:
            raise WeightsError(f"{key} is {short_repr(getattr(self, key))}")


def ratio_for(hidden: int, width: int) -> float:
    """The `mlp_ratio` with which a transformer of that width gets exactly `hidden` features."""
    ratio = hidden / width
    # The product is cut, not rounded: 61 / 448 * 448 falls just short of 61.
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def _is_whole(value: object, smallest: int, largest: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and smallest <= value <= largest


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and -_LARGEST <= value <= _LARGEST  # which is false of what is no number


def _last_linear_has_bias(feed_forward: object) -> bool:
    last = getattr(feed_forward, "w3", getattr(feed_forward, "fc2", None))
    return last is None or last.bias is not None


def _feed_forward(state: Mapping[str, Tensor], block: str, dim: int) -> dict[str, object]:
    if f"{block}mlp.w12.weight" in state:
        hidden = state[f"{block}mlp.w12.weight"].shape[0] // 2
        # The width asked for before two thirds of it were kept, rounded up to 8.
        return {
            "ffn_layer": "swiglufused",
            "mlp_ratio": ratio_for(hidden * 3 // 2, dim),
            "ffn_bias": f"{block}mlp.w3.bias" in state,
        }
    if f"{block}mlp.fc1.weight" in state:
        hidden = state[f"{block}mlp.fc1.weight"].shape[0]
        return {"ffn_layer": "mlp", "mlp_ratio": ratio_for(hidden, dim), "ffn_bias": f"{block}mlp.fc1.bias" in state}
    return {"ffn_layer": "identity", "mlp_ratio": 4.0, "ffn_bias": True}
