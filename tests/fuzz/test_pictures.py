"""A hundred bad pictures, against the commands that read pictures: left out with a reason, or one sentence."""

import os
import random
from pathlib import Path

import pytest

from tests.fuzz.bad_pictures import bad_pictures
from tests.fuzz.forks import Case, Forks, fault
from tests.fuzz.ingredients import Ingredients, chunks
from tests.train.tiny_run import TINY

_COUNT = int(os.environ.get("DINOV2_FUZZ_PICTURES", "100"))
_CHUNKS = 5


def _commands(name: str, folder: Path, picture: Path, good: Ingredients) -> list[list[str]]:
    """All commands that read pictures, in an order of the picture's own: the file itself, or the folder it is in."""
    file, model, head = str(picture), str(good.weights), str(good.head)
    # Class folders: the good ones, and one with the bad picture.
    classes = folder.with_name(f"{name}-classes")
    classes.mkdir()
    for kind in good.pictures.iterdir():
        (classes / kind.name).symlink_to(kind)
    (classes / "bad").symlink_to(folder)
    (folder / "beside.png").write_bytes(next(good.pictures.rglob("*.png")).read_bytes())
    commands = [
        ["embed", str(folder), "--model", model, "-o", "out/features.npz"],
        ["embed", file, "--model", model, "-o", "out/features.npz", "--fit", "aspect"],
        [
            "classify",
            str(folder),
            "--model",
            model,
            "--head",
            head,
            "--json",
            "out/classes.json",
            "--csv",
            "out/classes.csv",
        ],
        ["classify", file, "--model", model, "--head", head],
        ["viz", str(folder), "--model", model, "-o", "out", "--what", "norm", "--size", "28"],
        ["viz", file, "--model", model, "-o", "out", "--what", "norm", "--no-page"],
        ["eval", "knn", "--model", model, "--dataset", str(classes), "--output-dir", "out"],
        ["features", file, model],
        ["train", "--data", str(classes), "--preset", "toy", *TINY[1:], "--max-steps", "1", "--output-dir", "out"],
    ]
    random.Random(name).shuffle(commands)
    return commands


@pytest.mark.parametrize("chunk", chunks(_CHUNKS, quick=2))
def test_a_bad_picture_is_one_sentence(chunk: int, forks: Forks, good: Ingredients, tmp_path: Path):
    faults = []
    for name, write in list(bad_pictures(tmp_path / "pictures", _COUNT))[chunk::_CHUNKS]:
        commands = _commands(name, tmp_path / "pictures" / name, write(), good)
        for number, words in enumerate(commands[: int(os.environ.get("DINOV2_FUZZ_COMMANDS", "1"))]):
            folder = tmp_path / f"{name}-{number}"
            folder.mkdir()
            if wrong := fault(forks.run(Case(name, words, str(folder)))):
                faults.append(f"{name}: {' '.join(words[:2])}: {wrong}")
    assert not faults, "\n" + "\n".join(faults)
