"""Our image processors beside the stock ones: the newest version here, older ones in a process of their own."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from dinov2.hf.processing import BitImageProcessor, BitImageProcessorFast, BitImageProcessorPil
from tests.hf.processing_cases import (
    RELEASED,
    defaults_agree,
    difference,
    differences,
    files_are_exchanged,
    smooth_picture,
    stock_class,
)
from tests.hf.stock_versions import OLDER_VERSIONS, run_under


@pytest.mark.parametrize("backend", ["torchvision", "pil"])
def test_pixels_equal_the_stock_class_of_the_same_backend(backend: str) -> None:
    found = differences(backend)
    assert len(found) > 60
    assert {case: value for case, value in found.items() if value > 1e-5} == {}


def test_classes_of_the_same_name_do_the_same_by_default() -> None:
    found = defaults_agree()
    assert len(found) == 9
    assert [case for case, agrees in found.items() if not agrees] == []


def test_files_are_read_by_both_sides_with_the_same_result(tmp_path: Path) -> None:
    found = files_are_exchanged(tmp_path)
    assert len(found) == 11
    assert [case for case, agrees in found.items() if not agrees] == []


UNDER_AN_OLDER_VERSION = """
import numpy as np
from PIL import Image
from dinov2.hf.processing import BitImageProcessor, BitImageProcessorFast
from tests.hf.processing_cases import defaults_agree, differences, files_are_exchanged

# What the older stock classes get wrong: transparency, paths, grey arrays, names of filters, unknown keywords.
clear = Image.new("RGBA", (30, 30), (0, 0, 0, 0))
clear.save("clear.png")
newer = {}
for kind in (BitImageProcessor, BitImageProcessorFast):
    told = dict(do_normalize=False, crop_size=14, return_tensors="pt")
    processor = kind(size=14)
    newer[kind.__name__] = [
        float(processor(clear, **told).pixel_values.min()),
        float(processor("clear.png", **told).pixel_values.min()),
        float(processor(np.full((9, 9), 255, np.uint8), **told, resample="bicubic").pixel_values.min()),
    ]
    try:
        processor(clear, imagemean=0.5)
    except TypeError as error:
        newer[kind.__name__].append(str(error))

bare = pathlib.Path("bare")
bare.mkdir()
(bare / "config.json").write_text('{"model_type": "dinov2", "image_size": 28, "patch_size": 14}')

class Config(transformers.PretrainedConfig):
    model_type = "own"

transformers.AutoConfig.register("own", Config)
transformers.AutoImageProcessor.register(
    Config, slow_image_processor_class=BitImageProcessor, fast_image_processor_class=BitImageProcessorFast
)
pathlib.Path("preprocessor_config.json").write_text("{}")
pathlib.Path("config.json").write_text('{"model_type": "own"}')
registered = [transformers.AutoImageProcessor.from_pretrained(".", use_fast=fast) for fast in (False, True)]

result = {
    "pixels": {backend: differences(backend) for backend in ("torchvision", "pil")},
    "defaults": defaults_agree(),
    "files": files_are_exchanged(pathlib.Path(".")),
    "newer": newer,
    "bare": BitImageProcessor.from_pretrained(bare).crop_size,
    "registered": [processor.backend for processor in registered],
}
"""


@pytest.fixture(scope="module", params=OLDER_VERSIONS)
def older(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the script above finds under one older version."""
    found: dict[str, Any] = run_under(request.param, UNDER_AN_OLDER_VERSION, tmp_path_factory.mktemp("older"))
    return found


@pytest.mark.slow
def test_older_versions_agree_as_the_newest_does(older: dict[str, Any]) -> None:
    for backend, found in older["pixels"].items():
        assert {case: value for case, value in found.items() if value > 1e-5} == {}, backend
        assert len(found) > 60
    assert len(older["defaults"]) == 6 and len(older["files"]) == 11
    agreements = {**older["defaults"], **older["files"]}
    assert [case for case, agrees in agreements.items() if not agrees] == []


@pytest.mark.slow
def test_newer_behaviour_holds_under_older_versions(older: dict[str, Any]) -> None:
    for name, found in older["newer"].items():
        refusal = f"{name}.preprocess has no setting 'imagemean'; the nearest is 'image_mean'"
        assert found == [pytest.approx(1.0), pytest.approx(1.0), pytest.approx(1.0), refusal]
    assert older["bare"] == {"height": 28, "width": 28}


@pytest.mark.slow
def test_older_auto_classes_take_both_of_our_forms(older: dict[str, Any]) -> None:
    assert older["registered"] == ["pil", "torchvision"]


# Figures of the public classes on the test image by recipe, with the released settings: mean, standard deviation, and
# the three channels in the corner and in the middle.
GOLDEN = {
    (480, 640): (0.231207, 1.168364, (2.11191, 0.66036, -0.41011), (0.05694, 1.51821, -0.86327)),
    (200, 150): (0.187601, 1.173395, (1.56392, -0.61765, 1.61168), None),
    (333, 500): (0.233442, 1.175587, (1.92354, 0.29272, -0.41011), None),
    (256, 256): (0.198183, 1.165272, None, None),
    (100, 900): (0.290459, 1.281275, None, None),
}


