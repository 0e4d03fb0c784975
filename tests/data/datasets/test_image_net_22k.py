import gzip
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinov2.data.datasets import ImageNet22k
from dinov2.errors import DataError


def encoded(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), (level, level, level)).save(buffer, format="PNG")
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    root = tmp_path / "tars"
    root.mkdir()
    write_tar(root / "n2.tar", {"n2_1.JPEG": encoded(21), "n2_2.JPEG": gzip.compress(encoded(22))})
    write_tar(root / "n1.tar", {"readme.txt": b"text", "deep/" + "x" * 150 + ".JPEG": encoded(11)})
    return root


@pytest.mark.parametrize("dumped", [True, False], ids=["index", "headers"])
def test_images_are_read_in_place_gzipped_or_not(tars: Path, tmp_path: Path, dumped: bool) -> None:
    if dumped:
        ImageNet22k(root=tars, extra=tmp_path / "extra").dump_extra()
    dataset = ImageNet22k(root=tars, extra=tmp_path / "extra" if dumped else None)
    assert [image.getpixel((0, 0))[0] for image, _ in dataset] == [11, 21, 22]
    assert dataset.get_targets().tolist() == [0, 1, 1]
    assert dataset.class_names == ["n1", "n2"]
    assert dataset.get_class_ids().tolist() == ["n1", "n2", "n2"]
    assert dataset.path_of(2) == str(tars / "n2.tar") + "/n2_2.JPEG"


def test_the_index_holds_64_bit_offsets_of_headers(tars: Path, tmp_path: Path) -> None:
    ImageNet22k(root=tars, extra=tmp_path).dump_extra()
    entries = np.load(tmp_path / "entries.npy")
    assert entries.dtype.names == ("class_index", "class_id", "start_offset", "end_offset", "filename")
    assert entries["start_offset"].dtype == entries["end_offset"].dtype == np.int64
    assert entries["start_offset"][1] == 0  # the first member of n2.tar: its header opens the file


def test_an_index_with_32_bit_block_offsets_is_read(tars: Path, tmp_path: Path) -> None:
    size = len(encoded(21))
    padded = 512 + -(-size // 512) * 512  # the published index counts the padding in
    dtype = [
        ("class_index", "<u4"),
        ("class_id", "U2"),
        ("start_offset", "<u4"),
        ("end_offset", "<u4"),
        ("filename", "U9"),
    ]
    np.save(tmp_path / "entries.npy", np.array([(0, "n2", 0, padded, "n2_1.JPEG")], dtype=dtype))
    np.save(tmp_path / "class-ids.npy", np.array(["n2"]))
    assert ImageNet22k(root=tars, extra=tmp_path)[0][0].getpixel((0, 0)) == (21, 21, 21)


def test_a_tar_that_is_cut_short_names_the_image(tars: Path, tmp_path: Path) -> None:
    dataset = ImageNet22k(root=tars)
    assert len(dataset) == 3
    (tars / "n2.tar").write_bytes((tars / "n2.tar").read_bytes()[:530])
    with pytest.raises(DataError, match=r"n2\.tar/n2_1\.JPEG is cut short"):
        dataset[1]


def test_what_is_missing_is_said(tmp_path: Path, tars: Path) -> None:
    with pytest.raises(DataError, match="nowhere does not exist"):
        len(ImageNet22k(root=tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no image was found in the 0 tars"):
        len(ImageNet22k(root=tmp_path / "empty"))
    (tars / "n3.tar").write_bytes(b"no tar at all")
    with pytest.raises(DataError, match=r"n3\.tar cannot be read as a tar"):
        len(ImageNet22k(root=tars))
