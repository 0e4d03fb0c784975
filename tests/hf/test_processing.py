"""What an image processor accepts, what each setting does, and what it refuses."""

import base64
import http.server
import io
import json
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode

from dinov2.errors import ConfigError, DataError, DinoError
from dinov2.hf.processing import BitImageProcessor, BitImageProcessorPil
from dinov2.hf.processor_settings import BitSettings, Size, UnknownSetting, standard
from tests.hf.processing_cases import smooth_picture

PICTURE = smooth_picture(50, 61)
BACKENDS = pytest.mark.parametrize("backend", ["torchvision", "pil"])


def small(**settings: object) -> BitImageProcessor:
    return BitImageProcessor(**{"size": 32, "crop_size": 28, **settings})  # type: ignore[arg-type]


def pixels(images: object, processor: BitImageProcessor | None = None, **settings: object) -> torch.Tensor:
    return (processor or small())(images, return_tensors="pt", **settings).pixel_values  # type: ignore[arg-type]


@BACKENDS
def test_every_form_of_one_picture_gives_the_same_pixels(backend: str, tmp_path: Path) -> None:
    Image.fromarray(PICTURE).save(tmp_path / "picture.png")
    channels_first = np.ascontiguousarray(PICTURE.transpose(2, 0, 1))
    forms = [
        Image.fromarray(PICTURE),
        channels_first,
        torch.from_numpy(PICTURE),
        torch.from_numpy(channels_first),
        PICTURE[None],
        [PICTURE],
        (torch.from_numpy(channels_first)[None],),
        [[Image.fromarray(PICTURE)]],
        str(tmp_path / "picture.png"),
        tmp_path / "picture.png",
    ]
    processor = small(backend=backend)
    expected = pixels(PICTURE, processor)
    assert expected.shape == (1, 3, 28, 28) and expected.dtype == torch.float32
    for form in forms:
        assert torch.equal(pixels(form, processor), expected)


@BACKENDS
def test_grey_arrays_are_images(backend: str) -> None:
    grey = PICTURE[..., 0]
    expected = pixels(np.stack([grey] * 3, axis=-1), small(backend=backend))
    for form in (grey, grey[..., None], grey[None], torch.from_numpy(grey.copy()), Image.fromarray(grey)):
        assert torch.equal(pixels(form, small(backend=backend)), expected)


def test_a_grey_model_gets_one_channel() -> None:
    processor = small(do_convert_rgb=False, image_mean=0.5, image_std=0.25)
    assert pixels(Image.fromarray(PICTURE[..., 0]), processor).shape == (1, 1, 28, 28)
    assert pixels(PICTURE[..., :1], small(do_convert_rgb=False, image_mean=[0.5], image_std=[0.25])).shape[1] == 1


def test_a_photograph_held_sideways_is_turned_when_it_is_read_from_its_file(tmp_path: Path) -> None:
    orientation = Image.Exif()
    orientation[0x0112] = 6  # the camera was turned: the picture is to be turned by 90 degrees clockwise
    Image.fromarray(PICTURE).save(tmp_path / "sideways.png", exif=orientation)
    upright = np.ascontiguousarray(np.rot90(PICTURE, k=-1))
    assert torch.equal(pixels(tmp_path / "sideways.png"), pixels(upright))


def test_sixteen_bit_greys_keep_their_shades() -> None:
    deep = Image.fromarray((PICTURE[..., 0].astype(np.uint16) * 257).astype(np.uint16))
    assert deep.mode == "I;16"
    assert torch.equal(pixels(deep), pixels(PICTURE[..., 0]))


@BACKENDS
def test_transparency_becomes_white(backend: str) -> None:
    clear = np.zeros((40, 40, 4), np.uint8)
    told = {"do_normalize": False}
    for form in (Image.fromarray(clear), clear, clear.transpose(2, 0, 1).copy(), torch.from_numpy(clear)):
        assert pixels(form, small(backend=backend), **told).unique().tolist() == [1.0]
    fractions = np.full((40, 40, 4), 0.5, np.float32)
    result = pixels(fractions, small(backend=backend), do_rescale=False, **told)
    assert (result - 0.75).abs().max().item() <= 0.5 / 255


