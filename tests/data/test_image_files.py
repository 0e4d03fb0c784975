"""What may be opened as a picture, how much of it, and what is said of files that hold something else."""

import io
import os
import re
import socket
import struct
import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinov2.data.decoding import IMAGE_FORMATS, count_frames, decode_rgb, pil_with_channels
from dinov2.data.image_files import get_image_options, image_options, read_image
from dinov2.errors import ConfigError, DataError

PACKAGE = Path(__file__).resolve().parents[2] / "dinov2"
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


@pytest.fixture
def no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError(f"a picture started {arguments}")

    for module, name in ((subprocess, "Popen"), (os, "system"), (os, "posix_spawn"), (os, "execvp")):
        monkeypatch.setattr(module, name, refuse)


def test_pillow_opens_nothing_without_the_list_of_formats() -> None:
    calls = [
        f"{path.relative_to(PACKAGE)}: {line.strip()}"
        for path in PACKAGE.rglob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.search(r"\bImage\.open\(|\bload_image\(|import open\b", line) and '"' not in line
    ]
    assert calls == [
        "data/decoding.py: with _quiet(), Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:",
    ]


def test_the_formats_are_those_that_pillow_decodes_itself() -> None:
    assert sorted(IMAGE_FORMATS) == sorted("AVIF BMP DIB GIF ICO JPEG JPEG2000 PNG PPM TGA TIFF WEBP".split())


@pytest.mark.parametrize("preview", [b"", b"\xc5\xd0\xd3\xc6" + struct.pack("<6I", 30, 90, 0, 0, 0, 0) + b"\xff\xff"])
def test_postscript_is_refused_and_no_program_is_started(preview: bytes, tmp_path: Path, no_process: None) -> None:
    file = tmp_path / "photo.jpg"
    file.write_bytes(preview + POSTSCRIPT)
    for read in (decode_rgb, count_frames):
        with pytest.raises(DataError, match="cannot be read as an image .it is a PostScript file"):
            read(read_image(file), path=str(file))
    if not preview:
        with Image.open(file) as opened, pytest.raises(DataError, match="PostScript"):
            pil_with_channels(opened, 3)


@pytest.mark.parametrize("format", ["PCX", "PSD", "SGI", "ICNS", "FITS", "SPIDER"])
def test_formats_outside_of_the_list_are_not_opened(format: str) -> None:
    image = Image.new("L", (32, 32))
    marks = {"PSD": b"8BPS\0\1" + b"\0" * 99, "FITS": b"SIMPLE  =                    T" + b" " * 2850}
    data = marks.get(format) or encoded(image.convert("F" if format == "SPIDER" else "RGB"), format)
    with pytest.raises(DataError, match="cannot be read as an image"):
        decode_rgb(data)


