"""The features, labels and figures of the golden k-NN files."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import normalize

from dinov2.eval.knn.evaluate import soft_vote
from dinov2.eval.knn.search import nearest_neighbours
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


def knn_votes(train, labels, queries, *, ks):
    """Class scores of every query by cosine similarity for each k, of ten classes."""
    similarities, indices = nearest_neighbours(queries, train, k=max(ks), cosine=True)
    return soft_vote(similarities, labels[indices], n_classes=10, ks=ks, temperature=0.07)
