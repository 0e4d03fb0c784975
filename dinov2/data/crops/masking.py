"""Block masks on the patch grid for iBOT (arXiv:2111.07832): the release's generator, and masks of the sample stream.

`MaskingGenerator` reproduces the release draw by draw. `sample_masks` has the same distribution over the *global*
batch, but takes its draws from (seed, step) and (seed, sample number, crop), so that any number of workers and ranks
sees the same masks.
"""

import math
import random
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dinov2.data.crops.config import AugmentationConfig
from dinov2.data.stream import hash_keys, permute, to_unit_interval

__all__ = ["MaskingGenerator", "sample_masks"]

_PLACEMENT_ATTEMPTS = 10


class _RandomSource(Protocol):
    """The functions of the `random` module, or a `random.Random`."""

    def random(self) -> float: ...
    def uniform(self, a: float, b: float) -> float: ...
    def randint(self, a: int, b: int) -> int: ...


class MaskingGenerator:
    """Masks of about a given number of patches, made of rectangles of random size and aspect.

    `input_size` is the patch grid, (h, w) or the side of a square one. No rectangle covers more than `max_num_patches`
    (default `num_masking_patches`, else the whole grid) nor spans a whole side; the first ones cover at least
    `min_num_patches`. The result never exceeds the given count and may fall short of it.
    """

    def __init__(
        self,
        input_size: int | tuple[int, int],
        num_masking_patches: int | None = None,
        min_num_patches: int = 4,
        max_num_patches: float | None = None,
        min_aspect: float = 0.3,
        max_aspect: float | None = None,
        *,
        rng: _RandomSource = random,
    ) -> None:
        self.height, self.width = (input_size, input_size) if isinstance(input_size, int) else input_size
        self.num_patches = self.height * self.width
        self.num_masking_patches = num_masking_patches
        self.min_num_patches = min_num_patches
        if max_num_patches is None:
            max_num_patches = self.num_patches if num_masking_patches is None else num_masking_patches
        self.max_num_patches = max_num_patches
        self.log_aspect_ratio = (math.log(min_aspect), math.log(max_aspect or 1 / min_aspect))
        self.rng = rng

    def __repr__(self) -> str:
        low, high = self.log_aspect_ratio
        return (
            f"MaskingGenerator({self.height} x {self.width} patches, rectangles of {self.min_num_patches} to "
            f"{self.max_num_patches:g} patches, log aspect {low:.3f} to {high:.3f})"
        )

    def get_shape(self) -> tuple[int, int]:
        """The patch grid, (h, w)."""
        return self.height, self.width

    def __call__(self, num_masking_patches: int = 0) -> NDArray[np.bool_]:
        """A mask [h, w] with at most `num_masking_patches` True patches."""
        mask = np.zeros((self.height, self.width), dtype=bool)
        count = 0
        while count < num_masking_patches:
            added = self._place_rectangle(mask, min(num_masking_patches - count, self.max_num_patches))
            if added == 0:
                break
            count += added
        return mask

    def _place_rectangle(self, mask: NDArray[np.bool_], most: float) -> int:
        """Mask one more rectangle in place, of at most `most` new patches; returns their number, 0 if none fitted."""
        for _ in range(_PLACEMENT_ATTEMPTS):
            area = self.rng.uniform(self.min_num_patches, most)
            aspect = math.exp(self.rng.uniform(*self.log_aspect_ratio))
            h = round(math.sqrt(area * aspect))
            w = round(math.sqrt(area / aspect))
            if w >= self.width or h >= self.height:
                continue
            top = self.rng.randint(0, self.height - h)
            left = self.rng.randint(0, self.width - w)
            block = mask[top : top + h, left : left + w]
            added = h * w - int(np.count_nonzero(block))
            if 0 < added <= most:
                block[...] = True
                return added
        return 0


def sample_masks(
    config: AugmentationConfig, *, seed: int, step: int, sample_numbers: NDArray[np.int64], global_batch: int
) -> Tensor:
    """Masks for this rank's samples of one step, crop-major: bool [2*B, N].

    Of the global crops of all `global_batch` images, the share `mask_sample_probability` (rounded down) is masked. The
    ratios in `mask_ratio_min_max` are cut into one bin for each of these; which crop gets which bin is a permutation
    keyed by (seed, step). `sample_numbers` [B] are global ones, within the step's batch.
    """
    slots = sample_numbers - step * global_batch  # [B], place in the global batch
    n_crops = 2 * global_batch
    n_masked = int(n_crops * config.mask_sample_probability)
    low, high = config.mask_ratio_min_max
    crops = np.arange(2)[:, None]  # [2, 1]
    key = int(hash_keys(seed, "mask rung", step))  # an old name, which keeps the masks of earlier runs
    mask_ratio_bins = permute(crops * global_batch + slots, n_crops, key=key)  # [2, B]
    within = to_unit_interval(hash_keys(seed, "mask ratio", sample_numbers, crops))
    ratios = low + (high - low) * (mask_ratio_bins + within) / max(n_masked, 1)
    height, width = config.grid
    counts = np.where(mask_ratio_bins < n_masked, (height * width * ratios).astype(np.int64), 0).reshape(-1)
    shape_seeds = hash_keys(seed, "mask shape", sample_numbers, crops).reshape(-1)
    rng = random.Random()
    generator = MaskingGenerator(config.grid, max_num_patches=config.max_masked_patches, rng=rng)
    masks = np.zeros((counts.size, height, width), dtype=bool)
    for row in np.flatnonzero(counts).tolist():
        rng.seed(int(shape_seeds[row]))
        masks[row] = generator(int(counts[row]))
    return torch.from_numpy(masks.reshape(counts.size, height * width))
