"""A data set seen through an evaluation transform."""

from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from dinov2.data.datasets.base import ImageDataset
from dinov2.data.datasets.imagenet_classes import infer_class_ids
from dinov2.data.eval_transform import EvalTransform
from dinov2.encode.scoring import Scoring

__all__ = ["WithTransform"]


class WithTransform(Dataset[tuple[Tensor, Any]]):
    """A data set's images through the evaluation transform, without touching the data set itself."""

    def __init__(self, dataset: ImageDataset, transform: EvalTransform, *, channels: int = 3) -> None:
        self.dataset, self.transform, self.channels = dataset, transform, channels
        self.class_names = dataset.class_names
        self.class_ids = infer_class_ids(dataset)

    def __len__(self) -> int:
        return len(self.dataset)

    def path_of(self, index: int) -> str:
        return self.dataset.path_of(index)

    def scoring(self, images: Tensor) -> Scoring | None:
        """The data set's own rules of scoring for the images at these positions (int64 `[S]`)."""
        return Scoring.of(self.dataset, images)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        image = (
            self.dataset.get_image(index)
            if self.channels == 3
            else self.dataset.get_tensor(index, channels=self.channels)
        )
        return self.transform(image), self.dataset.get_target(index)
