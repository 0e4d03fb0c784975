import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest

from dinov2.data.datasets.cifar import Cifar10
from dinov2.errors import DataError
from tests.data.datasets.trees import cifar_rows

NAMES = [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]


def write_pickles(folder: Path) -> Path:
    """The six batch files with bytes as keys, as Python 2 wrote them."""
    folder.mkdir(parents=True)
    for seed, name in enumerate(NAMES):
        pixels, labels = cifar_rows(4, seed=seed)
        batch = {b"data": pixels, b"labels": labels, b"batch_label": name.encode(), b"filenames": [b"x.png"] * 4}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    return folder


def write_binary(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for seed, name in enumerate(NAMES):
        pixels, labels = cifar_rows(4, seed=seed)
        rows = np.concatenate([np.array(labels, dtype=np.uint8)[:, None], pixels], axis=1)
        (folder / f"{name}.bin").write_bytes(rows.tobytes())
    return folder


def archived(folder: Path, name: str) -> Path:
    with tarfile.open(folder.parent / name, "w:gz") as tar:
        tar.add(folder, arcname=folder.name)
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    return folder.parent / name


def as_folder(tmp: Path) -> Path:
    return write_pickles(tmp / "cifar-10-batches-py").parent


def as_inner_folder(tmp: Path) -> Path:
    return write_pickles(tmp / "cifar-10-batches-py")


def as_archive(tmp: Path) -> Path:
    return archived(write_pickles(tmp / "cifar-10-batches-py"), "cifar-10-python.tar.gz")


def as_folder_of_archive(tmp: Path) -> Path:
    return as_archive(tmp).parent


def as_binary(tmp: Path) -> Path:
    return write_binary(tmp / "cifar-10-batches-bin").parent


def as_binary_archive(tmp: Path) -> Path:
    return archived(write_binary(tmp / "cifar-10-batches-bin"), "cifar-10-binary.tar.gz").parent


FORMS = [as_folder, as_inner_folder, as_archive, as_folder_of_archive, as_binary, as_binary_archive]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_every_form_of_the_archives_gives_the_same_images(tmp_path: Path, form) -> None:
    root = form(tmp_path)
    train, val = Cifar10(root), Cifar10(root, split="VAL")
    assert (len(train), len(val)) == (20, 4)
    pixels, labels = cifar_rows(4, seed=1)  # the second batch is samples 4 to 7
    image, target = train[6]
    assert target == labels[2]
    assert np.array_equal(np.asarray(image), pixels[2].reshape(3, 32, 32).transpose(1, 2, 0))
    assert np.array_equal(train.get_tensor(6).numpy(), pixels[2].reshape(3, 32, 32))
    assert val.get_targets().tolist() == cifar_rows(4, seed=5)[1]


def test_the_fingerprint_is_that_of_the_images_not_of_the_files(tmp_path: Path) -> None:
    one, two = Cifar10(as_folder(tmp_path / "a")), Cifar10(as_binary(tmp_path / "b"))
    assert one.fingerprint() == two.fingerprint() != Cifar10(one.root, split="VAL").fingerprint()


class Trap:
    """Unpickling it would run a command."""

    def __reduce__(self):
        return os.system, ("echo trapped > trapped.txt",)


@pytest.mark.parametrize("payload", [Trap(), {b"data": Trap(), b"labels": [0]}, {b"data": [Trap()], b"labels": [0]}])
def test_a_pickle_that_wants_to_run_something_is_refused(
    tmp_path: Path, payload: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = write_pickles(tmp_path / "cifar-10-batches-py")
    (folder / "data_batch_3").write_bytes(pickle.dumps(payload, protocol=2))
    with pytest.raises(DataError, match=r"data_batch_3 is no CIFAR-10 batch: it asks for (posix|nt|os)\.system"):
        len(Cifar10(tmp_path))
    assert not (tmp_path / "trapped.txt").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"garbage",
        pickle.dumps({b"labels": [1]}, protocol=2),
        pickle.dumps({b"data": np.zeros((2, 5), dtype=np.uint8), b"labels": [1, 2]}, protocol=2),
        pickle.dumps({b"data": np.zeros((1, 3072), dtype=np.uint8), b"labels": [77]}, protocol=2),
    ],
)
def test_a_damaged_batch_is_named(tmp_path: Path, content: bytes) -> None:
    folder = write_pickles(tmp_path / "cifar-10-batches-py")
    (folder / "data_batch_2").write_bytes(content)
    with pytest.raises(DataError, match="data_batch_2 is no CIFAR-10 batch"):
        len(Cifar10(tmp_path))


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no CIFAR-10 was found in .* expected cifar-10-batches-py"):
        len(Cifar10(tmp_path))
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"cut off")
    with pytest.raises(DataError, match="archive .* cannot be read"):
        len(Cifar10(tmp_path))
    with pytest.raises(DataError, match="no split 'TRIAN'"):
        Cifar10(tmp_path, split="TRIAN")  # type: ignore[arg-type]
