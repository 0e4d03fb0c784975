"""The one place that turns the bytes of a file into pixels.

Read are grey and numbers of any type (`to_uint8`), CMYK, LAB, palettes, transparency (laid over white, as a browser
shows it), GIF (first frame), and `.npy` or multi-channel TIFF for more channels than a picture has. Every failure is a
`DataError` that names the file.

Files are hostile until they are decoded: only Pillow's decoders that work inside the process open them
(`IMAGE_FORMATS`; its others start programs), up to a number of pixels (`dinov2.data.image_files`).

EXIF orientation is the caller's choice: `"ignore"` is what the public release and the usual ImageNet loaders do,
`"apply"` is what a viewer does. Folders and lists apply it, ImageNet ignores it. TIFFs are always upright, because
Pillow turns them. The pictures returned carry no metadata, so that nothing turns them a second time.
"""

import io
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageCms, UnidentifiedImageError
from torch import Tensor

from dinov2.data.image_files import describe_other_kind, get_image_options, to_uint8
from dinov2.errors import ConfigError, DataError, MissingDependency
from dinov2.logging import warn_once

__all__ = [
    "IMAGE_EXTENSIONS",
    "IMAGE_FORMATS",
    "Exif",
    "count_frames",
    "decode_rgb",
    "decode_tensor",
    "pil_with_channels",
    "to_rgb",
    "upright",
]

Exif = Literal["ignore", "apply"]

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO", "TGA")
"""Pillow's decoders that read one stream of bytes, by themselves; no picture is opened by another."""

IMAGE_EXTENSIONS = frozenset(
    ".avif .bmp .gif .jfif .jp2 .jpe .jpeg .jpg .npy .pbm .pgm .png .pnm .ppm .tif .tiff .webp".split()
)

_NPY_MAGIC = b"\x93NUMPY"
_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# TIFF tags, of Pillow and tifffile alike.
_BITS, _PHOTOMETRIC, _PLANAR_CONFIGURATION, _SAMPLE_FORMAT = 258, 262, 284, 339
_MIN_IS_WHITE, _MIN_IS_BLACK, _RGB = 0, 1, 2
_SIGNED = _PLANAR = 2
_ALPHA = (1, 2)
_BAND = 256  # rows


def decode_rgb(
    data: bytes, *, path: str = "", exif: Exif = "ignore", min_side: int | None = None, frame: int = 0
) -> Image.Image:
    """The picture in `data` as a PIL image of mode RGB.

    `path` only serves the error message. With `min_side`, a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size as long
    as no side gets shorter than `min_side` pixels: several times faster on photographs, and not bit-equal. `frame`
    counts from 0 in files of several pictures.

    Raises DataError when the bytes are no readable picture (unknown format, truncated, or so large that it looks like
    a decompression bomb).
    """
    if data[: len(_NPY_MAGIC)] == _NPY_MAGIC:
        return Image.fromarray(_npy_pixels(data, channels=3, path=path))
    return _decode(data, "RGB", path=path, exif=exif, min_side=min_side, frame=frame)


def decode_tensor(
    data: bytes, channels: int = 3, *, path: str = "", exif: Exif = "ignore", min_side: int | None = None
) -> Tensor:
    """The picture in `data` as a contiguous uint8 tensor `[C, H, W]` with `C = channels`.

    1 channel is luminance, 3 is RGB, 4 is RGBA (opaque where there is no alpha; the four raw bands of CMYK and of
    four-band TIFF). Any other number is for `.npy` files (`[H, W]`, `[H, W, C]` or `[C, H, W]`; uint8 or uint16) and
    for TIFF, read with the optional package tifffile.

    Raises DataError like `decode_rgb`, and when the file does not hold that many channels.
    """
    if channels < 1:
        raise DataError(f"images cannot have {channels} channels; ask for 1 or more")
    if data[: len(_NPY_MAGIC)] == _NPY_MAGIC:
        pixels = _npy_pixels(data, channels=channels, path=path)
    elif channels in (1, 3):
        pixels = np.asarray(_decode(data, "L" if channels == 1 else "RGB", path=path, exif=exif, min_side=min_side))
    elif data[:4] in _TIFF_MAGIC:
        pixels = _tiff_pixels(data, channels=channels, path=path, exif=exif)
    elif channels == 4:
        pixels = np.asarray(_decode(data, "RGBA", path=path, exif=exif, min_side=min_side))
    else:
        raise DataError(
            f"{_named(path)} is a picture of at most 4 channels, but {channels} were asked for; keep such images as "
            f".npy or TIFF files, or set the number of input channels to 3"
        )
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels  # [H, W, C]
    return torch.from_numpy(np.array(pixels.transpose(2, 0, 1), order="C"))


