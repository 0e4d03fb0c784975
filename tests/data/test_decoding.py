import io
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2.data.decoding import count_frames, decode_rgb, decode_tensor, pil_with_channels, to_rgb, upright
from dinov2.errors import DataError, MissingDependency


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def gradient(width: int = 5, height: int = 3) -> np.ndarray:
    """uint8 [H, W, 3] without two equal pixels."""
    return np.arange(width * height * 3, dtype=np.uint8).reshape(height, width, 3) * 5


def pixels(data: bytes, **options: Any) -> np.ndarray:
    image = decode_rgb(data, **options)
    assert image.mode == "RGB"
    return np.asarray(image)


def test_rgb_comes_back_as_it_was() -> None:
    assert np.array_equal(pixels(encoded(Image.fromarray(gradient()))), gradient())


def test_grey_becomes_three_equal_channels() -> None:
    grey = gradient()[..., 0]
    assert np.array_equal(pixels(encoded(Image.fromarray(grey))), np.stack([grey] * 3, axis=-1))
    assert pixels(encoded(Image.fromarray(grey > 20)))[0, :, 0].tolist() == [0, 0, 255, 255, 255]


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_and_not_clipped(format: str) -> None:
    deep = np.array([[0, 128, 257, 1000, 32768, 65407, 65535]], dtype=np.uint16)
    shallow = pixels(encoded(Image.fromarray(deep), format))[0, :, 0]
    assert shallow.tolist() == [0, 0, 1, 4, 128, 255, 255] == np.rint(deep[0] / 257).tolist()


def test_floats_are_scaled_by_their_range() -> None:
    unit = np.array([[0.0, 0.5, 1.0, np.nan]], dtype=np.float32)
    assert pixels(encoded(Image.fromarray(unit), "TIFF"))[0, :, 0].tolist() == [0, 128, 255, 0]
    bytes_as_floats = np.array([[0.0, 100.0, 255.0]], dtype=np.float32)
    assert pixels(encoded(Image.fromarray(bytes_as_floats), "TIFF"))[0, :, 0].tolist() == [0, 100, 255]


def test_transparency_is_laid_over_white() -> None:
    rgba = np.array([[[200, 0, 0, 255], [200, 0, 0, 0], [200, 0, 0, 51]]], dtype=np.uint8)
    assert pixels(encoded(Image.fromarray(rgba))).tolist() == [[[200, 0, 0], [255, 255, 255], [244, 204, 204]]]
    grey_alpha = Image.fromarray(np.array([[[10, 255], [10, 0]]], dtype=np.uint8), mode="LA")
    assert pixels(encoded(grey_alpha))[0, :, 0].tolist() == [10, 255]


def test_transparency_of_a_tall_picture_is_laid_over_white_in_every_row() -> None:
    tall = np.full((600, 2, 4), 255, dtype=np.uint8)
    tall[..., :3], tall[:, 1, 3] = np.arange(600)[:, None, None] % 200, 0
    assert np.array_equal(pixels(encoded(Image.fromarray(tall)))[:, 0], tall[:, 0, :3])
    assert pixels(encoded(Image.fromarray(tall)))[:, 1].min() == 255


def test_palettes_keep_their_colours_and_their_transparency() -> None:
    picture = Image.new("P", (2, 1))
    picture.putpalette([255, 0, 0, 0, 0, 255])
    picture.putpixel((1, 0), 1)
    assert pixels(encoded(picture)).tolist() == [[[255, 0, 0], [0, 0, 255]]]
    for transparency in (1, b"\xff\x00"):
        assert pixels(encoded(picture, transparency=transparency)).tolist() == [[[255, 0, 0], [255, 255, 255]]]
    assert pixels(encoded(picture, "GIF")).tolist() == [[[255, 0, 0], [0, 0, 255]]]


def test_a_colour_declared_transparent_becomes_white() -> None:
    picture = Image.new("RGB", (1, 1), (1, 2, 3))
    assert pixels(encoded(picture, transparency=(1, 2, 3))).tolist() == [[[255, 255, 255]]]


@pytest.mark.parametrize("format", ["JPEG", "TIFF"])
def test_cmyk_becomes_rgb(format: str) -> None:
    data = encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), format)  # red, in ink
    red, green, blue = pixels(data)[4, 4].tolist()
    assert red > 230
    assert max(green, blue) < 40


ORIENTED = {
    1: [[1, 2, 3], [4, 5, 6]],
    2: [[3, 2, 1], [6, 5, 4]],
    3: [[6, 5, 4], [3, 2, 1]],
    4: [[4, 5, 6], [1, 2, 3]],
    5: [[1, 4], [2, 5], [3, 6]],
    6: [[4, 1], [5, 2], [6, 3]],
    7: [[6, 3], [5, 2], [4, 1]],
    8: [[3, 6], [2, 5], [1, 4]],
}