@BACKENDS
@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (20, (20, 30)),
        ({"shortest_edge": 20}, (20, 30)),
        ({"height": 17, "width": 23}, (17, 23)),
        ((17, 23), (17, 23)),
        ({"shortest_edge": 20, "longest_edge": 24}, (16, 24)),
        ({"max_height": 20, "max_width": 24}, (16, 24)),
    ],
)
def test_sizes_of_one_call(backend: str, size: object, expected: tuple[int, int]) -> None:
    result = pixels(np.zeros((40, 60, 3), np.uint8), small(backend=backend), size=size, do_center_crop=False)
    assert result.shape[-2:] == expected


def test_the_longer_side_is_rounded_down() -> None:
    assert pixels(np.zeros((300, 401, 3), np.uint8), size=256, do_center_crop=False).shape[-2:] == (256, 342)
    assert pixels(np.zeros((900, 100, 3), np.uint8), size=256, do_center_crop=False).shape[-2:] == (2304, 256)


def test_an_int_size_is_a_square_when_that_is_the_default() -> None:
    assert pixels(PICTURE, size=20, default_to_square=True, do_center_crop=False).shape[-2:] == (20, 20)
    assert BitImageProcessor(size=20, default_to_square=True).size == {"height": 20, "width": 20}


@BACKENDS
def test_the_crop_leaves_the_odd_pixel_at_the_bottom_and_right(backend: str) -> None:
    rows = np.arange(11, dtype=np.uint8)[:, None, None].repeat(9, 1).repeat(3, 2)
    told = {"do_resize": False, "do_rescale": False, "do_normalize": False, "crop_size": {"height": 4, "width": 4}}
    assert pixels(rows, small(backend=backend), **told)[0, 0, :, 0].tolist() == [3, 4, 5, 6]  # 7 too many: 3 and 4


@BACKENDS
def test_a_small_image_is_padded_with_black_before_normalisation(backend: str) -> None:
    white = np.full((10, 10, 3), 255, np.uint8)
    told = {"do_resize": False, "crop_size": 14, "image_mean": [0.485] * 3, "image_std": [0.229] * 3}
    result = pixels(white, small(backend=backend), **told)
    assert result[0, 0, 0, 0].item() == pytest.approx(-2.1179, abs=1e-4)
    assert (result[0, 0] > 0).sum().item() == 100


@BACKENDS
@pytest.mark.parametrize("name", ["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"])
def test_filters_go_by_name_number_and_enumeration(backend: str, name: str) -> None:
    processor = small(backend=backend)
    number = Image.Resampling[name.upper()]
    expected = pixels(PICTURE, processor, resample=int(number))
    for told in (name, name.upper(), number, InterpolationMode(name)):
        assert torch.equal(pixels(PICTURE, processor, resample=told), expected)
    if backend == "pil" or name in ("box", "hamming"):  # PIL computes these two for either backend
        by_hand = np.asarray(Image.fromarray(PICTURE).resize((39, 32), number))[2:30, 5:33]
        told = {"do_rescale": False, "do_normalize": False, "resample": name}
        assert np.array_equal(pixels(PICTURE, processor, **told)[0].permute(1, 2, 0).numpy(), by_hand)


def test_pil_resizes_fractions_as_it_does_bytes() -> None:
    unit = PICTURE.astype(np.float32) / 255
    processor = small(backend="pil")
    torch.testing.assert_close(pixels(unit, processor, do_rescale=False), pixels(PICTURE, processor))


def test_each_step_can_be_left_out_of_one_call() -> None:
    untouched = pixels(PICTURE, do_resize=False, do_center_crop=False, do_rescale=False, do_normalize=False)
    assert untouched.dtype == torch.uint8
    assert np.array_equal(untouched[0].permute(1, 2, 0).numpy(), PICTURE)
    shades = pixels(PICTURE, do_resize=False, do_center_crop=False, do_normalize=False)
    torch.testing.assert_close(shades, untouched / 255)