def count_frames(data: bytes, *, path: str = "") -> int:
    """Number of pictures in a file, 1 for most. Raises DataError like `decode_rgb`."""
    with _reading(_named(path), data), _opened(data, _named(path)) as image:
        return int(getattr(image, "n_frames", 1))


def to_rgb(image: Image.Image) -> Image.Image:
    """An opened picture of any mode as RGB, by the rules of `decode_rgb`; its EXIF orientation is left alone."""
    return pil_with_channels(image, 3, exif="ignore")


def pil_with_channels(image: Image.Image, channels: int, *, exif: Exif = "apply") -> Image.Image:
    """An opened picture of any mode as one of 1 (luminance), 3 (RGB) or 4 channels (RGBA), without metadata.

    Raises DataError when its file turns out to be unreadable, and for another number of channels.
    """
    mode: Any = {1: "L", 3: "RGB", 4: "RGBA"}.get(channels)
    if mode is None:
        raise DataError(f"a PIL image has no {channels} channels; give an array [H, W, {channels}]")
    name = os.fsdecode(getattr(image, "filename", "") or f"a PIL image of mode {image.mode}")
    if image.format == "EPS":  # drawn by another program, which the picture controls
        kind, advice = describe_other_kind(b"%!PS") or ("", "")
        raise DataError(f"{name} is not read, because {kind}; {advice}")
    with _reading(name, None), _quiet():
        image.load()
        orientation = _orientation(image) if exif == "apply" else 1
        return upright(_to_mode(image, mode, name), orientation)


def upright(image: Image.Image, orientation: int | None = None) -> Image.Image:
    """The picture turned by its EXIF orientation, or by the given one; itself where nothing is to be turned."""
    turn = _UPRIGHT.get(_orientation(image) if orientation is None else orientation)
    if turn is None:
        return image
    turned = image.transpose(turn)
    turned.info = {}  # else the next reader would turn it again
    return turned


def _decode(
    data: bytes,
    mode: Literal["L", "RGB", "RGBA"],
    *,
    path: str,
    exif: Exif,
    min_side: int | None = None,
    frame: int = 0,
) -> Image.Image:
    name = f"frame {frame} of {path}" if frame else _named(path)
    with _reading(name, data):
        try:
            with _opened(data, name) as image:
                if frame:
                    image.seek(frame)
                if min_side is not None and image.format == "JPEG":
                    image.draft(None, (min_side, min_side))
                image.load()
                orientation = _orientation(image) if exif == "apply" else 1
                return upright(_to_mode(_deep_colour(data, image, frame, name) or image, mode, name), orientation)
        except Exception as error:
            bomb = isinstance(error, Image.DecompressionBombError | DataError)
            page = None if bomb or data[:4] not in _TIFF_MAGIC else _tiff_page(data, frame, name)
            if page is None:
                raise
            picture, orientation = page
            return upright(_to_mode(picture, mode, name), orientation)


@contextmanager
def _opened(data: bytes, name: str) -> Iterator[Image.Image]:
    """The only place where Pillow opens anything."""
    limit = get_image_options().max_pixels
    if Image.MAX_IMAGE_PIXELS is not None and limit is not None:
        Image.MAX_IMAGE_PIXELS = max(limit, Image.MAX_IMAGE_PIXELS)  # Pillow refuses more than twice that
    with _quiet(), Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
        _check_size(image.width, image.height, name)
        yield image


