"""Files of image processors, model folders without one, and the pipelines and Auto classes that use them."""

import copy
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from dinov2.hf.processing import BitImageProcessor, BitImageProcessorPil, default_image_processor
from dinov2.hf.processor_settings import UnknownSetting
from tests.hf.processing_cases import RELEASED, smooth_picture

PICTURE = smooth_picture(50, 61)
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}


def write(folder: Path, **files: dict[str, object]) -> Path:
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_a_processor_comes_back_from_its_folder(tmp_path: Path) -> None:
    processor = BitImageProcessor(size=64, crop_size=56, resample="bilinear", image_mean=0.5, do_normalize=False)
    files = processor.save_pretrained(tmp_path)
    assert [Path(file).name for file in files] == ["preprocessor_config.json"]
    for place in (tmp_path, str(tmp_path), tmp_path / "preprocessor_config.json"):
        assert BitImageProcessor.from_pretrained(place).to_dict() == processor.to_dict()
    assert BitImageProcessor.from_json_file(tmp_path / "preprocessor_config.json").to_dict() == processor.to_dict()


def test_the_file_holds_what_the_released_repositories_hold(tmp_path: Path) -> None:
    BitImageProcessorPil(**RELEASED).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "preprocessor_config.json").read_text()) == {
        "crop_size": {"height": 224, "width": 224},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.485, 0.456, 0.406],
        "image_processor_type": "BitImageProcessor",
        "image_std": [0.229, 0.224, 0.225],
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
        "size": {"shortest_edge": 256},
    }


def test_settings_beyond_the_released_ones_are_written_when_they_differ() -> None:
    assert BitImageProcessor(do_pad=True, pad_size=30).to_dict().keys() - BitImageProcessor().to_dict().keys() == {
        "do_pad",
        "pad_size",
    }


def test_an_old_file_with_plain_sizes_is_understood(tmp_path: Path) -> None:
    old = {"size": 256, "crop_size": 224, "feature_extractor_type": "BitFeatureExtractor", "resample": 3}
    processor = BitImageProcessor.from_pretrained(write(tmp_path, preprocessor_config=old))
    assert (processor.size, processor.crop_size) == ({"shortest_edge": 256}, {"height": 224, "width": 224})
    assert "feature_extractor_type" not in processor.to_dict()


def test_entries_that_are_no_settings_stay_in_the_file(tmp_path: Path) -> None:
    told = {"size": {"shortest_edge": 32}, "license": "mine", "backend": "pil", "processor_class": None}
    processor = BitImageProcessor.from_pretrained(write(tmp_path, preprocessor_config=told))
    assert processor.license == "mine" and processor.to_dict()["license"] == "mine"
    assert processor.backend == BitImageProcessor().backend
    assert not {"backend", "processor_class"} & processor.to_dict().keys()


def test_a_file_can_be_overridden_when_it_is_loaded(tmp_path: Path) -> None:
    BitImageProcessor(**RELEASED).save_pretrained(tmp_path)
    processor = BitImageProcessor.from_pretrained(tmp_path, size=518, do_center_crop=False, backend="pil")
    assert (processor.size, processor.do_center_crop, processor.backend) == ({"shortest_edge": 518}, False, "pil")
    assert BitImageProcessor.from_pretrained(tmp_path, use_fast=False).backend == "pil"
    assert BitImageProcessor.from_pretrained(tmp_path, use_fast=True).backend == "torchvision"
    _, unused = BitImageProcessor.from_pretrained(tmp_path, foo=1, do_resize=False, return_unused_kwargs=True)
    assert unused == {"foo": 1}
    with pytest.raises(UnknownSetting, match="from_pretrained has no setting 'crop'; the nearest is 'crop_size'"):
        BitImageProcessor.from_pretrained(tmp_path, crop=3)


@pytest.mark.parametrize("family", ["dinov2", "dinov2_with_registers"])
@pytest.mark.parametrize(("image_size", "crop"), [(518, 224), (28, 28), ([56, 70], 56)])
def test_a_model_folder_without_a_file_has_the_released_settings(
    family: str, image_size: object, crop: int, tmp_path: Path
) -> None:
    folder = write(tmp_path, config={"model_type": family, "image_size": image_size, "patch_size": 14})
    processor = BitImageProcessor.from_pretrained(folder, do_convert_rgb=False)
    assert processor.crop_size == {"height": crop, "width": crop} and not processor.do_convert_rgb
    assert processor.size == {"shortest_edge": round(crop * 256 / 224)}
    assert processor.image_mean == (0.485, 0.456, 0.406)


@pytest.mark.parametrize("config", [None, {"model_type": "vit", "image_size": 224}, {"image_size": 224}])
def test_any_other_folder_without_a_file_is_refused_as_transformers_does(
    config: dict[str, object] | None, tmp_path: Path
) -> None:
    if config is not None:
        write(tmp_path, config=config)
    with pytest.raises(OSError, match=r"preprocessor_config\.json"):
        BitImageProcessor.from_pretrained(tmp_path)


def test_a_processor_can_be_copied_and_sent_to_other_processes() -> None:
    processor = BitImageProcessor(size=32, crop_size=28, backend="pil")
    expected = processor(PICTURE, return_tensors="pt").pixel_values
    for twin in (copy.deepcopy(processor), pickle.loads(pickle.dumps(processor))):
        assert twin.backend == "pil"
        assert torch.equal(twin(PICTURE, return_tensors="pt").pixel_values, expected)


def test_it_prints_as_its_file() -> None:
    shown = repr(BitImageProcessorPil(size=32))
    assert shown.startswith("BitImageProcessorPil {") and '"shortest_edge": 32' in shown


def test_stock_auto_makes_its_own_class_of_our_file_unless_ours_is_asked(tmp_path: Path) -> None:
    BitImageProcessor(**RELEASED).save_pretrained(tmp_path)
    stock = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    assert type(stock) is transformers.BitImageProcessor
    assert default_image_processor() is BitImageProcessor


@pytest.mark.parametrize("kind", [BitImageProcessor, BitImageProcessorPil])
def test_stock_pipelines_take_our_processor(kind: type[BitImageProcessor], tmp_path: Path) -> None:
    processor = kind(size=32, crop_size=28)
    model = transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**SMALL, num_labels=7)).eval()
    Image.fromarray(PICTURE).save(tmp_path / "picture.png")
    classify = transformers.pipeline("image-classification", model=model, image_processor=processor)
    answers = classify([str(tmp_path / "picture.png"), Image.fromarray(PICTURE)], top_k=5)
    assert [len(answer) for answer in answers] == [5, 5] and answers[0] == answers[1]
    with torch.inference_mode():
        logits = model(**processor(PICTURE, return_tensors="pt")).logits[0]
    assert answers[0][0]["score"] == pytest.approx(logits.softmax(dim=0).max().item(), abs=1e-5)
    features = transformers.pipeline("image-feature-extraction", model=model.dinov2, image_processor=processor)
    assert np.asarray(features(Image.fromarray(PICTURE))).shape == (1, 5, 16)
