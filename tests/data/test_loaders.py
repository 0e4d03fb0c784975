import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

import dinov2.data
from dinov2.data.datasets import ImageNet, ImageNet22k
from dinov2.data.datasets.cifar import Cifar10
from dinov2.data.datasets.files import Folder
from dinov2.data.datasets.listing import ListFile
from dinov2.data.datasets.toy import Toy
from dinov2.data.loaders import DATASETS, make_dataset, parse_dataset_str
from dinov2.data.release import DatasetWithEnumeratedTargets, SamplerType, make_data_loader
from dinov2.errors import DataError
from tests.data.datasets.trees import class_tree, imagenet_tree, write_image
from tests.golden.loading import golden_json


class Numbers(Dataset[int]):
    """The numbers below `count`."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        return index


# Dataset strings


def test_a_bare_path_and_folder_are_the_same_set(tmp_path: Path) -> None:
    class_tree(tmp_path, {"a": 2, "b": 1})
    sets = [make_dataset(text) for text in (str(tmp_path), f"folder:{tmp_path}", f"folder:root={tmp_path}")]
    assert all(isinstance(dataset, Folder) for dataset in sets)
    assert len({dataset.fingerprint() for dataset in sets}) == 1


def test_a_list_is_named_by_its_path_alone_or_with_its_kind(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png")
    (tmp_path / "l.csv").write_text("path\na.png\n")
    for text in (str(tmp_path / "l.csv"), f"list:{tmp_path / 'l.csv'}", f"list:file={tmp_path / 'l.csv'}"):
        assert isinstance(make_dataset(text), ListFile)


def test_the_published_strings_keep_working(tmp_path: Path) -> None:
    imagenet_tree(tmp_path)
    dataset = make_dataset(
        dataset_str=f"ImageNet:split=VAL:root={tmp_path}:extra={tmp_path}",
        transform=lambda image: image.size,
        target_transform=lambda target: target + 100,
    )
    assert isinstance(dataset, ImageNet)
    assert dataset[2] == ((8, 6), 102)
    assert parse_dataset_str(f"ImageNet22k:root={tmp_path}:extra={tmp_path}").kind.build is ImageNet22k


def test_names_and_splits_may_be_written_in_any_case(tmp_path: Path) -> None:
    imagenet_tree(tmp_path)
    assert len(make_dataset(f"imagenet:split=train:root={tmp_path}")) == 6
    assert parse_dataset_str(f"CIFAR10:root={tmp_path}:split=test").arguments["split"] == "VAL"
    assert parse_dataset_str(f"cifar10:root={tmp_path}").kind.build is Cifar10


@pytest.mark.parametrize("text", ["toy", "toy:", "toy:split=TRAIN"])
def test_the_toy_set_needs_no_arguments(text: str) -> None:
    dataset = make_dataset(text)
    assert isinstance(dataset, Toy)
    assert (len(dataset), dataset.size, dataset.split) == (5000, 32, "TRAIN")


def test_the_toy_set_takes_size_and_number() -> None:
    dataset = make_dataset("toy:split=VAL:size=48:n=12")
    assert (len(dataset), dataset[0][0].size) == (12, (48, 48))


@pytest.mark.parametrize(
    "name", ["with:colon", "with=equals", "a:root=b:extra=c", "per%3Acent", "ImageNet:split=TRAIN"]
)
@pytest.mark.skipif(os.name == "nt", reason="Windows knows no such file names")
def test_paths_that_exist_win_over_the_grammar(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = imagenet_tree(tmp_path / name)
    assert len(make_dataset(str(tree))) == 13
    assert len(make_dataset(f"folder:{tree}")) == 13
    assert len(make_dataset(f"ImageNet:root={tree}:split=TRAIN:extra={tree}")) == 6
    assert len(make_dataset(f"ImageNet:split=TRAIN:root={tree}")) == 6
    monkeypatch.chdir(tmp_path)
    assert len(make_dataset(name)) == 13


def test_values_are_percent_decoded(tmp_path: Path) -> None:
    imagenet_tree(tmp_path / "a=b c")
    assert len(make_dataset(f"ImageNet:split=TEST:root={tmp_path}/a%3Db%20c")) == 4
    assert len(make_dataset(f"folder:{tmp_path}/a%3Db c")) == 13


@pytest.mark.skipif(os.name == "nt", reason="drives exist there")
def test_the_drive_of_a_windows_path_is_no_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / r"C:\data").mkdir()
    parsed = parse_dataset_str(r"ImageNet:root=C:\data:extra=D:\extra:split=TRAIN").arguments
    assert parsed == {"root": r"C:\data", "extra": r"D:\extra", "split": ImageNet.Split.TRAIN}


@pytest.mark.parametrize("build", [lambda **o: ImageNet(split=ImageNet.Split.VAL, **o), ImageNet22k])
def test_metadata_cannot_be_written_where_a_file_lies(tmp_path: Path, build: Any) -> None:
    (tmp_path / "file").write_text("")
    for extra in (tmp_path / "file", tmp_path / "file" / "extra"):
        with pytest.raises(DataError, match="extra=.* cannot be made .*; give another one"):
            build(root=tmp_path, extra=extra).dump_extra()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "path '' does not exist; give a folder"),
        ("/no/such/folder", "'/no/such/folder' does not exist; give a folder of images, or one of: folder:PATH"),
        (
            "ImageNette:split=TRAIN",
            "'ImageNette' is no known data set, the nearest is 'ImageNet'; known are folder, ",
        ),
        ("imagefolder", "'imagefolder' is no existing path, and 'imagefolder' is no known data set"),
        ("toy:split=TRAN", "the split 'TRAN' in 'toy:split=TRAN' is unknown to toy, the nearest is 'TRAIN'"),
        ("toy:splitt=TRAIN", "key 'splitt' .* the nearest is 'split'; accepted keys are split, size, n"),
        ("toy:TRAIN", "'TRAIN' in 'toy:TRAIN' is no key=value; accepted keys are split, size, n"),
        ("toy:n=many", "n in 'toy:n=many' is 'many'; write a whole number"),
        ("toy:n=0", "a toy set of 0 images"),
        ("ImageNet:split=TRAIN", "lacks root; write ImageNet:split=TRAIN:root=PATH"),
        ("ImageNet22k:split=TRAIN:root=.", "key 'split' .* unknown to ImageNet22k.* accepted keys are root, extra"),
        ("ImageNet:split=TRAIN:root=/no/such", "root of .* does not exist: there is no /no/such"),
        ("folder:/no/such", "root of 'folder:/no/such' does not exist"),
        ("folder:", "lacks root; write folder:PATH"),
        ("list:/no/such.txt", "there is no /no/such.txt"),
        ("cifar10:root=", "root in 'cifar10:root=' is empty"),
        (r"ImageNet:split=TRAIN:root=C:\data:extra=C:\extra", r"does not exist: there is no C:\\data$"),
        ("ImageNet:root=C:/data:split=TRAIN", "does not exist: there is no C:/data$"),
        ("ImageNet22k:root=E:", "does not exist: there is no E:$"),
        (r"list:D:\l.csv", r"does not exist: there is no D:\\l\.csv$"),
        (r"\\server\photos", "does not exist; give a folder of images"),
        ("https://example.org/photos.zip", "is an address, and images are not fetched; download them"),
        ("folder:s3://bucket/photos", "is an address, and images are not fetched; download them"),
        ("toy:split=TRAIN:split=VAL", "the key 'split' stands in .* twice"),
        ("toy:n=\u0663", "write a whole number"),
        ("toy:n=" + "9" * 5000, "write a whole number"),
        ("toy:n=999999999", "a toy set of 999999999 images .* cannot be drawn; n is 1 to 10,000,000"),
        ("toy:size=999999", "size 8 to 4,096"),
    ],
)
def test_what_is_wrong_with_a_string_is_said_with_what_would_be_right(text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        make_dataset(text)


def test_a_file_that_is_no_list_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is a file and no list of images \(\.txt, \.csv or \.tsv\)"):
        make_dataset(str(write_image(tmp_path / "a.png")))


def test_the_table_names_each_set_once_and_its_keys_first() -> None:
    names = [kind.name.lower() for kind in DATASETS]
    assert len(names) == len(set(names))
    assert all(kind.example.startswith(kind.name) and kind.required <= len(kind.keys) for kind in DATASETS)


# Loaders


def options(**changes: Any) -> dict[str, Any]:
    return {"dataset": Numbers(10), "batch_size": 3, "num_workers": 0, **changes}


def indices(loader: Any, count: int) -> list[int]:
    found: list[int] = []
    for batch in loader:
        found += batch.tolist()
        if len(found) >= count:
            break
    return found[:count]


CASES = [case for case in golden_json("samplers")["cases"] if case["world_size"] == 1]


@pytest.mark.parametrize("type_name", sorted({case["type"] for case in CASES}))
def test_the_orders_are_the_published_ones(type_name: str) -> None:
    cases = [case for case in CASES if case["type"] == type_name and case.get("epoch", 0) == 0]
    assert cases
    for case in cases:
        loader = make_data_loader(
            dataset=Numbers(case["sample_count"]),
            batch_size=1,
            num_workers=0,
            shuffle=case["shuffle"],
            seed=case["seed"],
            sampler_type=SamplerType[type_name],
            sampler_size=case.get("size", -1),
            sampler_advance=case.get("advance", 0),
            drop_last=False,
        )
        expected = case["indices"]
        assert indices(loader, len(expected)) == expected, case
        if "length" in case:
            assert len(loader) == case["length"]


ERRORS = {
    "infinite_size": {"sampler_type": SamplerType.INFINITE, "sampler_size": 5},
    "sharded_size": {"sampler_type": SamplerType.SHARDED_INFINITE, "sampler_size": 5},
    "epoch_advance": {"sampler_type": SamplerType.EPOCH, "sampler_advance": 5},
    "distributed_size": {"sampler_type": SamplerType.DISTRIBUTED, "sampler_size": 5},
    "distributed_advance": {"sampler_type": SamplerType.DISTRIBUTED, "sampler_advance": 5},
}


@pytest.mark.parametrize(("name", "error"), golden_json("samplers")["errors"].items())
def test_options_that_an_order_does_not_have_are_refused_as_published(name: str, error: str) -> None:
    with pytest.raises({"ValueError": ValueError, "NotImplementedError": NotImplementedError}[error]):
        make_data_loader(**options(**ERRORS[name]))


def test_sampler_types_have_the_published_values() -> None:
    assert {kind.name: kind.value for kind in SamplerType} == {
        "DISTRIBUTED": 0,
        "EPOCH": 1,
        "INFINITE": 2,
        "SHARDED_INFINITE": 3,
        "SHARDED_INFINITE_NEW": 4,
    }


def test_shuffling_without_a_sampler_is_refused_and_the_plain_order_works() -> None:
    with pytest.raises(ValueError, match="shuffle=True needs a sampler"):
        make_data_loader(**options(sampler_type=None))
    loader = make_data_loader(**options(sampler_type=None, shuffle=False, drop_last=False))
    assert [batch.tolist() for batch in loader] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]


def test_persistent_workers_without_workers_are_just_none() -> None:
    loader = make_data_loader(**options(sampler_type=SamplerType.EPOCH, persistent_workers=True))
    assert len(list(loader)) == 3


def test_workers_and_a_collate_function_are_used() -> None:
    loader = make_data_loader(
        **options(sampler_type=SamplerType.EPOCH, num_workers=1, persistent_workers=True, collate_fn=sum)
    )
    assert [sum(loader), sum(loader)] == [expected_sum(loader)] * 2
    del loader


def expected_sum(loader: Any) -> int:
    """Sum of the nine numbers that make three full batches."""
    return sum(list(loader.sampler)[:9])


# Adapters and the folder's door


def test_enumerated_targets_carry_the_index_and_stand_in_for_missing_labels(tmp_path: Path) -> None:
    class_tree(tmp_path / "labelled", {"a": 1, "b": 2})
    labelled = DatasetWithEnumeratedTargets(make_dataset(str(tmp_path / "labelled")))
    assert [target for _, target in (labelled[i] for i in range(3))] == [(0, 0), (1, 1), (2, 1)]
    assert [labelled.get_target(i) for i in range(3)] == [(0, 0), (1, 1), (2, 1)]
    assert labelled.get_targets().tolist() == [0, 1, 1]
    plain = DatasetWithEnumeratedTargets(make_dataset(str(tmp_path / "labelled" / "b")))
    assert [target for _, target in (plain[i] for i in range(2))] == [(0, 0), (1, 1)]
    assert plain.get_target(1) == (1, 1)
    assert plain.get_targets().tolist() == [0, 1]
    assert plain.get_image_data(0)[:4] == b"\x89PNG"


def test_the_published_names_are_importable_and_unknown_ones_are_named() -> None:
    assert dinov2.data.make_dataset is make_dataset
    assert dinov2.data.SamplerType is SamplerType
    assert set(dinov2.data.__all__) <= set(dir(dinov2.data))
    with pytest.raises(AttributeError, match="no attribute 'nothing'; it offers"):
        dinov2.data.nothing  # noqa: B018


def test_importing_the_folder_loads_no_torch() -> None:
    code = "import sys, dinov2.data; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


@pytest.mark.real_data
def test_real_photographs_are_read_with_their_labels(vision_data: Path) -> None:
    if not (vision_data / "cifar10").is_dir():
        pytest.skip("VISION_DATA holds no cifar10")
    dataset = make_dataset(str(vision_data / "cifar10" / "test"))
    assert len(dataset) == 10_000
    assert np.bincount(dataset.get_targets()).tolist() == [1000] * 10  # type: ignore[arg-type]
    assert dataset.get_tensor(0).shape == torch.Size([3, 32, 32])
