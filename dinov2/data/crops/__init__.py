"""The crops and masks of a training: their settings, random draws, pixels, and the batches made of them.

`config.AugmentationConfig` holds every setting and is passed on unchanged. `augment_image` follows the release's
transforms image by image, `augment_batch` has the same distribution for a batch at a time, and `loader` makes the
batches of the steps.
"""

__all__: list[str] = []
