"""Common base of all DINOv2 models: loading, starting values, pruned heads, reading of arguments."""

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from dinov2.errors import WeightsError
from dinov2.hf.arguments import argument_checks, merge_arguments, refuse_unknown
from dinov2.hf.configuration import Dinov2Config, Dinov2WithRegistersConfig
from dinov2.hf.encoder import Dinov2Embeddings
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

__all__ = ["Dinov2PreTrainedModel", "Dinov2WithRegistersPreTrainedModel"]

# Arguments of `from_pretrained` that a configuration would take for its own.
_OF_THE_LOADER = (
    "attn_implementation", "dtype", "torch_dtype", "output_loading_info", "quantization_config", "variant",
    "use_safetensors",
)  # fmt: skip


class Dinov2PreTrainedModel(PreTrainedModel):  # type: ignore[misc]
    """Base of the models without registers, and of models that users build on them."""

    config_class: ClassVar[type[Dinov2Config] | type[Dinov2WithRegistersConfig]] = Dinov2Config
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

    _has_registers: ClassVar[bool] = False
    _signatures: ClassVar[Sequence[Sequence[str]]] = ()  # positional arguments of `forward`, of every version
    _more_arguments: ClassVar[Sequence[str]] = ()  # which are given by keyword alone

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str] | None, *args: object, **kwargs: Any
    ) -> Any:
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

    def load_adapter(self, *args: object, **kwargs: object) -> object:
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

    @property
    def n_registers(self) -> int:
        """The tokens between class token and patches."""
        return int(self.config.num_register_tokens) if self._has_registers else 0

    def required(self, pixel_values: object) -> Tensor:
        """The images; raises an error when there are none."""
        if pixel_values is None:
            raise ValueError("You have to specify pixel_values, the images [B, C, H, W]; an image processor makes them")
        if not isinstance(pixel_values, Tensor):
            raise TypeError(f"pixel_values is a {type(pixel_values).__name__}; give a tensor [B, C, H, W]")
        return pixel_values

    def read_arguments(
        self, pixel_values: object, values: Sequence[object], unknown: Mapping[str, object], **named: object
    ) -> tuple[dict[str, Any], bool]:
        """The arguments of a call behind `pixel_values`, and whether it returns an output object."""
        what = type(self).__name__
        if unknown:
            refuse_unknown(unknown, (*self._more_arguments, *named), what=what)
        if values:
            images = self.required(pixel_values)
            rows, columns = self._with_embeddings().embeddings.patch_grid(*images.shape[-2:])
            fits = argument_checks(
                batch=images.shape[0],
                tokens=1 + self.n_registers + rows * columns,
                heads=self.config.num_attention_heads,
                layers=self.config.num_hidden_layers,
                labels=self.config.num_labels,
            )
            named = merge_arguments(values, named, self._signatures, fits, what=what)
        as_dict = named.pop("return_dict", None)
        if as_dict is None:
            as_configured = getattr(self.config, "return_dict", True)
            as_dict = as_configured is not False and not getattr(self.config, "torchscript", False)
        return named, bool(as_dict)

    def encoder_options(self, given: Mapping[str, object]) -> dict[str, Any]:
        """Keyword arguments of the encoder: those of a call that are not None, and the flags that the config sets."""
        options: dict[str, object] = {
            name: getattr(self.config, name, False) for name in ("output_attentions", "output_hidden_states")
        }
        options.update((name, value) for name, value in given.items() if value is not None)
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
    _has_registers = True
