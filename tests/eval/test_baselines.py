import pytest
import torch
from torch.testing import assert_close
from torch.utils.data import Subset

from dinov2.apps.evaluation.features import RawPixels
from dinov2.data.eval_transform import EvalTransform
from dinov2.data.loaders import make_dataset
from dinov2.encode.stream import extract_features
from dinov2.eval.knn import evaluate_knn


def test_small_images_are_their_pixels_with_length_one():
    images = torch.randn(2, 3, 8, 6)
    features = RawPixels()(images)
    assert_close(features, images.flatten(1) / images.flatten(1).norm(dim=1, keepdim=True))


@pytest.mark.parametrize(("size", "width"), [((64, 64), 3 * 16 * 16), ((64, 32), 3 * 16 * 8)])
def test_large_images_are_shrunk_with_their_shape_kept(size, width):
    assert RawPixels(max_size=16)(torch.randn(2, 3, *size)).shape == (2, width)


def test_shrinking_averages_instead_of_skipping_pixels():
    checkerboard = ((torch.arange(64)[:, None] + torch.arange(64)) % 2).float().expand(1, 1, 64, 64)
    features = RawPixels(max_size=8)(checkerboard)
    assert_close(features, torch.full_like(features, 1 / 8), atol=1e-3, rtol=0)


@pytest.mark.real_data
@pytest.mark.slow
def test_raw_pixels_reach_their_known_accuracy_on_cifar10(vision_data):
    train, test = (
        make_dataset(str(vision_data / "cifar10" / split), transform=EvalTransform(crop_size=32))
        for split in ("train", "test")
    )
    every_fourth = Subset(test, range(0, len(test), 4))
    train_features, test_features = (
        extract_features(RawPixels(), dataset, batch_size=1000) for dataset in (train, every_fourth)
    )
    top_1 = evaluate_knn(train_features, test_features, nb_knn=(20,))[0]
    assert (len(train_features), top_1.n) == (50_000, 2_500)
    # Counted by a few lines of numpy that share no code with this package; 45.40 on all test images.
    assert top_1.value == pytest.approx(45.32, abs=0.1)
