"""Which values of deep pictures become black and white, by each rule, and what is said of it."""

import io
import logging
from typing import Any

import numpy as np
import pytest
from PIL import Image

import dinov2.logging
from dinov2.data.decoding import decode_rgb, decode_tensor
from dinov2.data.image_files import image_options, to_uint8
from dinov2.errors import DataError

RAMP = np.tile(np.linspace(0, 1, 64, dtype=np.float32), (4, 1))
FULL = np.rint(RAMP[0] * 255).astype(int)

# What people store, as a ramp from black to white.
RAMPS = {
    "float 0..1": RAMP,
    "float 0..255": RAMP * 255,
    "float 0..4095": RAMP * 4095,
    "float 0..4, as in HDR": RAMP * 4,
    "float -1..1": RAMP * 2 - 1,
    "float -1000..1000": RAMP * 2000 - 1000,
    "float of all magnitudes": (RAMP * 2 - 1).astype(np.float64) * 1.7e308,
    "float16": RAMP.astype(np.float16),
    "int8": (RAMP * 255 - 128).round().astype(np.int8),
    "int16, all": (RAMP * 65535 - 32768).astype(np.int16),
    "int16, from 0": (RAMP * 32767).astype(np.int16),
    "int32": (RAMP * 4e9 - 2e9).astype(np.int32),
    "uint16, 10 bits": (RAMP * 1023).astype(np.uint16),
    "uint16, 12 bits": (RAMP * 4095).astype(np.uint16),
    "uint16, 16 bits": (RAMP * 65535).astype(np.uint16),
    "uint16, other byte order": (RAMP * 65535).astype(">u2"),
    "uint32": (RAMP.astype(np.float64) * 4294967295).astype(np.uint32),
    "bool": RAMP > 0.5,
}


@pytest.fixture(autouse=True)
def nothing_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dinov2.logging, "_warned", set())


@pytest.mark.parametrize("kind", RAMPS)
def test_no_type_is_clipped_or_nearly_black(kind: str) -> None:
    shown = to_uint8(RAMPS[kind])[0].astype(int)
    assert shown.dtype != np.uint8 and (shown[0], shown[-1]) == (0, 255)
    if kind == "bool":
        assert set(shown) == {0, 255}
    else:
        assert abs(shown - FULL).max() <= 1


def test_every_value_of_sixteen_bits_is_rounded_as_before() -> None:
    deep = np.arange(65536, dtype=np.uint16)
    assert np.array_equal(to_uint8(deep), (deep.astype(np.uint32) + 128) // 257)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("auto", [0, 10, 50, 100]),
        ("bits", [0, 10, 50, 100]),
        ("min-max", [0, 26, 128, 255]),
        ("0:1000", [0, 3, 13, 26]),
        ("10:50", [0, 0, 255, 255]),
        ("-1e2:1E2", [128, 140, 191, 255]),
    ],
)
def test_each_rule_has_its_window(rule: str, expected: list[int]) -> None:
    assert to_uint8(np.array([0, 10, 50, 100], np.uint16), rule=rule).tolist() == expected


def test_a_percentile_is_not_moved_by_a_few_hot_pixels() -> None:
    dark = np.full(100_000, 100, np.uint16)
    dark[:50_000], dark[:10] = 50, 60_000
    assert set(to_uint8(dark, rule="percentile")) == {0, 255}
    assert to_uint8(dark, rule="percentile")[[20, -1]].tolist() == [0, 255]


def test_signed_values_use_the_bits_below_zero_too() -> None:
    assert to_uint8(np.array([-2048, 0, 2047], np.int16), rule="bits").tolist() == [0, 128, 255]


def test_nan_is_black_and_infinity_an_end_of_the_window() -> None:
    values = np.array([np.nan, -np.inf, 0, 500, 1000, np.inf], np.float32)
    assert to_uint8(values).tolist() == [0, 0, 0, 128, 255, 255]
    with pytest.raises(DataError, match="x.tiff holds no finite number"):
        to_uint8(np.full((2, 2), np.nan), name="x.tiff")


def test_a_constant_picture_is_black_unless_the_type_says_more() -> None:
    assert to_uint8(np.full(3, -7.5)).tolist() == [0, 0, 0]
    assert to_uint8(np.full(3, 1.0)).tolist() == [255] * 3
    assert to_uint8(np.zeros((0, 3), np.uint16)).shape == (0, 3)


@pytest.mark.parametrize("values", [np.zeros(2, complex), np.array(["a"]), np.array([None])])
def test_what_are_no_numbers_is_refused(values: np.ndarray) -> None:
    with pytest.raises(DataError, match="values, which are no pixels"):
        to_uint8(values)


