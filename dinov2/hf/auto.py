"""Auto classes and `pipeline` that build this project's DINOv2 classes, and hand everything else to transformers.

The registry of transformers, which belongs to the whole process, is not touched; `dinov2.hf.register` does that.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import transformers
from transformers.utils import find_adapter_config_file, is_peft_available

from dinov2.hf.backbone import Dinov2Backbone, Dinov2WithRegistersBackbone
from dinov2.hf.configuration import Dinov2Config, Dinov2WithRegistersConfig
from dinov2.hf.models import (
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2WithRegistersForImageClassification,
    Dinov2WithRegistersModel,
)
from dinov2.hf.processing import BitImageProcessor, BitImageProcessorFast, BitImageProcessorPil, default_image_processor

__all__ = [
    "CONFIGS",
    "MODELS",
    "AutoBackbone",
    "AutoConfig",
    "AutoImageProcessor",
    "AutoModel",
    "AutoModelForImageClassification",
    "as_ours",
    "pipeline",
]

CONFIGS: dict[str, Any] = {"dinov2": Dinov2Config, "dinov2_with_registers": Dinov2WithRegistersConfig}
"""Model type of a `config.json` -> configuration class."""

MODELS: dict[str, dict[str, Any]] = {
    "AutoModel": {"dinov2": Dinov2Model, "dinov2_with_registers": Dinov2WithRegistersModel},
    "AutoModelForImageClassification": {
        "dinov2": Dinov2ForImageClassification,
        "dinov2_with_registers": Dinov2WithRegistersForImageClassification,
    },
    "AutoBackbone": {"dinov2": Dinov2Backbone, "dinov2_with_registers": Dinov2WithRegistersBackbone},
}
"""Name of an auto class -> model type -> model class."""

_PROCESSORS: dict[str, Any] = {
    "BitImageProcessor": default_image_processor(),
    "BitImageProcessorFast": BitImageProcessorFast,
    "BitImageProcessorPil": BitImageProcessorPil,
}
_TASKS = {"image-classification": "AutoModelForImageClassification", "image-feature-extraction": "AutoModel"}

# What every released repository says, for folders that say nothing.
_RELEASED_PREPROCESSING: dict[str, Any] = {
    "size": {"shortest_edge": 256},
    "crop_size": {"height": 224, "width": 224},
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}

# Of `from_pretrained`: where to look, which a configuration needs to know as well.
_WHERE = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder", "proxies")


class AutoConfig:
    """`from_pretrained` and `for_model` of transformers' class, with our configurations for DINOv2."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """The configuration of a folder or repository."""
        plain, _ = transformers.PretrainedConfig.get_config_dict(
            pretrained_model_name_or_path, **{name: kwargs[name] for name in _WHERE if name in kwargs}
        )
        ours = CONFIGS.get(str(plain.get("model_type")))
        return (ours or transformers.AutoConfig).from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def for_model(cls, model_type: str, *args: Any, **kwargs: Any) -> Any:
        """A fresh configuration of a model type."""
        ours = CONFIGS.get(model_type)
        return ours(*args, **kwargs) if ours else transformers.AutoConfig.for_model(model_type, *args, **kwargs)

    @staticmethod
    def register(model_type: str, config: Any, exist_ok: bool = False) -> None:
        """Makes a model type known, here and to transformers' class."""
        transformers.AutoConfig.register(model_type, config, exist_ok=exist_ok)
        if model_type in CONFIGS:
            CONFIGS[model_type] = config


class _Auto:
    _name: ClassVar[str]

    def __init__(self) -> None:
        raise OSError(f"{self._name} builds models and is none; use {self._name}.from_pretrained or .from_config")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """The model of a folder or repository with its weights; arguments are those of the model classes."""
        where = {name: kwargs[name] for name in _WHERE if name in kwargs}
        config = kwargs.get("config")
        if isinstance(config, (str, Path)):
            config = kwargs["config"] = AutoConfig.from_pretrained(config)
        model_type = getattr(config, "model_type", None) or _described(pretrained_model_name_or_path, where)[1]
        ours = MODELS[cls._name].get(str(model_type))
        if ours is None:
            theirs = getattr(transformers, cls._name)
            return theirs.from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        if config is not None:
            kwargs["config"] = as_ours(config)
        for not_needed in ("trust_remote_code", "code_revision", "use_timm_backbone"):
            kwargs.pop(not_needed, None)
        return ours.from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)

    @classmethod
    def from_config(cls, config: Any, **kwargs: Any) -> Any:
        """A model with fresh weights."""
        ours = MODELS[cls._name].get(str(getattr(config, "model_type", None)))
        if ours is None:
            return getattr(transformers, cls._name).from_config(config, **kwargs)
        kwargs.pop("trust_remote_code", None)
        return ours._from_config(as_ours(config), **kwargs)

    @classmethod
    def register(cls, config_class: Any, model_class: Any, exist_ok: bool = False) -> None:
        """Makes the model class of a configuration known, here and to transformers' class."""
        getattr(transformers, cls._name).register(config_class, model_class, exist_ok=exist_ok)
        for model_type, ours in CONFIGS.items():
            if config_class is ours:
                MODELS[cls._name][model_type] = model_class


class AutoModel(_Auto):
    """`transformers.AutoModel` with our classes for DINOv2."""

    _name = "AutoModel"


