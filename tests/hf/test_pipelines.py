"""What transformers checks of every pipeline: forms of input, options, batches, half precision."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import dinov2.hf as hf
from tests.hf.common_cases import EVERY_FAMILY, LABELS, our_class, picture, saved_folder

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)


@EVERY_FAMILY
@DTYPES
def test_classification_takes_pictures_paths_and_lists(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    classify = hf.pipeline("image-classification", model=saved_folder(tmp_path, family), dtype=dtype)
    picture().save(tmp_path / "picture.png")
    expected = classify(picture())
    assert classify(str(tmp_path / "picture.png")) == expected
    assert classify([picture(), str(tmp_path / "picture.png")]) == [expected, expected]
    assert list(classify(picture() for _ in range(2))) == [expected, expected]


@EVERY_FAMILY
def test_classification_has_its_options(family: str, tmp_path: Path) -> None:
    classify = hf.pipeline(model=str(saved_folder(tmp_path, family)))
    assert classify.task == "image-classification"
    assert len(classify(picture(), top_k=2)) == 2
    raw = classify(picture(), function_to_apply="none", top_k=5)
    with torch.inference_mode():
        logits = classify.model(classify.image_processor(picture(), return_tensors="pt").pixel_values).logits[0]
    found = torch.tensor([next(one["score"] for one in raw if one["label"] == name) for name in LABELS])
    torch.testing.assert_close(found, logits, atol=1e-5, rtol=1e-5)
    softmax = classify(picture(), function_to_apply="softmax", top_k=5)
    assert sum(one["score"] for one in softmax) == pytest.approx(1, abs=1e-5)


@EVERY_FAMILY
def test_batches_give_what_single_pictures_give(family: str, tmp_path: Path) -> None:
    classify = hf.pipeline(model=str(saved_folder(tmp_path, family)))
    pictures = [picture(60, 80), picture(90, 70), picture(64, 64)]
    alone = [classify(one) for one in pictures]
    for together in (classify(pictures, batch_size=2), classify(pictures, batch_size=3)):
        for one, other in zip(alone, together, strict=True):
            assert [answer["label"] for answer in one] == [answer["label"] for answer in other]
            np.testing.assert_allclose([a["score"] for a in one], [a["score"] for a in other], atol=1e-5)


@EVERY_FAMILY
@DTYPES
def test_feature_extraction_gives_all_tokens_or_the_pooled_one(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    extract = hf.pipeline("image-feature-extraction", model=saved_folder(tmp_path, family, "Model"), dtype=dtype)
    assert type(extract.model) is our_class(family, "Model")
    n_registers = getattr(extract.model.config, "num_register_tokens", 0)
    tokens = torch.tensor(extract(picture()))
    assert tokens.shape == (1, 1 + n_registers + 256, 32)
    assert isinstance(extract(picture(), return_tensors=True), torch.Tensor)
    pooled = torch.tensor(extract(picture(), pool=True))
    assert pooled.shape == (1, 32)
    torch.testing.assert_close(pooled, tokens[:, 0], atol=1e-6, rtol=0)


@EVERY_FAMILY
@pytest.mark.parametrize("form", ["model", "name and processor"])
def test_ready_parts_go_into_either_pipeline(family: str, form: str, tmp_path: Path) -> None:
    folder = saved_folder(tmp_path, family)
    processor = hf.AutoImageProcessor.from_pretrained(folder)
    parts: dict[str, Any] = {"model": str(folder), "image_processor": processor}
    if form == "model":
        parts["model"] = hf.AutoModelForImageClassification.from_pretrained(folder)
        theirs = transformers.pipeline("image-classification", **parts)
        assert theirs(picture()) == hf.pipeline("image-classification", **parts)(picture())
    assert len(hf.pipeline("image-classification", **parts)(picture())) == 5
