"""Models of other libraries behind one small adapter, so that they can be used and compared like ours.

`timm:NAME` is a model of timm with its published weights (`timm:NAME?random` with random ones), `hf:ID` a vision model
of transformers from a hub id or folder, `module:function` whatever a function of yours returns: a module from images
`[B, 3, H, W]` to features `[B, D]`, to tokens `[B, T, D]`, or to the dictionary of `forward_features`.
"""

import importlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from dinov2.data.eval_transform import EvalTransform
from dinov2.encode.tokens import Tokens, split_tokens
from dinov2.errors import ConfigError, MissingDependency, WeightsError

__all__ = ["ExternalModel", "is_external_model", "load_external_model"]


class ExternalModel(nn.Module):
    """A model of another library: images `[B, 3, H, W]` -> `[B, D]` by call, all tokens by `tokens`."""

    def __init__(
        self, model: nn.Module, *, patch_size: int, transform: EvalTransform, n_blocks: int | None = None
    ) -> None:
        super().__init__()
        self.model, self.patch_size, self.transform, self.n_blocks = model, patch_size, transform, n_blocks

    def forward(self, images: Tensor) -> Tensor:
        """The class token, or what stands for the whole image, `[B, D]`."""
        return self.tokens(images).cls

    def tokens(self, images: Tensor, layers: Sequence[int] = ()) -> Tokens:
        """Tokens of images `[B, 3, H, W]`; raises `ConfigError` where a model does not show what was asked for."""
        if layers:
            raise ConfigError(f"a {type(self.model).__name__} does not show its layers; ask for none")
        return self._read(self.model(images), images)

    def _read(self, output: Any, images: Tensor) -> Tokens:
        grid = images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size
        if isinstance(output, Mapping) and "x_norm_clstoken" in output:
            return Tokens.from_output(output, grid)
        if isinstance(output, Tensor) and output.ndim == 3:
            return split_tokens(output, grid, has_cls=output.shape[1] > grid[0] * grid[1])
        if isinstance(output, Tensor) and output.ndim == 4:  # [B, D, h, w]
            return _with_prefix(output, output.new_zeros(len(output), 0, output.shape[1]))
        if isinstance(output, Tensor) and output.ndim == 2:
            nothing = output.new_zeros(len(output), 0, output.shape[1])
            return Tokens(output, nothing, output.new_zeros(len(output), 0, 0, output.shape[1]), {})
        got = f"shape {list(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
        raise ConfigError(f"the model returned {got}; features need [B, D], tokens [B, T, D] or maps [B, D, h, w]")


class _Timm(ExternalModel):
    def tokens(self, images: Tensor, layers: Sequence[int] = ()) -> Tokens:
        model: Any = self.model
        if not layers:
            return self._final(model.forward_features(images), images)
        depth = len(getattr(model, "blocks", ()))
        chosen = {index: index + depth if index < 0 else index for index in layers}
        blocks = sorted(set(chosen.values()))
        if not hasattr(model, "forward_intermediates") or not set(blocks) <= set(range(depth)):
            raise ConfigError(f"{type(model).__name__} does not show the blocks {list(layers)}; it has {depth}")
        final, outputs = model.forward_intermediates(images, indices=blocks, norm=True, return_prefix_tokens=True)
        tokens = {block: _with_prefix(*output) for block, output in zip(blocks, outputs, strict=True)}
        return self._final(final, images)._replace(layers={index: tokens[block] for index, block in chosen.items()})

    def _final(self, output: Tensor, images: Tensor) -> Tokens:
        model: Any = self.model
        prefix = int(getattr(model, "num_prefix_tokens", 0))
        if output.ndim == 3:
            grid = images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size
            return split_tokens(output, grid, has_cls=prefix > 0)
        channels_last = getattr(model, "output_fmt", "NCHW") == "NHWC"
        tokens = self._read(output.permute(0, 3, 1, 2) if channels_last else output, images)
        return tokens._replace(cls=model.forward_head(output, pre_logits=True))


class _HuggingFace(ExternalModel):
    def tokens(self, images: Tensor, layers: Sequence[int] = ()) -> Tokens:
        output = self.model(pixel_values=images, output_hidden_states=bool(layers))
        tokens = self._sequence(output.last_hidden_state, images)
        if not layers:
            return tokens
        states = output.hidden_states
        norm = next((getattr(self.model, name) for name in ("layernorm", "norm") if hasattr(self.model, name)), None)
        found = {}
        for index in layers:
            block = index + len(states) - 1 if index < 0 else index
            if not 0 <= block < len(states) - 1:
                raise ConfigError(f"there is no block {index}; this model has blocks 0 to {len(states) - 2}")
            state = states[block + 1]
            found[index] = self._sequence(norm(state) if norm is not None else state, images)
        return tokens._replace(layers=found)

    def _sequence(self, sequence: Tensor, images: Tensor) -> Tokens:
        grid = images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size
        if sequence.ndim == 4:
            return self._read(sequence, images)
        return split_tokens(sequence, grid, has_cls=sequence.shape[1] > grid[0] * grid[1])


def _with_prefix(maps: Tensor, prefix: Tensor) -> Tokens:
    """Tokens of maps [B, D, h, w] and of the class token and registers before them [B, P, D], of which P may be 0."""
    patches = maps.permute(0, 2, 3, 1)
    has_cls = prefix.shape[1] > 0
    return Tokens(prefix[:, 0] if has_cls else patches.mean(dim=(1, 2)), prefix[:, int(has_cls) :], patches, {})


