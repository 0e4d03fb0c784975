"""Pictures that are wrong: damaged, hostile, of another kind, of odd sizes, sample types and names.

`bad_pictures` gives as many as are asked for, always the same ones: the kinds below in turn, each with random numbers
of its own. Many may be read; what cannot be is left out with its reason, or refused.
"""

import io
import os
import random
import socket
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

__all__ = ["bad_pictures"]

_FORMATS = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "GIF": ".gif", "BMP": ".bmp", "TIFF": ".tif", "PPM": ".ppm"}
_FORMATS |= {"JPEG2000": ".jp2", "AVIF": ".avif"}
_NAMES = [
    b"\xe9.png",
    b"a\nb.png",
    b"\x1b[31m.png",
    b"-o.png",
    b"[x].png",
    b"*?.png",
    b"%s%n{0}.png",
    b"x" * 251 + b".png",
]
_NAMES += [
    "\u202ecod.png".encode(),
    "🦕.png".encode(),
    b"'\";$(x)`.png",
    b"<script>alert(1)</script>.png".replace(b"/", b""),
    b" .png",
    b"~.png",
]
_NAMES += [
    b"a\x00b.png".replace(b"\x00", b"\x7f"),
    b"\xff\xfe\xfd.png",
    b"list:x.png",
    b"toy:split=TRAIN.png",
    b"a,b.png",
    b"\xf0\x9f.png",
]


class _Maker(NamedTuple):
    rng: random.Random
    folder: Path

    def written(self, content: bytes, name: str | bytes = "bad.jpg") -> Path:
        path = Path(os.fsdecode(os.path.join(os.fsencode(self.folder), os.fsencode(name))))
        path.write_bytes(content)
        return path

    def named(self) -> str:
        return f"bad{self.rng.choice(sorted(_FORMATS.values()))}"


_KINDS: dict[str, Callable[[_Maker], Path]] = {}


def _kind(make: Callable[[_Maker], Path]) -> Callable[[_Maker], Path]:
    _KINDS[make.__name__] = make
    return make


def bad_pictures(folder: Path, count: int) -> Iterator[tuple[str, Callable[[], Path]]]:
    """Names, and functions that write the picture of that name into `folder/NAME` and return its path."""
    kinds = list(_KINDS)
    for number in range(count):
        name = f"{kinds[number % len(kinds)]}-{number // len(kinds)}"

        def write(name: str = name, kind: str = kinds[number % len(kinds)]) -> Path:
            place = folder / name
            place.mkdir(parents=True)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return _KINDS[kind](_Maker(random.Random(name), place))

        yield name, write


# Other content


@_kind
def postscript(make: _Maker) -> Path:
    """A program for Ghostscript, which Pillow would start: one that writes a file, or that never ends."""
    program = make.rng.choice(["(out/made_by_a_picture) (w) file closefile", "{ } loop", "quit", "1 0 div"])
    text = f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n{program}\nshowpage\n%%EOF\n"
    content = text.encode()
    if make.rng.random() < 0.3:  # as DOS writes it, with a preview
        content = struct.pack("<7I", 0xC6D3D0C5, 32, len(content), 0, 0, 0, 0) + bytes(4) + content
    return make.written(content, make.named())


