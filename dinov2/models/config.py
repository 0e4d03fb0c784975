"""The architecture of a backbone as typed, validated values (`BackboneConfig`), and as the `model` table of files.

Files written here carry the table (position rule and normalisation included), so that nobody has to remember with which
options weights were trained. A table from a file is never trusted: each entry is checked before anything is built.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from dinov2.errors import WeightsError, short_repr
from dinov2.models.vision_transformer import DinoVisionTransformer

__all__ = ["TABLE_VERSION", "BackboneConfig", "build_from_table", "model_table", "ratio_for"]

TABLE_VERSION = 1
"""Version of the tables that this package writes and reads."""

_FEED_FORWARD = ("mlp", "swiglu", "swiglufused", "identity")
# Far beyond any model, and small enough that a module on the meta device is built at once.
_LARGEST = 1 << 20
_DEEPEST = 1000


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
    def from_table(cls, table: Mapping[str, Any], *, source: str = "the model table of this file") -> "BackboneConfig":
        """The architecture in a `model` table; raises `WeightsError`, naming `source`, for a table of none."""
        if table.get("version") != TABLE_VERSION:
            raise WeightsError(
                f"{source} has version {short_repr(table.get('version'))}, this package reads {TABLE_VERSION}; "
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
    def from_model(cls, model: DinoVisionTransformer, *, mean: Any = None, std: Any = None) -> "BackboneConfig":
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

    def table(self) -> dict[str, Any]:
        """Plain values, as files hold them."""
        values = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        return {"version": TABLE_VERSION, **values}

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


def model_table(model: DinoVisionTransformer, *, mean: Any = None, std: Any = None) -> dict[str, Any]:
    """Plain values from which `build_from_table` makes the same architecture again."""
    return BackboneConfig.from_model(model, mean=mean, std=std).table()


def build_from_table(table: Mapping[str, Any]) -> DinoVisionTransformer:
    """A fresh model of the architecture in a `model` table; blocks in a flat list.

    Raises `WeightsError` for a table of another version, or one that describes no model.
    """
    return BackboneConfig.from_table(table).build()


def ratio_for(hidden: int, width: int) -> float:
    """The `mlp_ratio` with which a transformer of that width gets exactly `hidden` features."""
    ratio = hidden / width
    # The product is cut, not rounded: 61 / 448 * 448 falls just short of 61.
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def _is_whole(value: Any, smallest: int, largest: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and smallest <= value <= largest


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and -_LARGEST <= value <= _LARGEST  # which is false of what is no number


def _last_linear_has_bias(feed_forward: Any) -> bool:
    last = getattr(feed_forward, "w3", getattr(feed_forward, "fc2", None))
    return last is None or last.bias is not None
