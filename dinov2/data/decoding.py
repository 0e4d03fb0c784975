"""The one place that turns the bytes of a file into pixels.

Every kind of picture that people keep loads: grey, 16-bit (scaled, where Pillow's own conversion clips to white), CMYK,
palettes, transparency (laid over white, as a browser shows it), GIF (first frame), and `.npy` or multi-channel TIFF
for more channels than a picture has. Whatever goes wrong becomes a `DataError` that names the file.

EXIF orientation is the caller's choice: `"ignore"` is what the public release and the usual ImageNet loaders do,
`"apply"` is what a viewer does. Folders and lists apply it, ImageNet ignores it.
"""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from dinov2.errors import DataError, MissingDependency

__all__ = ["IMAGE_EXTENSIONS", "Exif", "decode_rgb", "decode_tensor", "to_rgb"]

Exif = Literal["ignore", "apply"]

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


def decode_rgb(data: bytes, *, path: str = "", exif: Exif = "ignore", min_side: int | None = None) -> Image.Image:
    """The picture in `data` as a PIL image of mode RGB.

    `path` only serves the error message. With `min_side`, a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size as long
    as no side gets shorter than `min_side` pixels: several times faster on photographs, and not bit-equal.

    Raises DataError when the bytes are no readable picture (unknown format, truncated, or so large that it looks like
    a decompression bomb).
    """
    if data[: len(_NPY_MAGIC)] == _NPY_MAGIC:
        return Image.fromarray(_npy_pixels(data, channels=3, path=path))
    return _decode(data, "RGB", path=path, exif=exif, min_side=min_side)


def decode_tensor(
    data: bytes, channels: int = 3, *, path: str = "", exif: Exif = "ignore", min_side: int | None = None
) -> Tensor:
    """The picture in `data` as a contiguous uint8 tensor `[C, H, W]` with `C = channels`.

    1 channel is luminance, 3 is RGB, 4 is RGBA (opaque where there is no alpha; the four raw bands of CMYK and of
    four-band TIFF). Any other number is for `.npy` files (`[H, W]`, `[H, W, C]` or `[C, H, W]`; uint8, or uint16
    scaled to 8 bits) and for TIFF, read with the optional package tifffile.

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


def to_rgb(image: Image.Image) -> Image.Image:
    """An opened picture of any mode as RGB, by the rules of `decode_rgb`; its EXIF orientation is left alone."""
    return _to_mode(image, "RGB")


def _decode(
    data: bytes, mode: Literal["L", "RGB", "RGBA"], *, path: str, exif: Exif, min_side: int | None
) -> Image.Image:
    # Pillow's plugins raise OSError, SyntaxError, ValueError, struct.error, zlib.error, ... depending on the format
    # and on the byte that is wrong, so every exception here means the same: this file cannot be read.
    try:
        with _quiet(), Image.open(io.BytesIO(data)) as image:
            if min_side is not None and image.format == "JPEG":
                image.draft(None, (min_side, min_side))
            turn = _UPRIGHT.get(_orientation(image)) if exif == "apply" else None
            image.load()
            converted = _to_mode(image, mode)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(
            f"{_named(path)} is too large to be decoded safely ({error}); "
            f"shrink it, or raise PIL.Image.MAX_IMAGE_PIXELS"
        ) from error
    except UnidentifiedImageError as error:  # its text is the address of our buffer
        raise DataError(
            f"{_named(path)} cannot be read as an image ({len(data)} bytes in no format that Pillow knows); "
            f"replace or delete the file"
        ) from error
    except Exception as error:
        raise DataError(
            f"{_named(path)} cannot be read as an image ({len(data)} bytes; {type(error).__name__}: {error}); "
            f"replace or delete the file"
        ) from error
    return converted if turn is None else converted.transpose(turn)


@contextmanager
def _quiet() -> Iterator[None]:
    """Pillow's warnings about odd metadata, one for each such file in each worker, are no news: the picture counts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def _to_mode(image: Image.Image, mode: Literal["L", "RGB", "RGBA"]) -> Image.Image:
    if image.mode[0] in "IF":
        image = Image.fromarray(_eight_bits(np.asarray(image)))
    if mode == "RGBA":
        if image.mode in ("CMYK", "RGBX"):  # four raw bands: not a colour to convert
            return Image.merge("RGBA", image.split())
        return image.convert("RGBA")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        see_through = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, see_through)
    if mode == "L" and image.mode not in ("L", "1"):
        image = image.convert("RGB")  # CMYK and palettes have no direct way to luminance
    return image.convert(mode) if image.mode != mode else image.copy()


def _eight_bits(values: np.ndarray) -> np.ndarray:
    """uint8 of deeper integers (the full 16-bit range becomes 0..255) and floats (0..1, or 0..255 if any is above)."""
    if values.dtype == np.uint8:
        return values
    if np.issubdtype(values.dtype, np.floating):
        finite = np.nan_to_num(values, nan=0.0)
        scaled = finite * 255.0 if finite.size and finite.max() <= 1.0 else finite
        return np.clip(np.rint(scaled), 0, 255).astype(np.uint8)
    wide = np.clip(values, 0, 65535).astype(np.uint32)
    return ((wide + 128) // 257).astype(np.uint8)  # 65535 = 255 * 257


def _orientation(image: Image.Image) -> int:
    # A broken EXIF block is common in old cameras' files and no reason to lose the picture.
    try:
        value = image.getexif().get(_EXIF_ORIENTATION, 1)
        return int(value)
    except Exception:
        return 1


def _npy_pixels(data: bytes, *, channels: int, path: str) -> np.ndarray:
    """uint8 `[H, W, channels]` of a saved array; never unpickles."""
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
    except Exception as error:
        raise DataError(f"{_named(path)} cannot be read as a .npy array ({error}); save it again as uint8") from error
    return _pixels_of_array(array, channels=channels, path=path)


def _pixels_of_array(array: np.ndarray, *, channels: int, path: str) -> np.ndarray:
    if array.dtype not in (np.uint8, np.uint16):
        raise DataError(f"{_named(path)} holds {array.dtype} values; images are stored as uint8 or uint16")
    array = array[..., None] if array.ndim == 2 else array
    if array.ndim == 3 and array.size:
        if array.shape[2] not in (channels, 1) and array.shape[0] in (channels, 1):
            array = array.transpose(1, 2, 0)
        if array.shape[2] == 1 and channels == 3:
            array = array.repeat(3, axis=2)
        if array.shape[2] == channels:
            return _eight_bits(np.ascontiguousarray(array))
    raise DataError(
        f"{_named(path)} has shape {list(array.shape)}, which is no image of {channels} channels; "
        f"expected [H, W, {channels}] or [{channels}, H, W]"
    )


def _tiff_pixels(data: bytes, *, channels: int, path: str, exif: Exif) -> np.ndarray:
    """uint8 `[H, W, channels]`: Pillow for the four bands it knows, tifffile for everything else."""
    if channels == 4:
        try:
            return np.asarray(_decode(data, "RGBA", path=path, exif=exif, min_side=None))
        except DataError:
            pass  # such as four bands of 16 bits, which Pillow refuses
    try:
        import tifffile
    except ImportError as error:
        raise MissingDependency("tifffile", f"reading {_named(path)} as a TIFF of {channels} channels") from error
    try:
        array = tifffile.imread(io.BytesIO(data))
    except Exception as error:
        raise DataError(f"{_named(path)} cannot be read as a TIFF ({error}); replace or delete the file") from error
    return _pixels_of_array(np.asarray(array), channels=channels, path=path)


def _named(path: str) -> str:
    return path or "an image given as bytes"
