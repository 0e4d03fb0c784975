"""What all DINOv2 models have of `PreTrainedModel`: loading defaults, starting values, pruned heads, common answers."""

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from dinov2.errors import WeightsError
from dinov2.hf.arguments import fitting, without_none
from dinov2.hf.configuration import Dinov2Config, Dinov2WithRegistersConfig
from dinov2.hf.embeddings import Dinov2Embeddings
from dinov2.hf.layers import Dinov2LayerScale
from dinov2.hf.naming import (
    files_with_names_in_memory,
    has_names_in_memory,
    read_with_names_on_disk,
    refuse_adapter,
    with_names_on_disk,
)

try:
    from transformers import initialization as init
except ImportError:  # transformers 4
    from torch.nn import init

__all__ = ["Dinov2PreTrainedModel", "Dinov2WithRegistersPreTrainedModel", "Trunk"]


# Arguments of `from_pretrained` that a configuration would take for its own.
_OF_THE_LOADER = (
    "attn_implementation", "dtype", "torch_dtype", "output_loading_info", "quantization_config", "variant",
    "use_safetensors",
)  # fmt: skip


class Dinov2PreTrainedModel(PreTrainedModel):  # type: ignore[misc]
    """Base of the models without registers, and of models that users build on them."""

    config_class: ClassVar[Any] = Dinov2Config
    base_model_prefix = "dinov2"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["Dinov2Embeddings", "Dinov2Layer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flash_attn_2 = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; the type of the weights is the checkpoint's unless `dtype` says otherwise.

        Raises `WeightsError` for names of tensors that would leave the blocks without weights.
        """
        if "dtype" not in kwargs and "torch_dtype" not in kwargs:
            # Version 4 would take float32, and takes a config's text for a type.
            stated = getattr(kwargs.get("config"), "dtype", None)
            kwargs["dtype"] = stated if isinstance(stated, str) else "auto"
        if kwargs.get("state_dict") is not None:
            kwargs["state_dict"] = with_names_on_disk(kwargs["state_dict"])
        files = files_with_names_in_memory(
            pretrained_model_name_or_path, kwargs.get("subfolder", ""), kwargs.get("variant")
        )
        if not files:
            wants_info = kwargs.pop("output_loading_info", False)
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
            )
            if has_names_in_memory(info["unexpected_keys"]):
                raise WeightsError(
                    f"{pretrained_model_name_or_path} holds weights by the names that transformers has in memory since "
                    "5.18 (q_proj, gate_proj), which are read from local folders only; download the repository and "
                    "load its folder, or read the file yourself and pass it as state_dict"
                )
            return (model, info) if wants_info else model
        config = kwargs.pop("config", None)
        if not isinstance(config, PretrainedConfig):
            loading = {name: kwargs.pop(name) for name in _OF_THE_LOADER if name in kwargs}
            config, kwargs = cls.config_class.from_pretrained(
                config or pretrained_model_name_or_path, return_unused_kwargs=True, **kwargs
            )
            kwargs.update(loading)
        for name in ("subfolder", "variant", "use_safetensors"):
            kwargs.pop(name, None)
        return super().from_pretrained(None, *args, config=config, state_dict=read_with_names_on_disk(files), **kwargs)

    def load_adapter(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; raises `WeightsError` when tensors of the adapter would be left out."""
        info = super().load_adapter(*args, **kwargs)
        refuse_adapter(getattr(info, "unexpected_keys", ()))
        return info

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether blocks are computed again in the backward pass.

        PEFT asks for it, and tracing reads every property; that of the newest transformers warns that it was renamed.
        """
        return any(getattr(module, "gradient_checkpointing", False) for module in self.modules())

    def get_input_embeddings(self) -> nn.Module:
        """The patch embedding."""
        embeddings: nn.Module = self._with_embeddings().embeddings.patch_embeddings
        return embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the patch embedding."""
        self._with_embeddings().embeddings.patch_embeddings = value

    def prune_heads(self, heads_to_prune: Mapping[int, Iterable[int]]) -> None:
        """Takes attention heads out for good: layer -> heads, counted in the whole model.

        They are noted in `config.pruned_heads`, so that a saved model loads again.
        """
        model = self._with_embeddings()
        noted = {int(layer): set(heads) for layer, heads in (getattr(self.config, "pruned_heads", None) or {}).items()}
        for layer, heads in heads_to_prune.items():
            if not 0 <= int(layer) < len(model.encoder.layer):
                raise ValueError(f"there is no layer {layer}: the model has layers 0 to {len(model.encoder.layer) - 1}")
            model.encoder.layer[int(layer)].attention.prune_heads(list(heads))
            noted[int(layer)] = noted.get(int(layer), set()) | set(heads)
        self.config.pruned_heads = {layer: sorted(heads) for layer, heads in noted.items() if heads}

    def count_registers(self) -> int:
        """The tokens between class token and patches: none in this family."""
        return 0

    def prune_as_configured(self) -> None:
        """Prunes what the config notes; constructors call it, before weights are loaded."""
        pruned = getattr(self.config, "pruned_heads", None)
        if pruned:
            self.prune_heads(pruned)

    def required(self, pixel_values: Any) -> Tensor:
        """The images, or `ValueError` when there are none."""
        if pixel_values is None:
            raise ValueError("You have to specify pixel_values, the images [B, C, H, W]; an image processor makes them")
        if not isinstance(pixel_values, Tensor):
            raise TypeError(f"pixel_values is a {type(pixel_values).__name__}; give a tensor [B, C, H, W]")
        return pixel_values

    def wants_dict(self, asked: bool | None) -> bool:
        """Whether a call returns an output object: as asked, else as configured."""
        if asked is not None:
            return bool(asked)
        as_configured = getattr(self.config, "return_dict", True)
        return bool(as_configured or as_configured is None) and not getattr(self.config, "torchscript", False)

    def encoder_options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Keyword arguments of the encoder: those of a call that are not None, and the flags that the config sets."""
        flags = {name: getattr(self.config, name, False) for name in ("output_attentions", "output_hidden_states")}
        options = {**flags, **without_none(**given)}
        return {name: value for name, value in options.items() if value is not False}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        spread = self.config.initializer_range
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            init.trunc_normal_(module.weight, mean=0.0, std=spread)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, Dinov2Embeddings):
            init.trunc_normal_(module.position_embeddings, mean=0.0, std=spread)
            init.trunc_normal_(module.cls_token, mean=0.0, std=spread)
            for token in (module.mask_token, getattr(module, "register_tokens", None)):
                if token is not None:
                    init.zeros_(token)
        elif isinstance(module, Dinov2LayerScale):
            init.constant_(module.lambda1, self.config.layerscale_value)
        else:  # norms, and whatever the head of a user is made of: models are built without values and filled here
            super()._init_weights(module)
            if getattr(module, "running_mean", None) is not None:  # which version 4 leaves out
                init.zeros_(module.running_mean)
                init.ones_(module.running_var)
                init.zeros_(module.num_batches_tracked)

    def _with_embeddings(self) -> Any:
        """The module that holds embeddings and encoder: this one, or the backbone inside a model with a head."""
        return self if hasattr(self, "embeddings") else self.base_model


class Dinov2WithRegistersPreTrainedModel(Dinov2PreTrainedModel):
    """Base of the models with registers, and of models that users build on them."""

    config_class = Dinov2WithRegistersConfig
    base_model_prefix = "dinov2_with_registers"
    _no_split_modules: ClassVar[list[str]] = ["Dinov2WithRegistersEmbeddings", "Dinov2WithRegistersLayer"]

    def count_registers(self) -> int:
        """The tokens between class token and patches, by the config."""
        return int(self.config.num_register_tokens)


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
        rows, columns = self.embeddings.patch_grid(*images.shape[-2:])
        return fitting(
            batch=images.shape[0],
            tokens=1 + self.count_registers() + rows * columns,
            heads=self.config.num_attention_heads,
            layers=self.config.num_hidden_layers,
            labels=labels,
        )