def test_what_was_done_is_said_once_for_each_kind(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "dinov2")
    for kind in ("uint16, 16 bits", "float 0..1", "float 0..255", "bool"):
        to_uint8(RAMPS[kind])
    to_uint8(RAMPS["float -1..1"], rule="min-max")
    assert not caplog.records
    for _ in range(3):
        to_uint8(RAMPS["uint16, 12 bits"], name="ct.tiff")
        to_uint8(RAMPS["float -1000..1000"])
    assert len(caplog.records) == 2
    assert "ct.tiff holds uint16 values from 0 to 4095, of which 0 became black and 4095 white" in caplog.messages[0]
    assert "--intensity or DINOV2_INTENSITY" in caplog.messages[1]


def tiff(array: np.ndarray, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "TIFF", **options)
    return buffer.getvalue()


def row(data: bytes, **options: Any) -> np.ndarray:
    return np.asarray(decode_rgb(data, **options))[0].astype(int)


def test_the_rule_holds_for_files_of_any_type_and_is_an_option() -> None:
    data = tiff(RAMPS["uint16, 12 bits"])
    assert abs(row(data)[:, 0] - FULL).max() <= 1
    with image_options(intensity="0:65535"):
        assert row(data).max() == 16
        assert decode_tensor(data, 1).max() == 16


def test_white_is_zero_where_the_file_says_so() -> None:
    for kind in ("uint16, 16 bits", "float 0..1"):
        data = tiff(RAMPS[kind], tiffinfo={262: 0})
        assert row(data)[[0, -1], 0].tolist() == [255, 0]


def test_signed_bytes_and_unsigned_words_are_what_the_file_says() -> None:
    signed = tiff(RAMPS["int8"].view(np.uint8), tiffinfo={339: 2})
    assert abs(row(signed)[:, 0] - FULL).max() <= 1
    unsigned = tiff(RAMPS["uint32"].view(np.int32)).replace(b"\x53\x01\3\0\1\0\0\0\2", b"\x53\x01\3\0\1\0\0\0\1")
    assert abs(row(unsigned)[:, 0] - FULL).max() <= 1


@pytest.mark.parametrize("bands", [2, 3, 4])
def test_sixteen_bit_png_colours_of_twelve_bits_are_not_nearly_black(bands: int) -> None:
    values = np.stack([RAMPS["uint16, 12 bits"]] * bands, axis=-1)
    if bands != 3:
        values[..., -1] = 65535  # opaque
    data = png16(values)
    assert abs(row(data)[:, 0] - FULL).max() <= 16  # Pillow gives four of the twelve bits


def png16(values: np.ndarray) -> bytes:
    import struct
    import zlib

    height, width, bands = values.shape
    kind = {2: 4, 3: 2, 4: 6}[bands]
    rows = b"".join(b"\0" + line.astype(">u2").tobytes() for line in values)

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


# With tifffile.


def by_tifffile(array: np.ndarray, **options: Any) -> bytes:
    tifffile = pytest.importorskip("tifffile")
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, array, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", [kind for kind in RAMPS if kind != "bool"])
def test_tiffs_of_every_type_in_grey_and_colour(kind: str) -> None:
    grey = RAMPS[kind]
    assert abs(row(by_tifffile(grey))[:, 0] - FULL).max() <= 1
    colour = np.stack([grey, grey[:, ::-1], grey], axis=-1)
    for planar in ("contig", "separate"):
        stored = colour if planar == "contig" else colour.transpose(2, 0, 1)
        if kind == "int8":
            continue  # Pillow takes signed colours for unsigned ones
        data = by_tifffile(stored, photometric="rgb", planarconfig=planar)
        assert abs(row(data) - np.stack([FULL, FULL[::-1], FULL], axis=-1)).max() <= 1


def test_white_is_zero_and_orientation_and_alpha_with_tifffile() -> None:
    grey = RAMPS["uint16, 12 bits"]
    assert row(by_tifffile(grey, photometric="miniswhite"))[[0, -1], 0].tolist() == [255, 0]
    alpha = np.zeros_like(grey)
    see_through = np.stack([grey, grey, grey, alpha], axis=-1)
    data = by_tifffile(see_through, photometric="rgb", extrasamples=["unassalpha"])
    assert row(data).min() == 255
    turned = by_tifffile(np.stack([RAMP] * 3, axis=-1), photometric="rgb", extratags=[(274, 3, 1, 6, True)])
    assert decode_rgb(turned, exif="apply").size == (4, 64)


def test_float_colours_in_a_tiff_need_tifffile_and_are_not_to_be_deleted(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tiff(np.zeros((8, 8, 3), np.uint8))
    data = whole.replace(b"\x53\x01\x03\0", b"\x53\x01\x03\0", 1)  # the same
    entry = b"\x06\x01\x03\0\x01\0\0\0\x02\0"  # photometric: RGB, of which there is no kind 99
    assert entry in data
    monkeypatch.setattr("dinov2.data.decoding.find_spec", lambda name: None)
    with pytest.raises(DataError, match="if the file is whole, pip install tifffile") as refusal:
        decode_rgb(data.replace(entry, b"\x06\x01\x03\0\x01\0\0\0\x63\0"))
    assert "delete" not in str(refusal.value)