@contextmanager
def _quiet() -> Iterator[None]:
    """Pillow's warnings about odd metadata, one for each such file in each worker, are no news: the picture counts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit is checked here
        yield


@contextmanager
def _reading(name: str, data: bytes | None) -> Iterator[None]:
    """Every exception of a decoder as one sentence.

    Pillow's plugins raise OSError, SyntaxError, ValueError, struct.error, zlib.error, ... depending on the format and
    the byte that is wrong, so all of them mean the same: this file cannot be read.
    """
    try:
        yield
    except (DataError, ConfigError, MissingDependency):
        raise
    except Image.DecompressionBombError as error:
        raise _too_large(name, str(error).partition(" exceeds")[0]) from error
    except Exception as error:
        tiff_unread = data is not None and data[:4] in _TIFF_MAGIC and find_spec("tifffile") is None
        advice = "replace or delete the file"
        if data is None:
            reason, advice = f"{type(error).__name__}: {error}", "open it again"
        elif not data:
            reason = "it is empty"
        elif not isinstance(error, UnidentifiedImageError):
            reason = f"{len(data)} bytes; {type(error).__name__}: {error}"
        elif tiff_unread:
            reason = "a TIFF of a kind that Pillow does not read"
        else:  # the text of the error is the address of our buffer
            unknown = f"{len(data)} bytes in no format that is read here", advice
            reason, advice = describe_other_kind(data) or unknown
        if tiff_unread:
            advice = "if the file is whole, pip install tifffile, which reads more kinds, or save it as uint8 or uint16"
        elif "MAX_TEXT" in str(error):
            advice = "if you trust the file, save it again without its metadata"
        raise DataError(f"{name} cannot be read as an image ({reason}); {advice}") from error


def _check_size(width: int, height: int, name: str) -> None:
    limit = get_image_options().max_pixels
    if width < 1 or height < 1:
        raise DataError(f"{name} cannot be read as an image ({width} x {height} pixels); replace or delete the file")
    if limit is not None and width * height > limit:
        raise _too_large(name, f"{width} x {height} pixels, and at most {limit:,} are decoded")


def _too_large(name: str, size: str) -> DataError:
    return DataError(
        f"{name} is too large to be decoded safely ({size}); if you trust it, give --max-image-pixels or set "
        "DINOV2_MAX_IMAGE_PIXELS, else shrink it"
    )


def _to_mode(image: Image.Image, mode: Literal["L", "RGB", "RGBA"], name: str) -> Image.Image:
    """A new picture of the mode, without metadata."""
    tags = getattr(image, "tag_v2", {})
    if image.mode[0] in "IF" or (image.mode == "L" and tags.get(_SAMPLE_FORMAT) == (_SIGNED,)):
        image = _one_band(image, tags, name)
    elif image.mode == "LAB":
        to_srgb = ImageCms.buildTransform(ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB")
        image = ImageCms.applyTransform(image, to_srgb) or image
    elif image.mode == "La":
        image = image.convert("LA")
    if mode == "RGBA":
        if image.mode in ("CMYK", "RGBX"):  # four raw bands: not a colour to convert
            return Image.merge("RGBA", image.split())
    elif image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
        see_through, image = image, Image.new("RGB", image.size, "white")
        for top in range(0, image.height, _BAND):  # band by band, which takes a third of the memory
            box = (0, top, image.width, min(top + _BAND, image.height))
            band = see_through.crop(box).convert("RGBA")
            image.paste(band, box, band)
    if mode == "L" and image.mode not in ("L", "1"):
        image = image.convert("RGB")  # CMYK and palettes have no direct way to luminance
    converted = image.convert(mode) if image.mode != mode else image.copy()
    converted.info = {}
    return converted


def _one_band(image: Image.Image, tags: Any, name: str) -> Image.Image:
    values = np.asarray(image)
    # Pillow holds these in the nearest type that it has.
    if image.mode == "L":
        values = values.view(np.int8)
    elif image.mode == "I" and tags.get(_BITS) == (32,) and tags.get(_SAMPLE_FORMAT, (1,)) == (1,):
        values = values.view(np.uint32)
    return _picture(values, None, name, invert=tags.get(_PHOTOMETRIC) == _MIN_IS_WHITE)


def _picture(values: np.ndarray, alpha: np.ndarray | None, name: str, *, invert: bool = False) -> Image.Image:
    """Values `[H, W]` or `[H, W, 3]` and opacity `[H, W]` of any number type as a picture."""
    shown = to_uint8(values, rule=get_image_options().intensity, name=name)
    picture = Image.fromarray(255 - shown if invert else shown)
    if alpha is not None:
        opaque = np.iinfo(alpha.dtype).max if alpha.dtype.kind in "iu" else 1
        picture = picture.convert("RGB")
        picture.putalpha(Image.fromarray(to_uint8(alpha, rule=f"0:{opaque}", name=name)))
    return picture


def _deep_colour(data: bytes, image: Image.Image, frame: int, name: str) -> Image.Image | None:
    """Colours of 16 bits by the intensity rule; None where their high byte, which is what Pillow takes, is the same."""
    png = image.format == "PNG" and data[24] == 16 and data[25] in (2, 4, 6) and "transparency" not in image.info
    tags = getattr(image, "tag_v2", {})
    tiff = image.mode in ("RGB", "RGBA") and max(tags.get(_BITS, (8,))) > 8
    if not (png or tiff):
        return None
    planar = tags.get(_PLANAR_CONFIGURATION) == _PLANAR  # of which Pillow mixes up the bytes
    brightest = np.asarray(image)[..., :3].max()
    if get_image_options().intensity == "auto" and brightest >= 64 and not planar:  # more than 14 bits
        return None
    page = _tiff_page(data, frame, name) if tiff else None
    if page is not None:
        return page[0]
    if planar:
        raise DataError(f"{name} holds planes of 16 bits, which Pillow does not read; pip install tifffile")
    advice = (
        "pip install tifffile to read all of them" if tiff else "save it as TIFF, or as .npy of uint16, to keep all"
    )
    warn_once(f"16 bits {image.format}", f"{name} is dark, and read with 8 of its 16 bits a colour; {advice}")
    bands = np.asarray(image)
    return _picture(bands[..., :3] * np.uint16(257), bands[..., 3] if bands.shape[2] == 4 else None, name)


def _tiff_page(data: bytes, frame: int, name: str) -> tuple[Image.Image, int] | None:
    """A grey or RGB page of a TIFF by tifffile, and its orientation; None where that is missing or cannot read it."""
    if find_spec("tifffile") is None:
        return None
    import tifffile

    try:
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            page = file.pages[frame]
            _check_size(page.imagewidth, page.imagelength, name)
            values = page.asarray()
            if values.ndim == 3 and int(page.planarconfig) == _PLANAR:
                values = np.moveaxis(values, 0, -1)
            photometric, extra = int(page.photometric), [int(kind) for kind in page.extrasamples]
            orientation = page.tags.valueof(_EXIF_ORIENTATION, default=1)
    except DataError:
        raise
    except Exception:
        return None
    count = {_MIN_IS_WHITE: 1, _MIN_IS_BLACK: 1, _RGB: 3}.get(photometric)
    bands = values[..., None] if values.ndim == 2 else values
    if count is None or bands.ndim != 3 or bands.shape[2] < count:
        return None
    alpha = bands[..., count] if extra and extra[0] in _ALPHA and bands.shape[2] > count else None
    colours = bands[..., 0] if count == 1 else np.ascontiguousarray(bands[..., :count])
    return _picture(colours, alpha, name, invert=photometric == _MIN_IS_WHITE), int(orientation)


def _orientation(image: Image.Image) -> int:
    # A broken EXIF block is common in old cameras' files and no reason to lose the picture.
    try:
        image.load()  # Pillow turns TIFFs itself when it loads them, and leaves no orientation
        value = image.getexif().get(_EXIF_ORIENTATION, 1)
        return int(value)
    except Exception:
        return 1


def _npy_pixels(data: bytes, *, channels: int, path: str) -> np.ndarray:
    """uint8 `[H, W, channels]` of a saved array; never unpickles, and reserves no more than the file holds."""
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, by_columns, dtype = read_header[version](stream)
        if dtype.hasobject:
            raise ValueError("it holds Python objects")
        array = np.frombuffer(data, dtype, count=math.prod(shape), offset=stream.tell())
        array = array.reshape(shape, order="F" if by_columns else "C")
    except Exception as error:
        raise DataError(f"{_named(path)} cannot be read as a .npy array ({error}); save it again as uint8") from error
    if array.dtype not in (np.uint8, np.uint16):
        raise DataError(f"{_named(path)} holds {array.dtype} values; images are stored as uint8 or uint16")
    return _pixels_of_array(array, channels=channels, path=path)


def _pixels_of_array(array: np.ndarray, *, channels: int, path: str) -> np.ndarray:
    array = array[..., None] if array.ndim == 2 else array
    if array.ndim == 3 and array.size:
        if array.shape[2] not in (channels, 1) and array.shape[0] in (channels, 1):
            array = array.transpose(1, 2, 0)
        if array.shape[2] == channels or (array.shape[2] == 1 and channels == 3):
            _check_size(array.shape[1], array.shape[0], _named(path))
            values = to_uint8(np.ascontiguousarray(array), rule=get_image_options().intensity, name=_named(path))
            return values.repeat(3, axis=2) if values.shape[2] != channels else values
    raise DataError(
        f"{_named(path)} has shape {list(array.shape)}, which is no image of {channels} channels; "
        f"expected [H, W, {channels}] or [{channels}, H, W]"
    )


def _tiff_pixels(data: bytes, *, channels: int, path: str, exif: Exif) -> np.ndarray:
    """uint8 `[H, W, channels]`: Pillow for the four bands it knows, tifffile for everything else."""
    if channels == 4:
        try:
            return np.asarray(_decode(data, "RGBA", path=path, exif=exif))
        except DataError:
            pass  # such as four bands of 16 bits, which Pillow refuses
    try:
        import tifffile
    except ImportError as error:
        raise MissingDependency("tifffile", f"reading {_named(path)} as a TIFF of {channels} channels") from error
    with _reading(_named(path), data), tifffile.TiffFile(io.BytesIO(data)) as file:
        series = file.series[0]
        _check_size(-(-series.size // channels), 1, _named(path))  # before it is reserved
        array = np.asarray(series.asarray())
    return _pixels_of_array(array, channels=channels, path=path)


def _named(path: str) -> str:
    return path or "an image given as bytes"