def test_settings_go_by_position_in_the_order_of_transformers_4() -> None:
    by_position = BitImageProcessor(True, 32, 2, True, 28, True, 1 / 255, True, [0.5] * 3, [0.25] * 3, True)
    by_name = small(resample="bilinear", image_mean=[0.5] * 3, image_std=[0.25] * 3)
    assert by_position.to_dict() == by_name.to_dict()
    called = small().preprocess(PICTURE, True, 32, 2, True, 28, True, 1 / 255, True, [0.5] * 3, [0.25] * 3, True, "pt")
    assert torch.equal(called["pixel_values"], pixels(PICTURE, by_name))


def test_none_is_the_processors_own_setting() -> None:
    nothing = dict.fromkeys(set(BitSettings.__annotations__) - {"return_tensors"})
    assert torch.equal(pixels(PICTURE, **nothing), pixels(PICTURE))


def test_attributes_can_be_changed_and_other_calls_keep_theirs() -> None:
    processor = small()
    before = pixels(PICTURE, processor)
    processor.crop_size = 14
    assert processor.crop_size == 14 and pixels(PICTURE, processor).shape[-2:] == (14, 14)
    processor.size["shortest_edge"] = 20
    assert pixels(PICTURE, processor, do_center_crop=False).shape[-2:] == (20, 24)
    assert torch.equal(pixels(PICTURE), before)


def test_a_subclass_sets_its_defaults_as_class_attributes() -> None:
    class Large(BitImageProcessor):
        size = 64
        crop_size = Size(height=56, width=56)

    assert pixels(PICTURE, Large()).shape[-2:] == (56, 56)
    assert Large().to_dict()["size"] == {"shortest_edge": 64}


def test_sizes_are_read_as_entries_and_as_attributes() -> None:
    size = BitImageProcessor().size
    assert (size["shortest_edge"], size.shortest_edge, size.height, "height" in size) == (224, 224, None, False)
    with pytest.raises(AttributeError, match="'hight'"):
        _ = size.hight


@BACKENDS
def test_results_are_lists_tensors_or_arrays(backend: str) -> None:
    processor = small(backend=backend)
    listed = processor([PICTURE, PICTURE])["pixel_values"]
    assert isinstance(listed, list) and isinstance(listed[0], torch.Tensor if backend == "torchvision" else np.ndarray)
    tensor = processor([PICTURE, PICTURE], return_tensors="pt").to(torch.float16)["pixel_values"]
    assert tensor.shape == (2, 3, 28, 28) and tensor.dtype == torch.float16
    array = processor([PICTURE, PICTURE], return_tensors="np", data_format="channels_last")["pixel_values"]
    assert isinstance(array, np.ndarray) and array.shape == (2, 28, 28, 3)
    assert np.array_equal(array[1], np.asarray(listed[1]).transpose(1, 2, 0))


def test_the_layout_of_an_ambiguous_array_can_be_told() -> None:
    ambiguous = np.arange(3 * 5 * 3, dtype=np.uint8).reshape(3, 5, 3)
    as_stored = {"do_resize": False, "do_center_crop": False, "do_rescale": False, "do_normalize": False}
    assert pixels(ambiguous, **as_stored).shape == (1, 3, 5, 3)
    assert pixels(ambiguous, **as_stored, input_data_format="channels_last").shape == (1, 3, 3, 5)


def test_resizing_alone_keeps_kind_and_layout() -> None:
    processor = small(backend="pil")
    array = processor.resize(PICTURE, {"height": 20, "width": 30})
    assert np.array_equal(array, np.asarray(Image.fromarray(PICTURE).resize((30, 20), Image.Resampling.BICUBIC)))
    tensor = processor.resize(torch.from_numpy(PICTURE).permute(2, 0, 1), 20, "box")
    assert isinstance(tensor, torch.Tensor) and tensor.shape == (3, 20, 24)
    nearest = processor.resize(PICTURE[..., 0], {"height": 100, "width": 122}, Image.Resampling.NEAREST)
    assert np.array_equal(nearest, PICTURE[..., 0].repeat(2, 0).repeat(2, 1))