def special_files(folder: Path) -> dict[str, Callable[[Path], object]]:
    def sock(path: Path) -> None:
        here = os.getcwd()
        os.chdir(folder)  # names of sockets are short
        try:
            socket.socket(socket.AF_UNIX).bind(path.name)
        finally:
            os.chdir(here)

    return {
        "a pipe": os.mkfifo,
        "socket": sock,
        "device": lambda path: path.symlink_to("/dev/zero"),
        "is a folder": os.mkdir,
        "cannot be read": lambda path: path.symlink_to(path),
        "was it moved": lambda path: path.symlink_to("nowhere"),
    }


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("kind", special_files(Path()))
def test_what_is_no_regular_file_is_refused_unopened(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    special_files(tmp_path)[kind](path)
    with pytest.raises(DataError, match=rf"x\.jpg.*{kind}|{kind}.*x\.jpg"):
        read_image(path)


def test_a_null_character_is_no_name() -> None:
    with pytest.raises(DataError, match="is no name of a file"):
        read_image("a\0.jpg")


def test_files_beyond_the_limit_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sparse = tmp_path / "sparse.jpg"
    with open(sparse, "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(DataError, match=r"sparse\.jpg has 1,099,511,627,776 bytes.*--max-image-bytes"):
        read_image(sparse)
    small = tmp_path / "small.jpg"
    small.write_bytes(b"0123456789")
    monkeypatch.setenv("DINOV2_MAX_IMAGE_BYTES", "9")
    with pytest.raises(DataError, match="has 10 bytes, and a picture may have 9"):
        read_image(small)
    with image_options(max_bytes=10):
        assert read_image(small) == b"0123456789"


def test_the_pixel_limit_can_be_raised_and_lowered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    data = encoded(Image.new("L", (20, 10)))
    with pytest.raises(DataError, match="too large to be decoded safely.*200 pixels.*DINOV2_MAX_IMAGE_PIXELS"):
        decode_rgb(data)
    with pytest.raises(DataError, match="9 x 9 pixels, and at most 50 are decoded"):
        decode_rgb(encoded(Image.new("L", (9, 9))))
    with image_options(max_pixels=200):
        assert decode_rgb(data).size == (20, 10)
    assert Image.MAX_IMAGE_PIXELS == 50
    with image_options(max_pixels=20), pytest.raises(DataError, match="9 x 9 pixels, and at most 20 are decoded"):
        decode_rgb(encoded(Image.new("L", (9, 9))))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # how programs lift Pillow's limit
    assert decode_rgb(data).size == (20, 10)


def test_options_hold_inside_their_block_and_wrong_ones_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with image_options(max_pixels=7, max_bytes=8, intensity="-1000:400"):
        assert vars(get_image_options()) == {"max_pixels": 7, "max_bytes": 8, "intensity": "-1000:400"}
    assert "DINOV2_INTENSITY" not in os.environ
    for wrong in ("grey", "5:5", "1:0", "1:", "nan:1", "0:inf", "١:٢", ""):
        if wrong:
            with pytest.raises(ConfigError, match="the intensity rule"), image_options(intensity=wrong):
                pass
    for number in ("0", "-1", "1e6", "٣", "9" * 5000):
        monkeypatch.setenv("DINOV2_MAX_IMAGE_PIXELS", number)
        with pytest.raises(ConfigError, match="DINOV2_MAX_IMAGE_PIXELS is .*; write a whole number from 1"):
            get_image_options()


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "it is empty"),
        (b"\0\0\0\x18ftypheic" + b"\0" * 20, "it is a HEIC picture.*pillow-heif"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic" + b"\0" * 20, "it is a HEIC picture"),
        (b"\0\0\0\x18ftypmp42" + b"\0" * 20, "it is a video.*take its frames out"),
        (b"\0\0\0\x14ftypqt  " + b"\0" * 20, "it is a video"),
        (b"RIFF\x10\0\0\0AVI LIST", "it is a video"),
        (b"\x1a\x45\xdf\xa3" + b"\0" * 20, "it is a video"),
        (b"<!DOCTYPE html><html></html>", "it is a text file such as SVG or HTML"),
        (b"%PDF-1.7", "it is a PDF file"),
        (b"ZISRAWFILE" + b"\0" * 90, "it is a CZI file"),
        (b"\0" * 128 + b"DICM", "it is a DICOM file"),
    ],
)
def test_healthy_files_of_other_kinds_are_named_and_never_to_be_deleted(data: bytes, sentence: str) -> None:
    with pytest.raises(DataError, match=rf"x\.jpg cannot be read as an image \({sentence}") as refusal:
        decode_rgb(data, path="x.jpg")
    assert ("delete" in str(refusal.value)) == (not data)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.mark.parametrize("kind", [b"zTXt", b"iCCP"])
def test_metadata_that_unpacks_to_a_bomb_is_refused(kind: bytes) -> None:
    whole = encoded(Image.new("RGB", (4, 4)))
    bomb = chunk(kind, b"note\0\0" + zlib.compress(b"\0" * (80 << 20), 9))
    with pytest.raises(DataError, match="save it again without its metadata"):
        decode_rgb(whole[:33] + bomb + whole[33:])


def test_a_picture_without_pixels_is_refused() -> None:
    header = struct.pack(">IIBBBBB", 0, 4, 8, 2, 0, 0, 0)
    whole = encoded(Image.new("RGB", (4, 4)))
    with pytest.raises(DataError, match="cannot be read as an image"):
        decode_rgb(whole[:8] + chunk(b"IHDR", header) + whole[33:])
    with pytest.raises(DataError, match="cannot be read as an image"):
        decode_rgb(b"P5 0 4 255\n")


def test_an_array_that_claims_more_than_its_file_holds_reserves_nothing() -> None:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "|u1", "fortran_order": False, "shape": (10**7, 10**7)})
    with pytest.raises(DataError, match=r"cannot be read as a \.npy array"):
        decode_rgb(buffer.getvalue() + b"\0" * 100)


def test_the_command_line_sets_the_options_for_what_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from dinov2.cli import main

    seen = []
    monkeypatch.setattr("dinov2.cli.classify._run", lambda arguments: seen.append(get_image_options()) or 0)
    options = ["--max-image-pixels", "300000000", "--max-image-bytes", "9", "--intensity=-1000:400"]
    assert main(["classify", "a.jpg", *options]) == 0
    assert vars(seen[0]) == {"max_pixels": 300_000_000, "max_bytes": 9, "intensity": "-1000:400"}
    assert get_image_options().intensity == "auto"
    assert main(["classify", "a.jpg", "--intensity", "grey"]) == 2
