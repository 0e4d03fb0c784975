"""Block masks on the patch grid for iBOT (arXiv:2111.07832): the release's generator, and masks of the sample stream.

`MaskingGenerator` reproduces the release draw by draw. `sample_masks` follows the same law over the *global* batch, but
takes its draws from (seed, step) and (seed, sample number, crop), so that any number of workers and ranks sees the same
masks.
"""

import math
import random
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dinov2.data.stream import FeistelPermutation, mix, unit_interval

__all__ = ["MaskingGenerator", "RandomSource", "max_masked_patches", "sample_masks"]

_PLACEMENT_ATTEMPTS = 10


class RandomSource(Protocol):
    """What a mask draws from: the `random` module, or a `random.Random`."""

    def random(self) -> float:
        """A float in [0, 1)."""

    def uniform(self, a: float, b: float) -> float:
        """A float between a and b."""

    def randint(self, a: int, b: int) -> int:
        """An integer from a to b, both included."""


class MaskingGenerator:
    """Masks of about a wanted number of patches, made of rectangles of random size and aspect.

    `input_size` is the patch grid, (h, w) or the side of a square one. No rectangle covers more than `max_num_patches`
    (default `num_masking_patches`, else the whole grid) nor spans a whole side; the first ones cover at least
    `min_num_patches`. The result never exceeds the wanted count and may fall short of it.
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
        rng: RandomSource = random,
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


def max_masked_patches(crop_size: int, patch_size: int) -> float:
    """The cap on a rectangle with which the release trains: half of the patches, but floored along the way.

    For 224/14 it is 128, for 518/14 it is 666 instead of 684.5.
    """
    return 0.5 * crop_size // patch_size * crop_size // patch_size


def sample_masks(
    seed: int,
    step: int,
    sample_numbers: NDArray[np.integer[Any]],
    *,
    global_batch: int,
    grid: tuple[int, int],
    ratio_min_max: Sequence[float] = (0.1, 0.5),
    probability: float = 0.5,
    n_global_crops: int = 2,
    max_num_patches: float | None = None,
) -> Tensor:
    """Masks for this rank's samples of one step, crop-major: bool [G*B, N].

    Of the G crops of all `global_batch` images, the fraction `probability` (rounded down) is masked. Each of these has
    its own rung of the ladder of ratios from `ratio_min_max[0]` to `[1]`; which crop stands on which rung is a
    permutation keyed by (seed, step). `sample_numbers` [B] are global ones, within the step's batch.
    """
    slots = np.asarray(sample_numbers, dtype=np.int64) - step * global_batch  # [B], place in the global batch
    n_crops = n_global_crops * global_batch
    n_masked = int(n_crops * probability)
    low, high = ratio_min_max
    crops = np.arange(n_global_crops)[:, None]  # [G, 1]
    rungs = FeistelPermutation(n_crops, int(mix(seed, "mask rung", step)))[crops * global_batch + slots]  # [G, B]
    within = unit_interval(mix(seed, "mask ratio", sample_numbers, crops))
    ratios = low + (high - low) * (rungs + within) / max(n_masked, 1)
    height, width = grid
    wanted = np.where(rungs < n_masked, (height * width * ratios).astype(np.int64), 0).reshape(-1)
    shape_seeds = mix(seed, "mask shape", sample_numbers, crops).reshape(-1)
    rng = random.Random()
    generator = MaskingGenerator(grid, max_num_patches=max_num_patches or 0.5 * height * width, rng=rng)
    masks = np.zeros((wanted.size, height, width), dtype=bool)
    for row in np.flatnonzero(wanted).tolist():
        rng.seed(int(shape_seeds[row]))
        masks[row] = generator(int(wanted[row]))
    return torch.from_numpy(masks.reshape(wanted.size, height * width))
