import pickle
from pathlib import Path

import pytest
import torch

from dinov2.data.crops.loader import DecodedCache
from dinov2.data.datasets.files import Folder
from dinov2.data.datasets.toy import Toy
from dinov2.errors import DataError
from tests.data.datasets.trees import write_image


def folder_of(tmp_path: Path, sizes: list[tuple[int, int]]) -> Folder:
    for number, size in enumerate(sizes):
        write_image(tmp_path / f"{number:03d}.png", size=size, colour=number)
    return Folder(tmp_path)


def test_images_are_decoded_once_and_equal_those_of_the_set() -> None:
    dataset = Toy(n=40)
    cache = DecodedCache(dataset)
    for index in [*range(40), 7, 39]:
        assert torch.equal(cache.decode(index), dataset.get_tensor(index))
    assert cache.decode(7).data_ptr() == cache.decode(7).data_ptr()


def test_images_of_one_size_end_up_in_one_block() -> None:
    cache = DecodedCache(Toy(n=40))
    images = [cache.decode(index) for index in range(40)]
    assert cache.decode(39).data_ptr() - cache.decode(0).data_ptr() == 39 * images[0].numel()


def test_images_of_many_sizes_are_kept_one_by_one(tmp_path: Path) -> None:
    sizes = [(8, 6)] * 20 + [(5, 5), (9, 2)]
    cache = DecodedCache(folder_of(tmp_path, sizes))
    for _ in range(2):
        assert [tuple(cache.decode(i).shape) for i in range(22)] == [(3, height, width) for width, height in sizes]
        assert [int(cache.decode(i)[0, 0, 0]) for i in range(22)] == list(range(22))


def test_the_memory_is_estimated_from_a_few_images(tmp_path: Path) -> None:
    assert DecodedCache(Toy(n=1000)).estimate_bytes() == 1000 * 3 * 32 * 32
    mixed = DecodedCache(folder_of(tmp_path, [(10, 10), (20, 10)] * 5))
    assert mixed.estimate_bytes() == 10 * 3 * 150


def test_a_corrupt_file_is_reported_each_time_and_read_once(tmp_path: Path) -> None:
    dataset = folder_of(tmp_path, [(8, 6)] * 3)
    (tmp_path / "001.png").write_bytes(b"broken")
    cache = DecodedCache(dataset)
    with pytest.raises(DataError, match=r"001\.png cannot be read"):
        cache.decode(1)
    write_image(tmp_path / "001.png")  # repaired, but this run has counted it as lost
    with pytest.raises(DataError, match=r"001\.png cannot be read"):
        cache.decode(1)
    assert cache.decode(2).shape == (3, 6, 8)
    assert cache.estimate_bytes() == 3 * 3 * 8 * 6


def test_other_numbers_of_channels_are_passed_on() -> None:
    assert DecodedCache(Toy(n=2), channels=1).decode(0).shape == (1, 32, 32)


def test_a_copy_in_another_process_starts_empty() -> None:
    cache = DecodedCache(Toy(n=200))
    for index in range(200):
        cache.decode(index)
    sent = pickle.dumps(cache)
    assert len(sent) < 5000
    assert torch.equal(pickle.loads(sent).decode(199), cache.decode(199))
