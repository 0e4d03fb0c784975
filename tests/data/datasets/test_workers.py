"""Every data set reaches worker processes that are started afresh, and reads the same there."""

import io
import multiprocessing
import pickle
import tarfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from dinov2.data.datasets import ImageNet, ImageNet22k
from dinov2.data.datasets.base import ImageDataset
from dinov2.data.datasets.cifar import Cifar10
from dinov2.data.datasets.files import Folder
from dinov2.data.datasets.listing import ListFile
from dinov2.data.datasets.toy import Toy
from tests.data.datasets.test_cifar import write_pickles
from tests.data.datasets.trees import class_tree, imagenet_tree, write_image


def folder(tmp: Path) -> ImageDataset:
    return Folder(class_tree(tmp, {"a": 3, "b": 2}))


def listing(tmp: Path) -> ImageDataset:
    write_image(tmp / "a.png")
    (tmp / "l.txt").write_text("a.png 3\n")
    return ListFile(tmp / "l.txt")


def image_net(tmp: Path) -> ImageDataset:
    imagenet_tree(tmp)
    ImageNet(split=ImageNet.Split.TRAIN, root=tmp, extra=tmp).dump_extra()
    return ImageNet(split=ImageNet.Split.TRAIN, root=tmp, extra=tmp)


def image_net_without_metadata(tmp: Path) -> ImageDataset:
    return ImageNet(split=ImageNet.Split.VAL, root=imagenet_tree(tmp))


def image_net_22k(tmp: Path) -> ImageDataset:
    data = write_image(tmp / "x.png").read_bytes()
    with tarfile.open(tmp / "n1.tar", "w") as tar:
        info = tarfile.TarInfo("x.png")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
    ImageNet22k(root=tmp, extra=tmp).dump_extra()
    return ImageNet22k(root=tmp, extra=tmp)


def cifar(tmp: Path) -> ImageDataset:
    return Cifar10(write_pickles(tmp / "cifar-10-batches-py"))


def toy(tmp: Path) -> ImageDataset:
    return Toy(n=3)


def first_and_last(dataset: ImageDataset) -> tuple[bytes, int | None, int]:
    return np.asarray(dataset[0][0]).tobytes(), dataset[-1][1], len(dataset)


SETS: list[Callable[[Path], ImageDataset]] = [
    folder,
    listing,
    image_net,
    image_net_without_metadata,
    image_net_22k,
    cifar,
    toy,
]


@pytest.mark.parametrize("make", SETS, ids=lambda make: make.__name__)
def test_every_set_is_picklable_after_it_was_used(tmp_path: Path, make: Callable[[Path], ImageDataset]) -> None:
    dataset = make(tmp_path)
    here = first_and_last(dataset)
    copy = pickle.loads(pickle.dumps(dataset))
    assert first_and_last(copy) == here
    assert copy.fingerprint() == dataset.fingerprint()


@pytest.mark.slow
def test_every_set_reads_the_same_in_a_spawned_process(tmp_path: Path) -> None:
    made = []
    for number, make in enumerate(SETS):
        (tmp_path / str(number)).mkdir()
        made.append(make(tmp_path / str(number)))
    here = [first_and_last(dataset) for dataset in made]
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as workers:
        assert list(workers.map(first_and_last, made)) == here