class AutoModelForImageClassification(_Auto):
    """`transformers.AutoModelForImageClassification` with our classes for DINOv2."""

    _name = "AutoModelForImageClassification"


class AutoBackbone(_Auto):
    """`transformers.AutoBackbone` with our classes for DINOv2; folders work, offline too."""

    _name = "AutoBackbone"


class AutoImageProcessor:
    """`transformers.AutoImageProcessor` with our classes for DINOv2."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """The processor of a folder or repository; a DINOv2 folder without one gets that of the released models."""
        where = {name: kwargs[name] for name in _WHERE if name in kwargs}
        try:
            plain, _ = BitImageProcessor.get_image_processor_dict(pretrained_model_name_or_path, **where)
        except OSError:
            if _described(pretrained_model_name_or_path, where)[1] not in CONFIGS:
                return transformers.AutoImageProcessor.from_pretrained(pretrained_model_name_or_path, **kwargs)
            settings = {name: value for name, value in kwargs.items() if name not in where}
            return default_image_processor().from_dict(_RELEASED_PREPROCESSING, **settings)
        kind = plain.get("image_processor_type") or plain.get("feature_extractor_type")
        ours = _PROCESSORS.get(str(kind))
        if kind is None and _described(pretrained_model_name_or_path, where)[1] in CONFIGS:
            ours = default_image_processor()
        if ours is None:
            return transformers.AutoImageProcessor.from_pretrained(pretrained_model_name_or_path, **kwargs)
        kwargs.pop("trust_remote_code", None)
        return ours.from_pretrained(pretrained_model_name_or_path, **kwargs)

    @staticmethod
    def register(*args: Any, **kwargs: Any) -> None:
        """The same as `transformers.AutoImageProcessor.register`."""
        transformers.AutoImageProcessor.register(*args, **kwargs)


def pipeline(
    task: str | None = None,
    model: Any = None,
    config: Any = None,
    tokenizer: Any = None,
    feature_extractor: Any = None,
    image_processor: Any = None,
    **kwargs: Any,
) -> Any:
    """`transformers.pipeline` with our classes where `model` is the name or folder of a DINOv2 model.

    Without a task it is that of the checkpoint's class: image classification or feature extraction.
    """
    parts = {"tokenizer": tokenizer, "feature_extractor": feature_extractor}
    kwargs.update({name: part for name, part in parts.items() if part is not None})
    if not isinstance(model, (str, Path)):
        return _theirs(task, model, config, image_processor, kwargs)
    where = {name: kwargs[name] for name in _WHERE if name in kwargs}
    base, settings = model, config
    if not hasattr(config, "model_type"):
        base, model_type = _described(model, where)
        settings = AutoConfig.from_pretrained(config or base, **where) if model_type in CONFIGS else None
    if getattr(settings, "model_type", None) not in CONFIGS:
        return _theirs(task, str(model), config, image_processor, kwargs)
    if task is None:
        classifies = any(name.endswith("ForImageClassification") for name in settings.architectures or [])
        task = "image-classification" if classifies else "image-feature-extraction"
    auto = globals().get(_TASKS.get(task, ""))
    if auto is None:
        return _theirs(task, str(model), config, image_processor, kwargs)
    options = dict(kwargs.pop("model_kwargs", None) or {})
    for name in ("dtype", "torch_dtype", "device_map", *_WHERE):
        if name in kwargs:
            options[name] = kwargs.pop(name)
    backend = {name: kwargs.pop(name) for name in ("use_fast", "backend") if name in kwargs}
    if image_processor is None:
        image_processor = AutoImageProcessor.from_pretrained(base, **where, **backend)
    elif isinstance(image_processor, (str, Path)):
        image_processor = AutoImageProcessor.from_pretrained(image_processor, **where, **backend)
    loaded = auto.from_pretrained(model, config=as_ours(settings), **options)
    return _theirs(task, loaded, None, image_processor, kwargs)


def _described(source: Any, where: Mapping[str, Any]) -> tuple[Any, str | None]:
    """The folder or repository whose configuration tells what model it is, and the model type; None without one.

    That is `source` itself, or the model that an adapter in it belongs to.
    """
    try:
        plain, _ = transformers.PretrainedConfig.get_config_dict(source, **where)
    except OSError:
        plain = {}
    if plain.get("model_type") or not is_peft_available():
        return source, plain.get("model_type")
    try:
        adapter = find_adapter_config_file(str(source), **where)
    except OSError:
        adapter = None
    if adapter is None:
        return source, None
    return _described(json.loads(Path(adapter).read_text(encoding="utf-8"))["base_model_name_or_path"], {})


def as_ours(config: Any) -> Any:
    """The same settings as one of our configurations; one that is ours already comes back itself."""
    ours = CONFIGS[config.model_type]
    if isinstance(config, ours):
        return config
    plain = config.to_dict()
    return ours.from_dict({**plain, "attn_implementation": getattr(config, "_attn_implementation", None)})


def _theirs(task: str | None, model: Any, config: Any, image_processor: Any, kwargs: dict[str, Any]) -> Any:
    given = {"model": model, "config": config, "image_processor": image_processor}
    return transformers.pipeline(task, **{name: value for name, value in given.items() if value is not None}, **kwargs)