def test_unknown_keywords_are_refused_with_the_nearest_name() -> None:
    with pytest.raises(UnknownSetting, match=r"^BitImageProcessor has no setting 'imagemean'; the nearest is 'image_m"):
        BitImageProcessor(imagemean=[0.5] * 3)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"^BitImageProcessorPil.preprocess has no setting 'do_centercrop'; the near"):
        BitImageProcessorPil()(PICTURE, do_centercrop=False)
    with pytest.raises(DinoError, match="got do_resize twice"):
        small().preprocess(PICTURE, True, do_resize=True)
    with pytest.raises(UnknownSetting, match="14 settings by position and got 15"):
        small().preprocess(PICTURE, *[None] * 15)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"size": {"longest_edge": 30}}, "size is .*; give a positive number of pixels, or"),
        ({"size": 0}, "size is 0;"),
        ({"size": True}, "size is True;"),
        ({"crop_size": {"shortest_edge": 3}}, 'crop_size is .*, or {"height": ..., "width": ...}$'),
        ({"resample": "bicubical"}, "resample is 'bicubical'; choose one of 'nearest', 'lanczos'"),
        ({"resample": 9}, "resample is 9; choose one of"),
        ({"image_mean": "grey"}, "image_mean is 'grey'; give one number"),
        ({"image_mean": [0.5, 0.5]}, "hold 2 values for an image of 3 channels"),
        ({"backend": "opencv"}, "no image backend is called 'opencv'; choose one of torchvision, pil"),
        ({"do_resize": 3}, "do_resize is 3; write True or False"),
        ({"data_format": "first"}, "data_format is 'first'; choose one of"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_values_that_a_setting_cannot_have_are_named(settings: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        pixels(PICTURE, **settings)


@pytest.mark.parametrize(
    ("images", "sentence"),
    [
        ([], "no images in an empty list"),
        (7, "a int is no image"),
        (None, "a NoneType is no image"),
        (np.zeros((2, 2, 3, 9, 9), np.uint8), r"a ndarray of shape \[2, 2, 3, 9, 9\] is no image"),
        (np.zeros((7, 9, 5), np.uint8), r"shape \[7, 9, 5\] has no axis of 1, 3 or 4 channels"),
        ("nowhere/at_all.png", "'nowhere/at_all.png' is neither an image file nor an address"),
        (np.zeros((0, 9, 9, 3), np.uint8), r"shape \[0, 9, 9, 3\] is empty"),
        (np.full((9, 9, 3), "red"), "an array of <U3 is no image"),
        (np.full((9, 9, 4), 3.0), "values from 3 to 3; they must be 0 to 1"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_is_no_image_is_refused_in_one_sentence(images: object, sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        pixels(images)


def test_pictures_come_from_addresses_and_from_base64_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(PICTURE).save(tmp_path / "picture.png")
    text = base64.b64encode((tmp_path / "picture.png").read_bytes()).decode()
    serve = partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    with http.server.HTTPServer(("127.0.0.1", 0), serve) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        addresses = [f"http://127.0.0.1:{server.server_port}/picture.png", text, f"data:image/png;base64,{text}"]
        for address in addresses:
            assert torch.equal(pixels(address), pixels(PICTURE))
        server.shutdown()


def test_arrays_that_cannot_be_written_to_and_tensors_with_gradients_are_taken() -> None:
    locked = PICTURE.copy()
    locked.setflags(write=False)
    assert torch.equal(pixels(locked), pixels(PICTURE))
    values = torch.from_numpy(PICTURE).permute(2, 0, 1).float().requires_grad_()
    pixels(values).sum().backward()
    assert values.grad is not None and values.grad.abs().sum() > 0
    exact = small(backend="pil")
    assert torch.equal(pixels(values, exact), pixels(PICTURE, exact))


def test_text_and_addresses_start_no_program_and_stay_in_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    postscript = base64.b64encode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n").decode()
    monkeypatch.setattr("subprocess.Popen", None)
    for text in (postscript, f"data:image/png;base64,{postscript}"):
        with pytest.raises(DataError, match="it is a PostScript file"):
            pixels(text)
    monkeypatch.setenv("DINOV2_MAX_IMAGE_BYTES", "10")
    monkeypatch.setattr("urllib.request.urlopen", lambda request, timeout: io.BytesIO(b"x" * 11))
    with pytest.raises(DataError, match="has more than 10 bytes"):
        pixels("http://example.org/a.png")


def test_floats_of_one_are_not_divided_once_more_in_silence() -> None:
    unit = (PICTURE / 255).astype(np.float32)
    with pytest.warns(UserWarning, match="is divided by 255 once more; give do_rescale=False"):
        pixels(unit)
    assert torch.allclose(pixels(unit, do_rescale=False), pixels(PICTURE), atol=0.05)
    pixels(PICTURE.astype(np.float32))


def test_a_strip_is_cropped_before_it_is_resized() -> None:
    strip = np.zeros((2, 200_000, 3), np.uint8)
    for backend in ("pil", "torchvision"):
        assert pixels(strip, small(backend=backend)).shape[-2:] == pixels(PICTURE, small(backend=backend)).shape[-2:]


def test_a_file_that_is_no_picture_is_named(tmp_path: Path) -> None:
    (tmp_path / "notes.png").write_text("no picture")
    with pytest.raises(DataError, match=r"notes\.png cannot be read as an image"):
        pixels(tmp_path / "notes.png")


def test_pil_refuses_values_that_it_cannot_hold() -> None:
    with pytest.raises(DataError, match="these are 0.5 to 254.5"):
        pixels(np.linspace(0.5, 254.5, 300).reshape(10, 10, 3), small(backend="pil"))


def test_images_of_several_sizes_are_no_tensor_and_the_sentence_says_what_to_do() -> None:
    pictures = [PICTURE, PICTURE[:, :40]]
    with pytest.raises(
        ConfigError, match=r"shapes \(3, 32, 39\), \(3, 40, 32\) are no one tensor; leave do_center_crop"
    ):
        pixels(pictures, do_center_crop=False)
    padded = pixels(pictures, do_center_crop=False, do_pad=True)
    assert padded.shape == (2, 3, 40, 39)
    assert padded[0, :, 32:].abs().max().item() == 0 and padded[1, :, :, 32:].abs().max().item() == 0
    with pytest.raises(ConfigError, match="up to 40x39 do not fit pad_size 38x38"):
        pixels(pictures, do_center_crop=False, do_pad=True, pad_size=38)


def test_one_form_of_a_setting_stays_as_it_is() -> None:
    once = standard({"size": 30, "crop_size": 20, "resample": "box", "image_mean": [1, 2, 3], "image_std": 2.0})
    assert standard(once) == once
    assert once["crop_size"] == {"height": 20, "width": 20} and once["image_std"] == 2.0


@pytest.mark.parametrize("processor_class", [BitImageProcessor, BitImageProcessorPil])
def test_a_step_that_is_none_in_the_constructor_or_in_a_file_stays_off(
    processor_class: type[BitImageProcessor], tmp_path: Path
) -> None:
    steps = dict.fromkeys(("do_resize", "do_center_crop", "do_rescale", "do_normalize"))
    array = np.full((50, 60, 3), 7, dtype=np.uint8)
    built = processor_class(**steps)  # type: ignore[typeddict-item]
    built.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "preprocessor_config.json").read_text())["do_resize"] is None
    for processor in (built, processor_class.from_dict(steps), processor_class.from_pretrained(tmp_path)):
        assert processor.do_resize is None
        assert processor(array, return_tensors="np")["pixel_values"].shape == (1, 3, 50, 60)
    by_position = processor_class(None)
    assert by_position(array, do_center_crop=False, return_tensors="np")["pixel_values"].shape == (1, 3, 50, 60)
    assert built(array, return_tensors="np")["pixel_values"].max() == 7
    # Other settings have their defaults, and a call's None stands for the processor's own.
    assert processor_class(size=None).size == {"shortest_edge": 224}
    assert processor_class()(array, do_resize=None, return_tensors="np")["pixel_values"].shape == (1, 3, 224, 224)
