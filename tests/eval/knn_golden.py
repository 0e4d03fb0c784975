"""The features, labels and figures of the golden k-NN files."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import normalize

from tests.golden.recipe import values

FOLDER = Path(__file__).parents[1] / "golden"
FIGURES = json.loads((FOLDER / "knn.json").read_text())
TENSORS = load_file(FOLDER / "knn.safetensors")

TRAIN_LABELS = 7 * torch.arange(300) % 10
TEST_LABELS = (3 * torch.arange(60) + 1) % 10


def _features(name: str, labels: Tensor) -> Tensor:
    centroids = torch.from_numpy(values("knn.centroids", (10, 16)))
    noise = torch.from_numpy(values(name, (len(labels), 16)))
    return normalize(centroids[labels] + 1.2 * noise, dim=1)


TRAIN = _features("knn.train", TRAIN_LABELS)
TEST = _features("knn.test", TEST_LABELS)
