"""Auto classes and `pipeline` that build this project's DINOv2 classes, and hand everything else to transformers.

The registry of transformers, which belongs to the whole process, is not touched until `register` is called.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import transformers
from transformers.utils import find_adapter_config_file, is_peft_available

from dinov2.hf.configuration import Config, Dinov2Config, Dinov2WithRegistersConfig
from dinov2.hf.models import (
    Dinov2Backbone,
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2WithRegistersBackbone,
    Dinov2WithRegistersForImageClassification,
    Dinov2WithRegistersModel,
)
from dinov2.hf.processing import BitImageProcessor, BitImageProcessorFast, BitImageProcessorPil, default_image_processor

__all__ = [
    "MODELS",
    "AutoBackbone",
    "AutoConfig",
    "AutoImageProcessor",
    "AutoModel",
    "AutoModelForImageClassification",
    "pipeline",
    "register",
]

_Source = str | os.PathLike[str]

# Model type of a `config.json` -> configuration class.
_CONFIGS: dict[str, type[Dinov2Config] | type[Dinov2WithRegistersConfig]] = {
    "dinov2": Dinov2Config,
    "dinov2_with_registers": Dinov2WithRegistersConfig,
}

MODELS: dict[str, dict[str, type[transformers.PreTrainedModel]]] = {
    "AutoModel": {"dinov2": Dinov2Model, "dinov2_with_registers": Dinov2WithRegistersModel},
    "AutoModelForImageClassification": {
        "dinov2": Dinov2ForImageClassification,
        "dinov2_with_registers": Dinov2WithRegistersForImageClassification,
    },
    "AutoBackbone": {"dinov2": Dinov2Backbone, "dinov2_with_registers": Dinov2WithRegistersBackbone},
}
"""Name of an auto class -> model type -> model class."""

_PROCESSORS: dict[str, type[BitImageProcessor]] = {
    "BitImageProcessor": default_image_processor(),
    "BitImageProcessorFast": BitImageProcessorFast,
    "BitImageProcessorPil": BitImageProcessorPil,
}
_STOCK = {"dinov2": "Dinov2Config", "dinov2_with_registers": "Dinov2WithRegistersConfig"}
_TASKS = {"image-classification": "AutoModelForImageClassification", "image-feature-extraction": "AutoModel"}

# What every released repository says, for folders that say nothing.
_RELEASED_PREPROCESSING: dict[str, object] = {
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
    def from_pretrained(cls, pretrained_model_name_or_path: _Source, **kwargs: object) -> transformers.PretrainedConfig:
        """The configuration of a folder or repository."""
        plain, _ = transformers.PretrainedConfig.get_config_dict(
            pretrained_model_name_or_path, **{name: kwargs[name] for name in _WHERE if name in kwargs}
        )
        ours = _CONFIGS.get(str(plain.get("model_type")))
        return (ours or transformers.AutoConfig).from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def for_model(cls, model_type: str, *args: Any, **kwargs: Any) -> transformers.PretrainedConfig:
        """A fresh configuration of a model type."""
        ours = _CONFIGS.get(model_type)
        return ours(*args, **kwargs) if ours else transformers.AutoConfig.for_model(model_type, *args, **kwargs)

    @staticmethod
    def register(model_type: str, config: type[transformers.PretrainedConfig], exist_ok: bool = False) -> None:
        """Makes a model type known, here and to transformers' class."""
        transformers.AutoConfig.register(model_type, config, exist_ok=exist_ok)
        if model_type in _CONFIGS:
            _CONFIGS[model_type] = config


class _Auto:
    _name: ClassVar[str]

    def __init__(self) -> None:
        raise OSError(f"{self._name} builds models and is none; use {self._name}.from_pretrained or .from_config")

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: _Source, *model_args: object, **kwargs: Any
    ) -> transformers.PreTrainedModel:
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
            kwargs["config"] = _as_ours(config)
        for not_needed in ("trust_remote_code", "code_revision", "use_timm_backbone"):
            kwargs.pop(not_needed, None)
        return ours.from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)

    @classmethod
    def from_config(cls, config: transformers.PretrainedConfig, **kwargs: object) -> transformers.PreTrainedModel:
        """A model with fresh weights."""
        ours = MODELS[cls._name].get(str(getattr(config, "model_type", None)))
        if ours is None:
            return getattr(transformers, cls._name).from_config(config, **kwargs)
        kwargs.pop("trust_remote_code", None)
        return ours._from_config(_as_ours(config), **kwargs)

    @classmethod
    def register(
        cls,
        config_class: type[transformers.PretrainedConfig],
        model_class: type[transformers.PreTrainedModel],
        exist_ok: bool = False,
    ) -> None:
        """Makes the model class of a configuration known, here and to transformers' class."""
        getattr(transformers, cls._name).register(config_class, model_class, exist_ok=exist_ok)
        for model_type, ours in _CONFIGS.items():
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
    def from_pretrained(cls, pretrained_model_name_or_path: _Source, **kwargs: Any) -> transformers.BaseImageProcessor:
        """The processor of a folder or repository; a DINOv2 folder without one gets that of the released models."""
        where = {name: kwargs[name] for name in _WHERE if name in kwargs}
        try:
            plain, _ = BitImageProcessor.get_image_processor_dict(pretrained_model_name_or_path, **where)
        except OSError:
            if _described(pretrained_model_name_or_path, where)[1] not in _CONFIGS:
                return transformers.AutoImageProcessor.from_pretrained(pretrained_model_name_or_path, **kwargs)
            settings = {name: value for name, value in kwargs.items() if name not in where}
            return default_image_processor().from_dict(_RELEASED_PREPROCESSING, **settings)
        kind = plain.get("image_processor_type") or plain.get("feature_extractor_type")
        ours = _PROCESSORS.get(str(kind))
        if kind is None and _described(pretrained_model_name_or_path, where)[1] in _CONFIGS:
            ours = default_image_processor()
        if ours is None:
            return transformers.AutoImageProcessor.from_pretrained(pretrained_model_name_or_path, **kwargs)
        kwargs.pop("trust_remote_code", None)
        return ours.from_pretrained(pretrained_model_name_or_path, **kwargs)

    @staticmethod
    def register(*args: object, **kwargs: object) -> None:
        """The same as `transformers.AutoImageProcessor.register`."""
        transformers.AutoImageProcessor.register(*args, **kwargs)


