"""`register()`: transformers' own Auto classes and `pipeline` build this project's DINOv2 classes from then on."""

import json
from pathlib import Path
from typing import Any

import transformers

from dinov2.hf import auto
from dinov2.hf.processing import BitImageProcessor, BitImageProcessorFast, BitImageProcessorPil

__all__ = ["register"]

_STOCK = {"dinov2": "Dinov2Config", "dinov2_with_registers": "Dinov2WithRegistersConfig"}


def register(*, replace: bool = True) -> None:
    """Makes transformers' Auto classes and `pipeline` build our classes for DINOv2.

    It holds for the whole process and cannot be undone; models around a backbone (DPT, Depth Anything, ...) then build
    ours too. Calling it again changes nothing. `AutoBackbone.from_pretrained` takes local folders afterwards, offline
    too, which version 5 of transformers does not by itself, and `AutoImageProcessor` folders that hold no preprocessor.

    Args:
        replace: also build our models where code passes a configuration object of transformers.
    """
    for model_type, config in auto.CONFIGS.items():
        transformers.AutoConfig.register(model_type, config, exist_ok=True)
        stock = getattr(transformers, _STOCK[model_type])
        for name, classes in auto.MODELS.items():
            factory = getattr(transformers, name)
            factory.register(config, classes[model_type], exist_ok=True)
            if replace:
                factory.register(stock, classes[model_type], exist_ok=True)
        _register_processor(config)
    _take_folders(transformers.AutoBackbone, auto.AutoBackbone)
    _take_folders(transformers.AutoImageProcessor, auto.AutoImageProcessor)


def _register_processor(config: Any) -> None:
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


def _take_folders(theirs: Any, ours: Any) -> None:
    """Lets our class answer for local folders of DINOv2 models, of which it knows more than theirs."""
    stock = theirs.from_pretrained
    if getattr(stock, "_takes_folders", False):
        return

    def from_pretrained(cls: Any, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        if _is_ours(pretrained_model_name_or_path, kwargs.get("subfolder") or ""):
            kwargs.pop("_from_pipeline", None)
            return ours.from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        return stock(pretrained_model_name_or_path, *args, **kwargs)

    from_pretrained._takes_folders = True  # type: ignore[attr-defined]
    theirs.from_pretrained = classmethod(from_pretrained)


def _is_ours(source: Any, subfolder: str) -> bool:
    try:
        config = Path(source) / subfolder / "config.json"
        return json.loads(config.read_text(encoding="utf-8")).get("model_type") in auto.CONFIGS
    except (OSError, TypeError, ValueError):
        return False