def is_external_model(source: str) -> bool:
    """Whether `source` names a model of another library: `timm:`, `hf:` or `module:function`."""
    head, colon, tail = source.partition(":")
    if not colon or tail.startswith(("//", "\\")) or len(head) == 1:  # a URL, or a path on Windows
        return False
    return head in ("timm", "hf") or (tail.isidentifier() and all(part.isidentifier() for part in head.split(".")))


def load_external_model(source: str) -> ExternalModel:
    """The model that `source` names, in eval mode on the CPU.

    Raises `MissingDependency`, `WeightsError` when the library has no such model or cannot fetch it, `ConfigError`
    when a function of yours gives no model.
    """
    head, _, tail = source.partition(":")
    loader = {"timm": _load_timm, "hf": _load_hf}.get(head)
    return (loader(tail) if loader else _load_function(head, tail)).eval()


def _load_timm(name: str) -> ExternalModel:
    try:
        import timm
        import timm.data
    except ImportError as error:
        raise MissingDependency("timm>=1.0", f"the model timm:{name}") from error
    name, _, option = name.partition("?")
    if option not in ("", "random"):
        raise ConfigError(f"timm:{name}?{option} is not understood; write timm:{name}, or timm:{name}?random")
    options: dict[str, Any] = {"pretrained": not option, "num_classes": 0}
    try:
        try:
            model: Any = timm.create_model(name, dynamic_img_size=True, **options)
        except TypeError:  # not a transformer with a position grid
            model = timm.create_model(name, **options)
    except Exception as error:  # an unknown name, no network, a broken download: each library layer has its own
        raise WeightsError(
            f"timm has no model {name!r} to give ({_first_line(error)}); check the name and the network"
        ) from error
    libraries: Any = timm  # its functions have no types
    data = libraries.data.resolve_model_data_config(model)
    crop = int(data["input_size"][-1])
    embed = getattr(model, "patch_embed", None)
    sizes: Any = getattr(embed, "patch_size", None)
    reduction: Any = model.feature_info[-1]["reduction"] if getattr(model, "feature_info", None) else 1
    patch = int(sizes[0]) if sizes is not None else int(reduction)
    transform = EvalTransform(
        crop_size=crop,
        resize_size=round(crop / data["crop_pct"]),
        mean=data["mean"],
        std=data["std"],
        patch_size=patch,
    )
    blocks = len(model.blocks) if hasattr(model, "blocks") else None
    return _Timm(model, patch_size=patch, transform=transform, n_blocks=blocks)


def _load_hf(identifier: str) -> ExternalModel:
    try:
        import transformers
    except ImportError as error:
        raise MissingDependency("transformers>=4.56", f"the model hf:{identifier}") from error
    try:
        model = transformers.AutoModel.from_pretrained(identifier)
    except Exception as error:  # an unknown id, no network, a file that is not whole
        raise WeightsError(
            f"transformers cannot load {identifier!r} ({_first_line(error)}); check the id or folder and the network"
        ) from error
    config = model.config
    patch = int(getattr(config, "patch_size", 1) or 1)
    try:
        automatic: Any = transformers.AutoImageProcessor
        processor = automatic.from_pretrained(identifier)
    except Exception:  # without a preprocessor file the size of the configuration and our usual values have to do
        size = int(getattr(config, "image_size", 224))
        transform = EvalTransform(crop_size=min(size, 224) // patch * patch or patch, patch_size=patch)
    else:
        transform = _transform_from(processor, patch)
    blocks = getattr(config, "num_hidden_layers", None)
    return _HuggingFace(model, patch_size=patch, transform=transform, n_blocks=blocks)


def _transform_from(processor: Any, patch: int) -> EvalTransform:
    def side(value: Any) -> int:
        value = dict(value) if value is not None else {}
        return int(value.get("shortest_edge") or value.get("height") or 0)

    resize = side(getattr(processor, "size", None)) if getattr(processor, "do_resize", True) else 0
    crop = side(getattr(processor, "crop_size", None)) if getattr(processor, "do_center_crop", False) else 0
    colours = {}
    if getattr(processor, "do_normalize", True):
        colours = {"mean": processor.image_mean, "std": processor.image_std}
    return EvalTransform(crop_size=crop or resize or 224, resize_size=resize, patch_size=patch, **colours)


def _load_function(module: str, name: str) -> ExternalModel:
    source = f"{module}:{name}"
    try:
        function = getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{source} cannot be imported ({error}); start where the module lies, or set PYTHONPATH"
        ) from error
    except AttributeError as error:
        known = [entry for entry in vars(sys.modules[module]) if not entry.startswith("_")]
        raise ConfigError(f"the module {module} has no {name!r}; it has {', '.join(known[:5]) or 'nothing'}") from error
    model = function()
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{source} returned a {type(model).__name__}; it must return a torch.nn.Module")
    if isinstance(model, ExternalModel):
        return model
    sizes: Any = getattr(getattr(model, "patch_embed", None), "patch_size", getattr(model, "patch_size", 1))
    patch = int(sizes[0] if isinstance(sizes, (tuple, list)) else sizes)
    transform = getattr(model, "transform", None) or EvalTransform(patch_size=patch)
    return ExternalModel(model, patch_size=patch, transform=transform)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
