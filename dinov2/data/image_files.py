"""Files that may hold pictures: what of them is read, the options of reading, and kinds that are not read here.

Files are hostile until they are decoded: only regular files are opened, up to a number of bytes.
"""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from PIL import Image

from dinov2.data.intensity import check_intensity
from dinov2.errors import ConfigError, DataError

__all__ = ["ImageOptions", "describe_other_kind", "get_image_options", "image_options", "read_image"]

_CONVERT = "convert it to JPEG or PNG"
# Where the mark stands, the mark, what such a file is, and how its content is got at.
_OTHER_KINDS = (
    *((8, brand, "it is a HEIC picture", f"{_CONVERT}, or open it with the package pillow-heif and give the PIL image")
      for brand in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")),
    (8, b"avif", "it is an AVIF picture", "update Pillow, which reads them from 11.3 on"),
    (8, b"crx ", "it is a raw photograph", _CONVERT),
    (4, b"ftyp", "it is a video", "take its frames out first, for example with ffmpeg"),
    (8, b"AVI ", "it is a video", "take its frames out first, for example with ffmpeg"),
    (0, b"\x1a\x45\xdf\xa3", "it is a video", "take its frames out first, for example with ffmpeg"),
    (0, b"%!PS", "it is a PostScript file", f"{_CONVERT} with a program that you trust"),
    (0, b"\xc5\xd0\xd3\xc6", "it is a PostScript file", f"{_CONVERT} with a program that you trust"),
    (0, b"%PDF", "it is a PDF file", f"{_CONVERT}, page by page"),
    (0, b"<", "it is a text file such as SVG or HTML", "draw it as PNG, or download the picture itself"),
    (0, b"8BPS", "it is a Photoshop file", _CONVERT),
    (0, b"ZISRAWFILE", "it is a CZI file of a microscope", "save its planes as TIFF"),
    (128, b"DICM", "it is a DICOM file", "save its pixels as TIFF or .npy"),
    (0, b"\x89HDF", "it is an HDF5 file", "save its pixels as TIFF or .npy"),
    (0, b"\x76\x2f\x31\x01", "it is an OpenEXR file", "save it as TIFF"),
    (0, b"\xff\x0a", "it is a JPEG XL file", _CONVERT),
    (4, b"JXL ", "it is a JPEG XL file", _CONVERT),
)  # fmt: skip


@dataclass(frozen=True)
class ImageOptions:
    """What may be read, and how values become 8 bits; see `image_options`."""

    max_pixels: int | None = None
    max_bytes: int = 512 << 20
    intensity: str = "auto"


def get_image_options() -> ImageOptions:
    """The options in force: `DINOV2_MAX_IMAGE_PIXELS`, `DINOV2_MAX_IMAGE_BYTES` and `DINOV2_INTENSITY`.

    Without the first, pictures may have `PIL.Image.MAX_IMAGE_PIXELS` pixels: as floats they take 1.2 GiB.
    Raises `ConfigError` for a value that is none.
    """
    pixels = _whole_number("DINOV2_MAX_IMAGE_PIXELS") or Image.MAX_IMAGE_PIXELS
    max_bytes = _whole_number("DINOV2_MAX_IMAGE_BYTES") or ImageOptions.max_bytes
    return ImageOptions(pixels, max_bytes, check_intensity(os.environ.get("DINOV2_INTENSITY") or "auto"))


@contextmanager
def image_options(
    *, max_pixels: int | None = None, max_bytes: int | None = None, intensity: str | None = None
) -> Iterator[None]:
    """Options for all pictures read inside the block, by this process and those that it starts.

    `max_pixels` and `max_bytes` limit one picture, `intensity` is a rule of `dinov2.data.intensity`; None leaves an
    option as it is. They are kept in the environment, because that is what workers of any kind inherit.

    Raises `ConfigError` for a value that cannot be used.
    """
    given = {"MAX_IMAGE_PIXELS": max_pixels, "MAX_IMAGE_BYTES": max_bytes, "INTENSITY": intensity}
    names = {f"DINOV2_{name}": str(value) for name, value in given.items() if value is not None}
    before = {name: os.environ.get(name) for name in names}
    pillows_limit = Image.MAX_IMAGE_PIXELS
    os.environ.update(names)
    try:
        get_image_options()
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = pillows_limit
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def read_image(path: str | os.PathLike[str]) -> bytes:
    """The content of an image file. Raises `DataError` for what is no regular file, too large, or cannot be read."""
    limit = get_image_options().max_bytes
    if "\0" in os.fspath(path):
        raise DataError(f"the image {os.fspath(path)!r} is no name of a file; check the path")
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            what = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe, a socket or a device"
            raise DataError(f"the image {os.fspath(path)} is {what} and no file; give the path of a file")
        if status.st_size <= limit:
            with open(path, "rb") as file:
                data = file.read(limit + 1)  # the file may grow
            if len(data) <= limit:
                return data
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(f"the image {os.fspath(path)} cannot be read ({reason}); was it moved or deleted?") from error
    raise DataError(
        f"the image {os.fspath(path)} has {max(status.st_size, limit + 1):,} bytes, and a picture may have {limit:,}; "
        "give --max-image-bytes or set DINOV2_MAX_IMAGE_BYTES to read it"
    )


def describe_other_kind(data: bytes) -> tuple[str, str] | None:
    """What a file is that holds no picture of a kind that is read here, and what to do; None where it is not known."""
    return next(
        ((kind, advice) for place, mark, kind, advice in _OTHER_KINDS if data[place : place + len(mark)] == mark), None
    )


def _whole_number(variable: str) -> int | None:
    text = os.environ.get(variable) or ""
    if text and not (text.isascii() and text.isdecimal() and 0 < len(text) < 19 and int(text)):
        raise ConfigError(f"the environment variable {variable} is {text!r}; write a whole number from 1")
    return int(text) if text else None
