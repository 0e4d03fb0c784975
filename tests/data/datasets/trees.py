"""Small folders of real image files, in the layouts that people have."""

import os
from pathlib import Path

import numpy as np
from PIL import Image

WNIDS = ("n01440764", "n01443537", "n15075141")
NAMES = ("tench", "goldfish", "toilet tissue")


def write_image(path: Path, *, size: tuple[int, int] = (8, 6), colour: int = 0) -> Path:
    """A picture of `size` (width, height) whose grey level tells which one it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (colour, colour, colour)).save(path)
    return path


def class_tree(root: Path, classes: dict[str, int]) -> Path:
    """`root/<class>/<number>.png`, so many images a class."""
    for name, count in classes.items():
        for number in range(count):
            write_image(root / name / f"{number}.png", colour=number)
    return root


def imagenet_tree(root: Path, *, labels_txt: bool = True) -> Path:
    """Three classes: 2 + 3 + 1 training, 1 + 1 + 1 validation and 4 test images."""
    for wnid, numbers in zip(WNIDS, ((3, 10026), (1, 2, 7), (12,)), strict=True):
        for number in numbers:
            write_image(root / "train" / wnid / f"{wnid}_{number}.JPEG", colour=number % 256)
    for number, wnid in enumerate(WNIDS, start=1):
        write_image(root / "val" / wnid / f"ILSVRC2012_val_{number:08d}.JPEG")
    for number in range(1, 5):
        write_image(root / "test" / f"ILSVRC2012_test_{number:08d}.JPEG")
    if labels_txt:
        (root / "labels.txt").write_text("".join(f"{w},{n}\n" for w, n in zip(WNIDS, NAMES, strict=True)))
    return root


def settle(root: Path) -> None:
    """Make every folder look an hour old, as if nobody were writing into it."""
    for folder, _, _ in os.walk(root):
        status = os.stat(folder)
        os.utime(folder, ns=(status.st_atime_ns, status.st_mtime_ns - 3600 * 10**9))


def cifar_rows(count: int, *, seed: int = 0) -> tuple[np.ndarray, list[int]]:
    """Pixels as CIFAR stores them, uint8 `[count, 3072]`, and labels."""
    pixels = np.random.RandomState(seed).randint(0, 256, size=(count, 3072), dtype=np.uint8)
    return pixels, [(seed + number) % 10 for number in range(count)]
