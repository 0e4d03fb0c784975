"""Two hundred bad weight files, against `dinov2.load` and a command each: one sentence, whatever is in them."""

import os
import random
from pathlib import Path

import pytest

from tests.fuzz.forks import LOADED, Case, Forks, fault
from tests.fuzz.ingredients import Ingredients, chunks
from tests.fuzz.weight_files import BadFile, weight_files

_COUNT = int(os.environ.get("DINOV2_FUZZ_WEIGHTS", "200"))
_COMMANDS = int(os.environ.get("DINOV2_FUZZ_COMMANDS", "1"))
_CHUNKS = 8


def commands(bad: BadFile, good: Ingredients) -> list[list[str]]:
    """All commands that take a weight file, in an order of the file's own."""
    file, pictures, head = str(bad.path), str(good.pictures), str(good.head)
    lines = [
        ["embed", pictures, "--model", file, "-o", "out/features.npz"],
        ["classify", pictures, "--model", file, "--head", head],
        ["classify", pictures, "--model", str(good.weights), "--head", file],
        ["viz", pictures, "--model", file, "-o", "out", "--what", "norm", "--no-page", "--size", "28"],
        ["eval", "knn", "--model", file, "--dataset", pictures, "--output-dir", "out"],
        ["convert", file, "out/model.safetensors", "--to", "original", "--skip-library"],
        ["convert", file, "out/model", "--to", "hf", "--skip-library"],
    ]
    random.Random(bad.name).shuffle(lines)
    return lines


@pytest.mark.parametrize("chunk", chunks(_CHUNKS, quick=2))
def test_a_bad_weight_file_is_one_sentence(chunk: int, forks: Forks, good: Ingredients, tmp_path: Path):
    faults = []
    for name, write in list(weight_files(tmp_path / "files", good, _COUNT))[chunk::_CHUNKS]:
        bad = write()
        for number, words in enumerate(commands(bad, good)[:_COMMANDS]):
            folder = tmp_path / f"{name}-{number}"
            folder.mkdir()
            outcome = forks.run(Case(name, words, str(folder), loads="" if number else str(bad.path)))
            wrong = fault(outcome)
            if wrong is None and bad.refused and LOADED in outcome.out:
                wrong = "was taken without a word"
            if wrong:
                faults.append(f"{name}: {' '.join(words[:2])}: {wrong}")
    assert not faults, "\n" + "\n".join(faults)
