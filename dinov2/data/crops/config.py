"""Settings of crops and masks in one value, which is passed to every function that makes them."""

from dataclasses import dataclass
from typing import Literal

from dinov2.configs import Config
from dinov2.configs.run_sections import CropsConfig
from dinov2.errors import ConfigError

__all__ = ["AugmentationConfig"]


@dataclass(frozen=True, kw_only=True)
class AugmentationConfig(CropsConfig):
    """The section `crops` of a configuration, with the keys of other sections that crops and masks depend on.

    Crops are numbered: two global ones, then the local ones.
    """

    in_chans: int = 3
    patch_size: int = 16
    mask_ratio_min_max: tuple[float, float] = (0.1, 0.5)
    mask_sample_probability: float = 0.5
    augmentation_backend: Literal["pil", "tensor"] = "pil"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.augmentation_backend not in ("pil", "tensor"):
            raise ConfigError(f"train.augmentation_backend is {self.augmentation_backend!r}; choose pil or tensor")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, self.in_chans):
                raise ConfigError(
                    f"crops.{name} has {len(values)} values for {self.in_chans} channels (student.in_chans); "
                    "give one a channel, or a single one for all"
                )

    @classmethod
    def from_config(cls, cfg: Config) -> "AugmentationConfig":
        """The settings in a training configuration."""
        return cls(
            **vars(cfg.crops),
            in_chans=cfg.student.in_chans,
            patch_size=cfg.student.patch_size,
            mask_ratio_min_max=cfg.ibot.mask_ratio_min_max,
            mask_sample_probability=cfg.ibot.mask_sample_probability,
            augmentation_backend=cfg.train.augmentation_backend,
        )

    @property
    def grid(self) -> tuple[int, int]:
        """Patches of a global crop, (h, w)."""
        side = self.global_crops_size // self.patch_size
        return side, side

    @property
    def max_masked_patches(self) -> float:
        """Most patches of one masked rectangle: half of the crop's, but floored on the way, as the release does.

        For 224/14 it is 128, for 518/14 it is 666 instead of 684.5.
        """
        return 0.5 * self.global_crops_size // self.patch_size * self.global_crops_size // self.patch_size

    @property
    def scale_by_crop(self) -> list[tuple[float, float]]:
        """Range of the share of the image's area, for each crop."""
        return [self.global_crops_scale] * 2 + [self.local_crops_scale] * self.local_crops_number

    @property
    def blur_p_by_crop(self) -> list[float]:
        """Probability of blur, for each crop."""
        first, second, local = self.blur_p
        return [first, second] + [local] * self.local_crops_number

    @property
    def solarize_p_by_crop(self) -> list[float]:
        """Probability of solarisation, for each crop: only the second global one is ever solarised."""
        return [0.0, self.solarize_p] + [0.0] * self.local_crops_number