@pytest.mark.parametrize("orientation", ORIENTED)
def test_exif_orientation_is_applied_or_ignored_as_asked(orientation: int) -> None:
    stored = np.array([[1, 2, 3], [4, 5, 6]], dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(stored), exif=exif.tobytes())
    assert pixels(data)[..., 0].tolist() == stored.tolist()
    assert pixels(data, exif="apply")[..., 0].tolist() == ORIENTED[orientation]
    assert decode_tensor(data, 1, exif="apply")[0].tolist() == ORIENTED[orientation]


def test_a_broken_exif_block_does_not_cost_the_picture() -> None:
    data = encoded(Image.fromarray(gradient()), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff nonsense")
    assert pixels(data, exif="apply").shape == (3, 5, 3)


def test_a_jpeg_may_be_decoded_smaller_but_never_below_the_asked_side() -> None:
    photo = encoded(Image.new("RGB", (400, 300), (9, 99, 199)), "JPEG")
    assert decode_rgb(photo).size == (400, 300)
    assert decode_rgb(photo, min_side=75).size == (100, 75)
    assert decode_rgb(photo, min_side=76).size == (200, 150)
    assert decode_rgb(photo, min_side=1000).size == (400, 300)
    assert decode_rgb(encoded(Image.new("RGB", (400, 300))), min_side=75).size == (400, 300)


WHOLE = encoded(Image.fromarray(np.random.RandomState(0).randint(0, 255, (64, 64, 3), dtype=np.uint8)))
JPEG = encoded(Image.fromarray(np.random.RandomState(0).randint(0, 255, (64, 64, 3), dtype=np.uint8)), "JPEG")


@pytest.mark.parametrize("data", [b"", b"\0" * 100, b"hello", WHOLE[:-4000], JPEG[:-2000], WHOLE[:30], JPEG[:20]])
def test_unreadable_bytes_name_the_file_and_the_way_out(data: bytes) -> None:
    for decode in (decode_rgb, decode_tensor):
        with pytest.raises(DataError, match=r"photos/x\.png cannot be read as an image .* replace or delete"):
            decode(data, path="photos/x.png")  # type: ignore[operator]


def test_a_decompression_bomb_is_refused_before_it_is_unpacked() -> None:
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    whole = bytearray(encoded(Image.new("RGB", (1, 1))))
    whole[16:29] = header
    import zlib

    whole[29:33] = struct.pack(">I", zlib.crc32(b"IHDR" + header))
    with pytest.raises(DataError, match=r"bomb\.png is too large to be decoded safely"):
        decode_rgb(bytes(whole), path="bomb.png")


def test_a_tensor_holds_the_same_pixels_channels_first() -> None:
    data = encoded(Image.fromarray(gradient()))
    tensor = decode_tensor(data)
    assert tensor.dtype == torch.uint8
    assert tensor.is_contiguous()
    assert np.array_equal(tensor.numpy(), gradient().transpose(2, 0, 1))
    tensor += 1  # its own memory: nothing warns, nothing is shared


def test_one_channel_is_luminance_and_four_are_rgba() -> None:
    rgba = np.array([[[200, 100, 50, 255], [200, 100, 50, 0]]], dtype=np.uint8)
    data = encoded(Image.fromarray(rgba))
    assert np.array_equal(decode_tensor(data, 4).numpy(), rgba.transpose(2, 0, 1))
    assert decode_tensor(data, 1).tolist() == [[[124, 255]]]
    assert decode_tensor(encoded(Image.fromarray(rgba[..., :3])), 4)[3].tolist() == [[255, 255]]


def test_four_raw_bands_are_not_converted() -> None:
    ink = Image.new("CMYK", (2, 1), (1, 2, 3, 4))
    assert decode_tensor(encoded(ink, "TIFF"), 4)[:, 0, 0].tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("channels", [1, 2, 5, 13])
def test_arrays_give_any_number_of_channels_in_either_order(channels: int) -> None:
    array = np.random.RandomState(0).randint(0, 256, (channels, 6, 4), dtype=np.uint8)
    assert np.array_equal(decode_tensor(npy(array), channels).numpy(), array)
    assert np.array_equal(decode_tensor(npy(array.transpose(1, 2, 0)), channels).numpy(), array)


def test_arrays_of_sixteen_bits_and_of_grey_are_understood() -> None:
    deep = np.array([[0, 32768, 65535]], dtype=np.uint16)
    assert decode_tensor(npy(deep), 1).tolist() == [[[0, 128, 255]]]
    assert decode_tensor(npy(deep), 3).tolist() == [[[0, 128, 255]]] * 3
    assert decode_rgb(npy(deep)).getpixel((1, 0)) == (128, 128, 128)


@pytest.mark.parametrize(
    ("array", "channels", "message"),
    [
        (np.zeros((4, 4, 2), dtype=np.uint8), 3, r"shape \[4, 4, 2\], which is no image of 3 channels"),
        (np.zeros((4, 4), dtype=np.float64), 1, "float64 values; images are stored as uint8 or uint16"),
        (np.zeros((0, 4, 3), dtype=np.uint8), 3, r"shape \[0, 4, 3\]"),
    ],
)
def test_arrays_that_are_no_images_are_refused(array: np.ndarray, channels: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        decode_tensor(npy(array), channels, path="x.npy")


def test_a_pickled_array_is_never_loaded() -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.array([object()]), allow_pickle=True)
    with pytest.raises(DataError, match=r"evil\.npy cannot be read as a \.npy array"):
        decode_tensor(buffer.getvalue(), path="evil.npy")


def test_a_picture_has_no_seven_channels() -> None:
    data = encoded(Image.fromarray(gradient()))
    with pytest.raises(DataError, match="at most 4 channels, but 7 were asked for"):
        decode_tensor(data, 7)
    with pytest.raises(DataError, match="cannot have 0 channels"):
        decode_tensor(data, 0)


def test_many_channels_in_a_tiff_need_tifffile_and_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tifffile", None)  # as if it were not installed
    with pytest.raises(MissingDependency, match="pip install 'tifffile'"):
        decode_tensor(encoded(Image.fromarray(gradient()), "TIFF"), 6)


def test_tifffile_reads_many_channels(tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    array = np.random.RandomState(0).randint(0, 65536, (9, 8, 6), dtype=np.uint16)
    tifffile.imwrite(tmp_path / "x.tif", array, photometric="minisblack", planarconfig="contig")
    decoded = decode_tensor((tmp_path / "x.tif").read_bytes(), 6)
    assert np.array_equal(decoded.numpy(), np.rint(array / 257).astype(np.uint8).transpose(2, 0, 1))


def test_lab_becomes_rgb_and_premultiplied_grey_is_laid_over_white() -> None:
    lab = Image.merge("LAB", [Image.new("L", (2, 2), value) for value in (136, 208, 195)])  # red
    red, green, blue = pixels(encoded(lab, "TIFF"))[0, 0].tolist()
    assert red > 240 and green < 25 and blue < 30
    assert to_rgb(Image.new("LA", (1, 1), (255, 0)).convert("La")).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("format", "options"),
    [("GIF", {}), ("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {}), ("MPO", {})],
)
def test_frames_are_counted_and_the_first_one_is_the_picture(format: str, options: dict[str, Any]) -> None:
    frames = [Image.new("RGB", (16, 16), (120 * i, 0, 0)) for i in range(3)]
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert count_frames(data) == 3
    assert pixels(data)[8, 8, 0] == pytest.approx(0, abs=4)
    assert np.asarray(decode_rgb(data, frame=2))[8, 8, 0] == pytest.approx(240, abs=4)
    with pytest.raises(DataError, match=r"frame 9 of x\.gif cannot be read"):
        decode_rgb(data, path="x.gif", frame=9)


@pytest.mark.parametrize("orientation", ORIENTED)
@pytest.mark.parametrize(("format", "options"), [("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}), ("PNG", {})])
def test_a_picture_is_turned_once_whatever_the_way_in(orientation: int, format: str, options: dict[str, Any]) -> None:
    stored = np.array([[1, 2, 3], [4, 5, 6]], dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(stored), format, exif=exif.tobytes(), **options)
    assert pixels(data)[..., 0].tolist() == (ORIENTED[orientation] if format == "TIFF" else stored.tolist())
    by_path = decode_rgb(data, exif="apply")
    assert np.asarray(by_path)[..., 0].tolist() == ORIENTED[orientation]
    with Image.open(io.BytesIO(data)) as opened:
        assert np.array_equal(pil_with_channels(opened, 3), by_path)
        assert np.array_equal(upright(opened).convert("RGB"), by_path)
    for again in (pil_with_channels(by_path, 3), upright(by_path), upright(decode_rgb(data, exif="apply"))):
        assert np.array_equal(again, by_path)
    untouched = decode_rgb(data)  # a data set that ignores EXIF must not be turned further on
    assert np.array_equal(upright(untouched), untouched)


def test_a_pil_image_becomes_the_channels_of_the_model(tmp_path: Path) -> None:
    picture = Image.fromarray(gradient())
    assert pil_with_channels(picture, 1).mode == "L"
    assert pil_with_channels(picture, 4).mode == "RGBA"
    assert pil_with_channels(picture, 3) is not picture
    with pytest.raises(DataError, match="a PIL image has no 5 channels"):
        pil_with_channels(picture, 5)
    (tmp_path / "torn.png").write_bytes(WHOLE[:-4000])
    with Image.open(tmp_path / "torn.png") as torn, pytest.raises(DataError, match=r"torn\.png cannot be read"):
        pil_with_channels(torn, 3)
