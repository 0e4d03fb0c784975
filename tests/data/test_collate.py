import hashlib
import json
import random
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from dinov2.data.crops.collate import CropBatch, stack_crops
from dinov2.data.crops.masking import MaskingGenerator
from dinov2.data.release import collate_data_and_cast
from dinov2.errors import DataError
from tests.golden.recipe import images

CASES = json.loads((Path(__file__).parents[1] / "golden" / "masks.json").read_text())["collate"]


def samples_of(batch, n_local=2, size=28):
    """Samples whose crops tell which image and crop they are."""

    def crop(number):
        return torch.full((3, size, size), float(number))

    return [
        (
            {
                "global_crops": [crop(b), crop(100 + b)],
                "local_crops": [crop(1000 * k + b) for k in range(1, n_local + 1)],
            },
            (),
        )
        for b in range(batch)
    ]


def collated(batch=4, *, n_local=2, probability=0.5, ratio=(0.1, 0.5), dtype=torch.float32):
    return collate_data_and_cast(
        samples_of(batch, n_local),
        ratio,
        probability,
        dtype,
        n_tokens=49,
        mask_generator=MaskingGenerator(7, max_num_patches=21.0),
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"batch{case['batch']}-seed{case['seed']}")
def test_batches_are_those_of_the_release(case):
    height, width = case["grid"]
    crops = images(case["batch"] * (case["global_crops"] + case["local_crops"]), 14, 14)
    n_global = case["global_crops"]
    per_image = crops.view(case["batch"], n_global + case["local_crops"], 3, 14, 14)
    samples = [
        ({"global_crops": list(some[:n_global]), "local_crops": list(some[n_global:])}, ()) for some in per_image
    ]
    generator = MaskingGenerator((height, width), max_num_patches=0.5 * height * width)
    collate = partial(
        collate_data_and_cast,
        mask_ratio_tuple=tuple(case["mask_ratio"]),
        mask_probability=case["mask_probability"],
        dtype=torch.float32,
        n_tokens=height * width,
        mask_generator=generator,
    )
    random.seed(case["seed"])
    result = collate(samples)
    assert random.random() == case["next_random"]
    assert list(result) == case["keys"]
    masks = result["collated_masks"].numpy()
    assert [np.packbits(mask).tobytes().hex() for mask in masks] == case["collated_masks"]
    assert masks.sum(axis=1).tolist() == case["masked_per_crop"]
    indices = result["mask_indices_list"].numpy().astype("<i8")
    assert hashlib.sha256(indices.tobytes()).hexdigest() == case["mask_indices_sha256"]
    weights = result["masks_weight"]
    assert list(weights.shape) == case["masks_weight_shape"]
    assert weights.dtype == torch.float32
    assert weights.double().sum().item() == pytest.approx(case["masks_weight_sum"], abs=1e-12)
    assert result["upperbound"] == case["upperbound"]
    assert result["n_masked_patches"].tolist() == case["n_masked_patches"]
    assert str(result["n_masked_patches"].dtype) == case["n_masked_patches_dtype"]


def test_crops_are_crop_major_and_cast():
    result = collated(4, dtype=torch.float16)
    assert result["collated_global_crops"].dtype == torch.float16
    assert result["collated_global_crops"][:, 0, 0, 0].tolist() == [0, 1, 2, 3, 100, 101, 102, 103]
    assert result["collated_local_crops"][:, 0, 0, 0].tolist() == [1000, 1001, 1002, 1003, 2000, 2001, 2002, 2003]


def test_no_local_crops_and_no_masks_make_a_batch():
    result = collated(2, n_local=0, probability=0.0)
    assert result["collated_local_crops"] is None
    assert result["n_masked_patches"].item() == 0
    batch = CropBatch.from_dict(result)
    assert batch.local_crops is None
    assert batch.masked_indices.shape == batch.mask_weights.shape == (0,)
    assert batch.masks.shape == (4, 49)


def test_a_batch_of_one_image_works():
    assert collated(1)["collated_masks"].shape == (2, 49)


def test_missing_pieces_are_named():
    with pytest.raises(DataError, match="mask_generator"):
        collate_data_and_cast(samples_of(1), (0.1, 0.5), 0.5, torch.float32)
    with pytest.raises(DataError, match="global_crops"):
        collate_data_and_cast(
            [({"global_crops": [], "local_crops": []}, ())], (0.1, 0.5), 0.5, torch.float32, None, MaskingGenerator(7)
        )


def test_weights_of_a_crop_add_up_to_one():
    masks = torch.zeros(4, 9, dtype=torch.bool)
    masks[1, [0, 3, 4]] = True
    masks[3, 8] = True
    batch = CropBatch.from_crops(torch.zeros(4, 3, 6, 6), None, masks, sample_numbers=torch.arange(2))
    assert batch.masked_indices.tolist() == [9, 12, 13, 35]
    assert batch.mask_weights.tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 1.0])


def test_the_dictionary_of_the_release_becomes_a_batch():
    random.seed(0)
    result = collated(4)
    batch = CropBatch.from_dict(result)
    assert batch.global_crops is result["collated_global_crops"]
    assert torch.equal(batch.masks.flatten().nonzero().flatten(), batch.masked_indices)
    assert batch.sample_numbers.tolist() == [-1] * 4
    assert batch.failures == []


def test_all_tensors_but_the_sample_numbers_move_to_a_device():
    random.seed(0)
    batch = CropBatch.from_dict(collated(4)).to("meta")
    assert all(tensor.device.type == "meta" for tensor in batch.device_tensors())
    assert batch.sample_numbers.device.type == "cpu"


def test_stacking_nothing_gives_nothing():
    assert stack_crops([[], []]) is None
