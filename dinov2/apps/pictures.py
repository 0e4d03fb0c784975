"""Patch features of the teacher as colours, drawn during training, always of the same images."""

from dinov2.data.datasets.base import ImageDataset
from dinov2.data.eval_transform import EvalTransform
from dinov2.errors import DataError
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.report.pictures import write_pca_strip
from dinov2.train.setup import Training
from dinov2.train.train import Evaluate

__all__ = ["picture_evaluation"]

_IMAGES = 8
# Patches along a side of a picture: enough to recognise shapes, few enough to cost nothing.
_GRID = 16


def picture_evaluation(dataset: ImageDataset | None = None, *, n_images: int = _IMAGES) -> Evaluate:
    """Draw PCA maps of the teacher's patch features into the run's `report_data/`.

    The images are spread evenly over `dataset` (the training images when None); unreadable ones are left out.
    """

    def evaluate(training: Training, iteration: int) -> None:
        cfg, images = training.cfg, dataset if dataset is not None else training.dataset
        tensors = []
        for i in range(n_images):
            try:
                tensors.append(images.get_tensor(i * len(images) // n_images, channels=cfg.student.in_chans))
            except DataError:
                continue
        if not tensors:
            return
        side = max(cfg.crops.global_crops_size, _GRID * cfg.student.patch_size)
        transform = EvalTransform(crop_size=side, resize_size=side, mean=cfg.crops.mean, std=cfg.crops.std)
        backbone = training.objective.teacher["backbone"]
        assert isinstance(backbone, DinoVisionTransformer)
        write_pca_strip(training.run.path, iteration, backbone, tensors, transform, device=training.device)

    return evaluate
