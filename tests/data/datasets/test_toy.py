import functools
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from dinov2.data.datasets.toy import Toy
from dinov2.errors import DataError


def all_pixels(dataset: Toy) -> np.ndarray:
    """uint8 [S, H, W, 3]."""
    return np.stack([dataset.get_pixels(index) for index in range(len(dataset))])


@functools.cache
def default_pixels() -> tuple[np.ndarray, np.ndarray]:
    """The default training and validation set; drawing them takes longer than the tests."""
    return all_pixels(Toy()), all_pixels(Toy(split="VAL"))


def nearest_neighbour_accuracy(describe: Callable[[np.ndarray], np.ndarray]) -> float:
    """k-NN (k=20, cosine, temperature 0.07) from the default training to the default validation set, in per cent."""
    train, val = Toy(), Toy(split="VAL")
    keys, queries = (
        torch.nn.functional.normalize(torch.from_numpy(describe(pixels)).float(), dim=1) for pixels in default_pixels()
    )
    labels = torch.from_numpy(train.get_targets())
    similarity, nearest = (queries @ keys.T).topk(20, dim=1)
    votes: Tensor = torch.zeros(len(val), 10).scatter_add_(1, labels[nearest], (similarity / 0.07).softmax(dim=1))
    return 100 * float((votes.argmax(dim=1).numpy() == val.get_targets()).mean())


def test_the_default_splits_are_balanced_and_differ() -> None:
    train, val = Toy(), Toy(split="VAL")
    assert (len(train), len(val)) == (5000, 1000)
    assert np.bincount(train.get_targets()).tolist() == [500] * 10
    assert len(set(train.class_names or [])) == 10
    assert train.get_pixels(0).shape == (32, 32, 3)
    assert not np.array_equal(train.get_pixels(0), val.get_pixels(0))


def test_an_image_depends_on_its_index_alone() -> None:
    few, many = Toy(n=30), Toy(n=300)
    backwards = [few.get_pixels(index) for index in reversed(range(30))][::-1]
    assert all(np.array_equal(backwards[index], many.get_pixels(index)) for index in range(30))


def test_the_first_images_are_those_of_every_machine() -> None:
    # Room for the last bit of a cosine here and there; another drawing must change the version in the fingerprint.
    means = [Toy().get_pixels(index).mean(axis=(0, 1)) for index in range(3)]
    expected = [[81.25, 85.89, 77.77], [98.72, 94.78, 93.26], [86.5, 92.76, 81.75]]
    assert np.stack(means) == pytest.approx(np.array(expected), abs=0.05)


def test_no_image_comes_twice() -> None:
    images = {Toy(split=split).get_pixels(i).tobytes() for split in ("TRAIN", "VAL") for i in range(500)}  # type: ignore[arg-type]
    assert len(images) == 1000


@pytest.mark.parametrize("size", [16, 17, 96])
def test_any_size_shows_the_same_picture(size: int) -> None:
    small, large = (Toy(size=pixels, n=20) for pixels in (size, 32))
    for index in range(20):
        assert small.get_pixels(index).shape == (size, size, 3)
        assert abs(small.get_pixels(index).mean() - large.get_pixels(index).mean()) < 12


def test_raw_pixels_classify_badly() -> None:
    accuracy = nearest_neighbour_accuracy(lambda images: images.reshape(len(images), -1) / 255 - 0.45)
    assert 12 < accuracy <= 32


def test_colours_classify_hardly_better_than_chance() -> None:
    def histograms(images: np.ndarray) -> np.ndarray:
        bins = [np.bincount(image[..., c].ravel() // 16, minlength=16) for image in images for c in range(3)]
        return np.sqrt(np.array(bins).reshape(len(images), -1))

    assert nearest_neighbour_accuracy(histograms) < 25


def test_thousands_of_images_are_drawn_in_seconds() -> None:
    dataset = Toy(n=1000)
    started = time.process_time()
    all_pixels(dataset)
    assert time.process_time() - started < 3  # about 0.2; other programs may want the processor too


def test_bytes_image_and_tensor_hold_the_same_pixels() -> None:
    dataset = Toy(n=3)
    pixels = dataset.get_pixels(2)
    image, target = dataset[2]
    assert np.array_equal(np.asarray(image), pixels)
    assert np.array_equal(dataset.get_tensor(2).numpy(), pixels.transpose(2, 0, 1))
    assert dataset.get_tensor(2, channels=1).shape == (1, 32, 32)
    assert dataset.get_image_data(2)[:4] == b"\x89PNG"
    assert (target, dataset.path_of(2)) == (2, "toy:TRAIN/2")


def test_the_fingerprint_tells_splits_sizes_and_counts_apart() -> None:
    sets = [Toy(), Toy(split="VAL"), Toy(size=48), Toy(n=10)]
    assert len({dataset.fingerprint() for dataset in sets}) == 4
    assert Toy().fingerprint() == Toy().fingerprint()


@pytest.mark.parametrize("arguments", [{"split": "TEST"}, {"size": 4}, {"n": 0}])
def test_impossible_sets_are_refused(arguments: dict[str, object]) -> None:
    with pytest.raises(DataError, match="toy set"):
        Toy(**arguments)  # type: ignore[arg-type]