@_kind
def other_content(make: _Maker) -> Path:
    fli = struct.pack("<IHHHHHHI", 128, 0xAF11, 1, 8, 8, 8, 3, 5) + bytes(108)
    wmf = b"\xd7\xcd\xc6\x9a\0\0" + struct.pack("<4hH", 0, 0, 100, 100, 72) + bytes(6) + b"\x01\0\x09\0" + bytes(40)
    emf = b"\x01\0\0\0" + struct.pack("<I8i", 88, 0, 0, 99, 99, 0, 0, 99, 99) + b" EMF" + bytes(60)
    contents = [
        b"", b"\0", b"hello\n", b"%PDF-1.4\n1 0 obj<</Type/Catalog>>endobj\n%%EOF",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"<!DOCTYPE html><html>404</html>", fli, wmf, emf, b"8BPS\0\1" + bytes(20), b"gimp xcf file\0" + bytes(90),
        b"\0\0\0\x20ftypisom" + bytes(90), b"\0\0\0\x18ftypheic" + bytes(90), b"PK\3\4" + bytes(90),
        b"\x1f\x8b\x08" + bytes(90),
        b"PIXAR" + bytes(500), b"SIMPLE  =                    T" + b" " * 2850, b"GRIB" + bytes(90),
        b"BUFR" + bytes(90),
        b"\x89HDF\r\n\x1a\n" + bytes(90),
        b"#define x_width 10\n#define x_height 10\nstatic char x_bits[] = {\n0x00 };\n",
        b"\x8aMNG\r\n\x1a\n", b"%!PS\n", b"DDS " + bytes(124), b"\x59\xa6\x6a\x95" + bytes(60), b"MIXED" * 900,
        b"\xff\xd8\xff",
        b"\x01\xda\x01\x01" + bytes(508), b"QDATA", b"IM\x20" * 200, b"\0\0\1\0\1\0" + bytes(16), b"P7\n332",
        b"/* XPM */\n",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", b"\x80\x02cos\nsystem\n(S'touch x'\ntR.",
    ]  # fmt: skip
    return make.written(make.rng.choice(contents), make.named())


@_kind
def only_a_start(make: _Maker) -> Path:
    format, suffix = make.rng.choice(sorted(_FORMATS.items()))
    return make.written(_encoded(format)[: make.rng.choice([2, 4, 8, 12, 16, 30])], f"bad{suffix}")


@_kind
def no_regular_file(make: _Maker) -> Path:
    path = make.folder / make.rng.choice(["bad.jpg", "bad.png", "bad.gif", "bad.npy", "bad.tif"])
    what = make.rng.randrange(8)
    if what < 2:
        os.mkfifo(path)
    elif what == 2:
        here = os.getcwd()
        with socket.socket(socket.AF_UNIX) as listener:
            try:  # the name of a socket is short
                os.chdir(make.folder)
                listener.bind(path.name)
            finally:
                os.chdir(here)
    elif what == 3:
        path.mkdir()
    else:
        path.symlink_to([path.name, "nowhere", "/dev/zero", "/dev/random"][what - 4])
    return path


@_kind
def sparse(make: _Maker) -> Path:
    """A terabyte that takes no place on the disk."""
    format, suffix = make.rng.choice([*sorted(_FORMATS.items()), ("", ".npy"), ("", ".jpg")])
    path = make.written(_encoded(format) if format else _npy_header((10**6, 10**6), "|u1"), f"bad{suffix}")
    os.truncate(path, make.rng.choice([1 << 40, 5 << 30]))
    return path


# Sizes


@_kind
def strip(make: _Maker) -> Path:
    size = make.rng.choice([(1, 20_000), (20_000, 1), (1, 3000), (3000, 1), (65_500, 2), (2, 65_500), (1, 1), (5, 1)])
    format, suffix = make.rng.choice([("PNG", ".png"), ("JPEG", ".jpg"), ("BMP", ".bmp"), ("TIFF", ".tif")])
    return make.written(_encoded(format, size=size), f"bad{suffix}")


@_kind
def bomb(make: _Maker) -> Path:
    """A few bytes that claim, or unpack to, a picture that no memory holds."""
    side = make.rng.choice([13_000, 30_000, 100_000, 2**31 - 1])
    small = min(side, 65_535)
    zeros = zlib.compress(bytes(1 << 22))
    made: list[tuple[Callable[[], bytes], str]] = [
        (lambda: _png(side, side, zeros), ".png"),
        (lambda: _png(side, 1, zeros), ".png"),
        (lambda: _patched(_encoded("GIF"), 6, struct.pack("<HH", small, small)), ".gif"),
        (lambda: _patched(_encoded("BMP"), 18, struct.pack("<ii", side, side)), ".bmp"),
        (lambda: _jpeg_of_size(small, small), ".jpg"),
        (lambda: f"P6 {side} {side} 255\n".encode() + bytes(99), ".ppm"),
        (lambda: f"P3 {side} 1 255\n".encode() + b"0 " * 1_000_000, ".ppm"),
        (lambda: _npy_header((side, side, 3), "|u1") + bytes(99), ".npy"),
        (lambda: _npy_header((10**12,), "|u1"), ".npy"),
        (lambda: _tiff({256: side, 257: side, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: side, 279: 64}), ".tif"),
        (lambda: _tiff({256: 64, 257: 64, 258: 8, 259: 1, 262: 1, 322: 2**31, 323: 2**31, 324: 8, 325: 64}), ".tif"),
        (lambda: _jp2_of_size(side), ".jp2"),
        (lambda: _encoded("PNG", size=(9000, 9000), mode="1"), ".png"),
        (lambda: _encoded("TIFF", size=(9000, 9000), mode="1", compression="group4"), ".tif"),
    ]
    make_content, suffix = make.rng.choice(made)
    return make.written(make_content(), f"bad{suffix}")


@_kind
def hidden_bomb(make: _Maker) -> Path:
    """Metadata that unpacks to far more than the picture."""
    packed = zlib.compress(bytes(80 << 20), 1)
    chunk = make.rng.choice([b"zTXt", b"iTXt", b"iCCP"])
    heads = {b"zTXt": b"a\0\0", b"iTXt": b"a\0\1\0\0\0", b"iCCP": b"a\0\0"}
    return make.written(_png(8, 8, zlib.compress(bytes(200)), (chunk, heads[chunk] + packed)), "bad.png")


@_kind
def no_size(make: _Maker) -> Path:
    made = [
        (_png(0, 8, zlib.compress(b"")), ".png"),
        (_png(8, 0, zlib.compress(b"")), ".png"),
        (_patched(_encoded("GIF"), 6, struct.pack("<HH", 0, 0)), ".gif"),
        (_patched(_encoded("BMP"), 18, struct.pack("<ii", 0, 8)), ".bmp"),
        (_patched(_encoded("BMP"), 18, struct.pack("<ii", -8, -8)), ".bmp"),
        (b"P6 0 0 255\n", ".ppm"), (b"P6 -1 8 255\n", ".ppm"), (b"P5 8 8 0\n" + bytes(64), ".ppm"),
        (b"P6 8 8 99999999\n", ".ppm"),
        (b"P5 8 8 70000\n" + bytes(256), ".pgm"), (b"P6\n#" + b"x" * 100_000, ".ppm"),
        (b"Pf 8 8 -1.0\n" + bytes(256), ".ppm"),
        (_jpeg_of_size(0, 8), ".jpg"), (_npy_header((0, 0, 3), "|u1"), ".npy"), (_npy_header((), "|u1") + b"x", ".npy"),
        (_tiff({256: 0, 257: 0, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: 1, 279: 0}), ".tif"),
    ]  # fmt: skip
    content, suffix = make.rng.choice(made)
    return make.written(content, f"bad{suffix}")


# Damage


@_kind
def truncated(make: _Maker) -> Path:
    format, suffix = make.rng.choice(sorted(_FORMATS.items()))
    content = _encoded(format, size=(64, 48))
    return make.written(content[: make.rng.randrange(1, len(content))], f"bad{suffix}")


@_kind
def flipped_bits(make: _Maker) -> Path:
    format, suffix = make.rng.choice(sorted(_FORMATS.items()))
    content = bytearray(_encoded(format, size=(64, 48)))
    area = len(content) if make.rng.random() < 0.5 else min(len(content), 200)
    for _ in range(make.rng.choice([1, 5, 50])):
        content[make.rng.randrange(area)] ^= 1 << make.rng.randrange(8)
    return make.written(bytes(content), f"bad{suffix}")


@_kind
def blanked(make: _Maker) -> Path:
    format, suffix = make.rng.choice(sorted(_FORMATS.items()))
    content = bytearray(_encoded(format, size=(64, 48)))
    start = make.rng.randrange(len(content))
    content[start : start + 64] = make.rng.choice([bytes, make.rng.randbytes])(len(content[start : start + 64]))
    return make.written(bytes(content), f"bad{suffix}")


@_kind
def wrong_suffix(make: _Maker) -> Path:
    return make.written(
        _encoded(make.rng.choice(sorted(_FORMATS))), f"bad{make.rng.choice([*_FORMATS.values(), '.npy'])}"
    )


@_kind
def chunks(make: _Maker) -> Path:
    """PNG chunks that are wrong, each with a right checksum."""
    values = [b"", b"\0", b"\xff" * 1000, bytes(13), make.rng.randbytes(40)]
    names = [
        b"PLTE",
        b"tRNS",
        b"gAMA",
        b"cHRM",
        b"eXIf",
        b"acTL",
        b"fcTL",
        b"fdAT",
        b"IHDR",
        b"IEND",
        b"iCCP",
        b"pHYs",
        b"tEXt",
    ]
    extra = (make.rng.choice(names), make.rng.choice(values))
    kind, depth = make.rng.choice([(2, 8), (3, 8), (0, 16), (6, 8), (4, 1), (9, 9), (3, 16)])
    return make.written(_png(8, 8, zlib.compress(bytes(600)), extra, kind=kind, depth=depth), "bad.png")


@_kind
def tiff_tags(make: _Maker) -> Path:
    tags = {256: 8, 257: 8, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: 8, 279: 64}
    for key in make.rng.sample(sorted(tags), make.rng.choice([1, 2])):
        tags[key] = make.rng.choice([0, 2, 3, 5, 7, 9, 12, 32, 65_535, 2**31, 2**32 - 1])
    if make.rng.random() < 0.3:
        del tags[make.rng.choice(sorted(tags))]
    return make.written(_tiff(tags, loop=make.rng.random() < 0.3), "bad.tif")


@_kind
def exif(make: _Maker) -> Path:
    """EXIF blocks that lie: orientations that do not exist, tables that point anywhere."""
    orientation = make.rng.choice([0, 1, 6, 8, 9, 255, 65_535])
    entry = struct.pack(
        "<HHIHH", 0x0112, make.rng.choice([3, 3, 2, 7, 99]), make.rng.choice([1, 0, 2**31]), orientation, 0
    )
    count, following = make.rng.choice([(1, 0), (1, 8), (60_000, 0), (0, 2**31)])
    block = b"II*\0\x08\0\0\0" + struct.pack("<H", count) + entry + struct.pack("<I", following)
    block = make.rng.choice([block, block[:11], b"", b"garbage", block * 1000])[:60_000]
    format, suffix = make.rng.choice([("JPEG", ".jpg"), ("PNG", ".png"), ("WEBP", ".webp")])
    return make.written(_encoded(format, size=(40, 20), exif=b"Exif\0\0" + block), f"bad{suffix}")


# Sample types


@_kind
def mode(make: _Maker) -> Path:
    written = {
        "PNG": ["1", "L", "LA", "P", "RGBA", "I;16"], "TIFF": ["1", "CMYK", "LAB", "YCbCr", "F", "I", "I;16", "PA",
        "RGBX", "RGBA"],
        "JPEG": ["L", "CMYK", "YCbCr"], "WEBP": ["RGBA"], "GIF": ["P", "L", "1"], "PPM": ["L", "1", "I"],
        "BMP": ["P", "1", "L"],
        "JPEG2000": ["L", "LA", "RGBA", "I;16"],
    }  # fmt: skip
    format = make.rng.choice(sorted(written))
    picked = make.rng.choice(written[format])
    options = {"transparency": make.rng.choice([0, 3, b"\0\1"])} if format == "PNG" and picked in ("P", "L") else {}
    return make.written(_encoded(format, size=(30, 20), mode=picked, **options), f"bad{_FORMATS[format]}")


@_kind
def floats(make: _Maker) -> Path:
    """Floating-point TIFFs with numbers that are none, or far from 0 to 1."""
    value = make.rng.choice([float("nan"), float("inf"), -float("inf"), 3e38, -5.0, 1e-40])
    pixels = np.random.default_rng(0).random((20, 30), dtype=np.float32)
    pixels[:: make.rng.choice([1, 1, 4])] = value
    return make.written(_saved(Image.fromarray(pixels), "TIFF"), "bad.tif")


@_kind
def array(make: _Maker) -> Path:
    types = [
        "<f4",
        "<f8",
        "<f2",
        "|i1",
        "<i4",
        "<u4",
        "<i8",
        "<c8",
        "|b1",
        "|O",
        "|S3",
        "<U3",
        ">u2",
        "<u2",
        "|u1",
        "|V4",
        "<M8[s]",
    ]
    shapes = [(8, 8, 3), (3, 8, 8), (8, 8), (8,), (2, 8, 8, 3), (8, 8, 7), (1, 1, 1, 1, 1), (0, 8, 3), (8, 8, 1)]
    header = _npy_header(make.rng.choice(shapes), make.rng.choice(types), fortran=make.rng.random() < 0.3)
    call = b"\x80\x02cos\nsystem\nX\x10\x00\x00\x00touch out/made_it\x85R."
    return make.written(
        header + make.rng.choice([bytes(5000), b"\xff" * 5000, call]), make.rng.choice(["bad.npy", "bad.png"])
    )


@_kind
def array_header(make: _Maker) -> Path:
    texts = [b"{", b"{'descr': '<f4'}", b"[" * 60_000, b"__import__('os').system('touch out/made_it')", b"{}", b"7"]
    texts += [
        b"{'descr': [('a', '|u1'), ('b', '|O')], 'fortran_order': False, 'shape': (4, 4)}",
        b"\xff\xff",
        b"1" + b"0" * 60_000,
    ]
    text = make.rng.choice(texts)
    version = make.rng.choice([b"\1\0", b"\1\0", b"\2\0", b"\3\0", b"\x09\x09"])
    length = struct.pack("<H" if version[:1] in (b"\1", b"\x09") else "<I", len(text) + make.rng.choice([0, 0, 9]))
    return make.written(b"\x93NUMPY" + version + length + text, "bad.npy")


# Several frames


@_kind
def animated(make: _Maker) -> Path:
    format, suffix = make.rng.choice([("GIF", ".gif"), ("WEBP", ".webp"), ("PNG", ".png"), ("TIFF", ".tif")])
    images = [_image((24, 20), seed=number) for number in range(make.rng.choice([2, 5, 40]))]
    content = bytearray(_saved(images[0], format, save_all=True, append_images=images[1:]))
    what = make.rng.randrange(3)
    if what == 1:
        content = content[: make.rng.randrange(len(content) // 3, len(content))]
    elif what == 2:
        for _ in range(10):
            content[make.rng.randrange(len(content) // 3, len(content))] ^= 1 << make.rng.randrange(8)
    return make.written(bytes(content), f"bad{suffix}")


# Names


@_kind
def file_name(make: _Maker) -> Path:
    content = make.rng.choice([_encoded("PNG"), _encoded("PNG")[:60], b""])
    return make.written(content, make.rng.choice(_NAMES))


@_kind
def folder_name(make: _Maker) -> Path:
    name = make.rng.choice(_NAMES)[:-4][:200]
    os.mkdir(os.path.join(os.fsencode(make.folder), name))
    return make.written(make.rng.choice([_encoded("PNG"), b""]), os.path.join(name, b"bad.png"))


# Formats by hand


def _image(size: tuple[int, int], *, mode: str = "RGB", seed: int = 0) -> Image.Image:
    width, height = size
    if width * height > 1 << 20:
        return Image.new(mode, size)
    pixels = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))
    if mode in ("LAB", "RGBX", "PA", "LA", "I;16", "I", "F"):
        direct = pixels.convert({"LAB": "RGB", "RGBX": "RGB", "PA": "P"}.get(mode, "L"))
        return Image.frombytes(mode, size, (direct.tobytes() * 4)[: len(Image.new(mode, size).tobytes())])
    return pixels.convert(mode)


def _saved(image: Image.Image, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def _encoded(format: str, *, size: tuple[int, int] = (24, 20), mode: str = "RGB", **options: Any) -> bytes:
    return _saved(_image(size, mode=mode), format, **options)


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def _png(width: int, height: int, data: bytes, *extra: tuple[bytes, bytes], kind: int = 2, depth: int = 8) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    before = b"".join(_chunk(name, content) for name, content in extra)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + before + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")


def _patched(content: bytes, start: int, change: bytes) -> bytes:
    return content[:start] + change + content[start + len(change) :]


def _jpeg_of_size(width: int, height: int) -> bytes:
    content = _encoded("JPEG")
    return _patched(content, content.index(b"\xff\xc0") + 5, struct.pack(">HH", height, width))


def _jp2_of_size(side: int) -> bytes:
    content = _encoded("JPEG2000")
    start = content.index(b"\xff\x51") + 6
    return _patched(
        _patched(content, start, struct.pack(">II", side, side)),
        content.index(b"ihdr") + 4,
        struct.pack(">II", side, side),
    )


def _tiff(tags: dict[int, int], *, loop: bool = False) -> bytes:
    """A directory of long integers behind 64 bytes of pixels; with `loop` it is followed by itself."""
    start = 8 + 64
    entries = b"".join(struct.pack("<HHII", key, 4, 1, value) for key, value in sorted(tags.items()))
    return (
        b"II*\0"
        + struct.pack("<I", start)
        + bytes(64)
        + struct.pack("<H", len(tags))
        + entries
        + struct.pack("<I", start * loop)
    )


def _npy_header(shape: tuple[int, ...], kind: str, *, fortran: bool = False) -> bytes:
    text = repr({"descr": kind, "fortran_order": fortran, "shape": shape}).encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text