@pytest.mark.parametrize("size", GOLDEN, ids=str)
def test_pil_pixels_are_those_of_the_published_pipeline(size: tuple[int, int]) -> None:
    mean, std, corner, middle = GOLDEN[size]
    pixels = BitImageProcessorPil(**RELEASED)(smooth_picture(*size), return_tensors="pt").pixel_values
    assert pixels.shape == (1, 3, 224, 224)
    assert pixels.mean().item() == pytest.approx(mean, abs=1e-5)
    assert pixels.std().item() == pytest.approx(std, abs=1e-5)
    for expected, place in ((corner, (0, 0)), (middle, (112, 112))):
        if expected is not None:
            torch.testing.assert_close(pixels[0, :, *place], torch.tensor(expected), atol=1e-5, rtol=0)


def test_the_torchvision_backend_is_a_grey_level_or_two_away_from_pil() -> None:
    picture = smooth_picture(480, 640)
    exact, fast = (
        BitImageProcessor(**RELEASED, backend=backend)(picture, return_tensors="pt").pixel_values
        for backend in ("pil", "torchvision")
    )
    apart = (exact - fast).abs()
    assert 0 < apart.max().item() < 0.0351  # two levels of the channel with the largest step
    assert (apart > 1e-3).float().mean().item() == pytest.approx(0.0047, abs=0.0005)


def test_transparency_is_laid_on_white_as_the_newest_stock_classes_do() -> None:
    alpha = np.linspace(0, 255, 40 * 48).round().astype(np.uint8).reshape(40, 48, 1)
    array = np.concatenate([smooth_picture(40, 48), alpha], axis=2)
    picture = Image.fromarray(array)
    forms = {
        "RGBA": picture,
        "LA": picture.convert("LA"),
        "palette": picture.quantize(),
        "HWC": array,
        "CHW": torch.from_numpy(array.transpose(2, 0, 1).copy()),
    }
    for backend in ("torchvision", "pil"):
        ours, theirs = BitImageProcessor(**RELEASED, backend=backend), stock_class(backend)(**RELEASED)
        for name, form in forms.items():
            pixels = [processor(form, return_tensors="pt").pixel_values for processor in (ours, theirs)]
            assert difference(*pixels) <= 1e-5, (backend, name)


def odd_pictures() -> dict[str, Any]:
    """One picture in forms that are rare, and rare pictures."""
    array = smooth_picture(50, 61)
    picture, tensor = Image.fromarray(array), torch.from_numpy(array)
    return {
        **{mode: picture.convert(mode) for mode in ("YCbCr", "HSV", "LAB")},
        "one column": Image.fromarray(array[:, :1]),
        "one row": Image.fromarray(array[:1]),
        "one pixel": Image.fromarray(array[:1, :1]),
        "three rows": array[:3],
        "four columns": array[:, :4],
        "channels first by strides": array.transpose(2, 0, 1),
        "float16": tensor.half(),
        "float64": tensor.double(),
        "int16": tensor.to(torch.int16),
        "booleans": array > 128,
        "grey with an axis": array[..., :1],
        "grey batch": np.stack([array[None, ..., 0]] * 2),
        "several kinds and sizes": [picture, array[:40], tensor[:, :45]],
        "nested": [[array, array[:40]], [tensor]],
    }


@pytest.mark.parametrize("backend", ["torchvision", "pil"])
@pytest.mark.parametrize(
    "call",
    [
        {},
        {"do_resize": False},
        {"do_rescale": False, "do_normalize": False},
        {"size": {"shortest_edge": 30, "longest_edge": 40}, "resample": 2},
        {"crop_size": {"height": 31, "width": 90}, "image_mean": 0.5, "image_std": 0.25},
    ],
    ids=str,
)
def test_odd_pictures_equal_the_stock_class_of_the_same_backend(backend: str, call: dict[str, Any]) -> None:
    told = {**RELEASED, "size": 48, "crop_size": 40}
    ours, theirs = BitImageProcessor(**told, backend=backend), stock_class(backend)(**told)
    found = {}
    for name, form in odd_pictures().items():
        pixels = [processor(form, return_tensors="pt", **call).pixel_values for processor in (ours, theirs)]
        found[name] = difference(*pixels)
    assert {name: value for name, value in found.items() if value > 1e-5} == {}


def test_a_batch_of_many_sizes_equals_stock_image_by_image() -> None:
    pictures = [Image.fromarray(smooth_picture(height, width)) for height, width in ((60, 80), (80, 60), (60, 80))]
    ours, theirs = BitImageProcessor(**RELEASED), transformers.BitImageProcessor(**RELEASED)
    padded = [
        processor(pictures, do_center_crop=False, do_pad=True, return_tensors="pt") for processor in (ours, theirs)
    ]
    assert difference(*(feature.pixel_values for feature in padded)) <= 1e-5
    listed = [processor(pictures, do_center_crop=False).pixel_values for processor in (ours, theirs)]
    assert [difference(a, b) <= 1e-5 for a, b in zip(*listed, strict=True)] == [True] * 3


def test_the_fast_name_is_the_same_class_where_the_classes_were_renamed() -> None:
    assert BitImageProcessorFast is BitImageProcessor
    assert BitImageProcessor().backend == "torchvision" and BitImageProcessorPil().backend == "pil"