def pipeline(
    task: str | None = None,
    model: object = None,
    config: Any = None,
    tokenizer: object = None,
    feature_extractor: object = None,
    image_processor: object = None,
    **kwargs: Any,
) -> transformers.Pipeline:
    """`transformers.pipeline` with our classes where `model` is the name or folder of a DINOv2 model.

    Without a task it is that of the checkpoint's class: image classification or feature extraction.
    """
    parts = {"tokenizer": tokenizer, "feature_extractor": feature_extractor}
    kwargs.update({name: part for name, part in parts.items() if part is not None})
    if not isinstance(model, (str, Path)):
        return _theirs(task, model, config, image_processor, kwargs)
    where = {name: kwargs[name] for name in _WHERE if name in kwargs}
    base: _Source = model
    settings = config
    if not hasattr(config, "model_type"):
        base, model_type = _described(model, where)
        settings = AutoConfig.from_pretrained(config or base, **where) if model_type in _CONFIGS else None
    if getattr(settings, "model_type", None) not in _CONFIGS:
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
    loaded = auto.from_pretrained(model, config=_as_ours(settings), **options)
    return _theirs(task, loaded, None, image_processor, kwargs)


def _described(source: _Source, where: Mapping[str, object]) -> tuple[_Source, str | None]:
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


def _as_ours(config: transformers.PretrainedConfig) -> Config:
    """The same settings as one of our configurations; one that is ours already comes back itself."""
    ours = _CONFIGS[config.model_type]
    if isinstance(config, ours):
        return config
    plain = config.to_dict()
    return ours.from_dict({**plain, "attn_implementation": getattr(config, "_attn_implementation", None)})


def _theirs(
    task: str | None, model: object, config: object, image_processor: object, kwargs: Mapping[str, object]
) -> transformers.Pipeline:
    given = {"model": model, "config": config, "image_processor": image_processor}
    return transformers.pipeline(task, **{name: value for name, value in given.items() if value is not None}, **kwargs)


def register(*, replace: bool = True) -> None:
    """Makes transformers' Auto classes and `pipeline` build our classes for DINOv2.

    It holds for the whole process and cannot be undone; models around a backbone (DPT, Depth Anything, ...) then build
    ours too. Calling it again changes nothing. `AutoBackbone.from_pretrained` takes local folders afterwards, offline
    too, which version 5 of transformers does not by itself, and `AutoImageProcessor` folders that hold no preprocessor.

    Args:
        replace: also build our models where code passes a configuration object of transformers.
    """
    for model_type, config in _CONFIGS.items():
        transformers.AutoConfig.register(model_type, config, exist_ok=True)
        stock = getattr(transformers, _STOCK[model_type])
        for name, classes in MODELS.items():
            factory = getattr(transformers, name)
            factory.register(config, classes[model_type], exist_ok=True)
            if replace:
                factory.register(stock, classes[model_type], exist_ok=True)
        _register_processor(config)
    _take_folders(transformers.AutoBackbone, AutoBackbone)
    _take_folders(transformers.AutoImageProcessor, AutoImageProcessor)


def _register_processor(config: type[transformers.PretrainedConfig]) -> None:
    factory = transformers.AutoImageProcessor
    try:
        classes = {"torchvision": BitImageProcessor, "pil": BitImageProcessorPil}
        factory.register(config, image_processor_classes=classes, exist_ok=True)
    except TypeError:  # before one class had two backends
        factory.register(
            config,
            slow_image_processor_class=BitImageProcessor,
            fast_image_processor_class=BitImageProcessorFast,
            exist_ok=True,
        )


def _take_folders(theirs: type[Any], ours: type[_Auto] | type[AutoImageProcessor]) -> None:
    """Lets our class answer for local folders of DINOv2 models, of which it knows more than theirs."""
    stock = theirs.from_pretrained
    if getattr(stock, "_takes_folders", False):
        return

    def from_pretrained(
        _cls: type[object], /, pretrained_model_name_or_path: _Source, *args: object, **kwargs: Any
    ) -> object:
        if _is_ours(pretrained_model_name_or_path, kwargs.get("subfolder") or ""):
            kwargs.pop("_from_pipeline", None)
            return ours.from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        return stock(pretrained_model_name_or_path, *args, **kwargs)

    from_pretrained._takes_folders = True  # type: ignore[attr-defined]
    theirs.from_pretrained = classmethod(from_pretrained)


def _is_ours(source: _Source, subfolder: str) -> bool:
    try:
        config = Path(source) / subfolder / "config.json"
        return json.loads(config.read_text(encoding="utf-8")).get("model_type") in _CONFIGS
    except (OSError, TypeError, ValueError):
        return False
