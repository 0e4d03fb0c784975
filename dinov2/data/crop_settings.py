"""All that shapes the crops and masks of a run, in one value that travels to loader workers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dinov2.data.augmentations import DataAugmentationDINO
from dinov2.data.device_augmentations import BatchedAugmentation
from dinov2.data.transforms import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from dinov2.errors import ConfigError

__all__ = ["CropSettings"]


@dataclass(frozen=True, kw_only=True)
class CropSettings:
    """Arguments of the augmentation and of the masks; the names are those of the config (`crops.*`, `ibot.*`)."""

    global_crops_scale: Sequence[float] = (0.32, 1.0)
    local_crops_scale: Sequence[float] = (0.05, 0.32)
    local_crops_number: int = 8
    global_crops_size: int = 224
    local_crops_size: int = 96
    blur_p: Sequence[float] = (0.0, 0.9, 0.5)
    """True probabilities for the first global crop, the second, and local crops."""
    horizontal_flip_p: float = 0.5
    color_jitter_p: float = 0.8
    color_jitter_strength: float = 1.0
    grayscale_p: float = 0.2
    solarize_p: float = 0.2
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN
    std: Sequence[float] = IMAGENET_DEFAULT_STD
    in_chans: int = 3
    patch_size: int = 16
    mask_ratio_min_max: Sequence[float] = (0.1, 0.5)
    mask_probability: float = 0.5
    backend: Literal["pil", "tensor"] = "pil"
    """pil: image by image, the release's transforms exactly; tensor: a batch at a time by the same laws, faster."""

    def __post_init__(self) -> None:
        if self.backend not in ("pil", "tensor"):
            raise ConfigError(f"train.augmentation_backend is {self.backend!r}; choose pil or tensor")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, self.in_chans):
                raise ConfigError(
                    f"crops.{name} has {len(values)} values for {self.in_chans} channels (student.in_chans); "
                    "give one a channel, or a single one for all"
                )

    @classmethod
    def from_config(cls, cfg: Any) -> "CropSettings":
        """The settings in a training config (sections crops, ibot, train, student)."""
        crops = cfg.crops
        return cls(
            global_crops_scale=tuple(crops.global_crops_scale),
            local_crops_scale=tuple(crops.local_crops_scale),
            local_crops_number=crops.local_crops_number,
            global_crops_size=crops.global_crops_size,
            local_crops_size=crops.local_crops_size,
            blur_p=tuple(crops.blur_p),
            horizontal_flip_p=crops.horizontal_flip_p,
            color_jitter_p=crops.color_jitter_p,
            color_jitter_strength=crops.color_jitter_strength,
            grayscale_p=crops.grayscale_p,
            solarize_p=crops.solarize_p,
            mean=tuple(crops.mean),
            std=tuple(crops.std),
            in_chans=cfg.student.in_chans,
            patch_size=cfg.student.patch_size,
            mask_ratio_min_max=tuple(cfg.ibot.mask_ratio_min_max),
            mask_probability=cfg.ibot.mask_sample_probability,
            backend=cfg.train.augmentation_backend,
        )

    @property
    def grid(self) -> tuple[int, int]:
        """Patches of a global crop, (h, w)."""
        side = self.global_crops_size // self.patch_size
        return side, side

    def augmentation(self) -> DataAugmentationDINO:
        """The augmentation of one image."""
        return DataAugmentationDINO(**self._augmentation_arguments())

    def batched_augmentation(self, seed: int) -> BatchedAugmentation:
        """The augmentation of a batch."""
        return BatchedAugmentation(**self._augmentation_arguments(), seed=seed)

    def _augmentation_arguments(self) -> dict[str, Any]:
        names = (
            "global_crops_scale local_crops_scale local_crops_number global_crops_size local_crops_size blur_p "
            "horizontal_flip_p color_jitter_p color_jitter_strength grayscale_p solarize_p mean std"
        )
        return {name: getattr(self, name) for name in names.split()}
