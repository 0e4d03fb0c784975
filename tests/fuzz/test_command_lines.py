"""Five hundred random command lines: they work, or are refused in one sentence."""

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fuzz.command_lines import Sources, command_line
from tests.fuzz.forks import Case, Forks, fault
from tests.fuzz.ingredients import Ingredients, chunks
from tests.train.tiny_run import TINY

_COUNT = int(os.environ.get("DINOV2_FUZZ_LINES", "500"))
_CHUNKS = 10
_ENCODINGS = ("utf-8", "cp1252", "ascii")


@pytest.fixture(scope="module")
def sources(forks: Forks, good: Ingredients, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sources]:
    """Data of every kind that a command line names."""
    return prepare_sources(forks, good, tmp_path_factory.mktemp("sources"))


def prepare_sources(forks: Forks, good: Ingredients, folder: Path) -> Sources:
    """Runs `embed` and `train` once, in `folder`."""
    text = folder / "text.txt"
    text.write_text("neither a list\nnor a configuration: [\n")
    made = Sources(
        model=good.weights,
        head=good.head,
        pictures=good.pictures,
        picture=next(good.pictures.rglob("*.png")),
        features=folder / "out" / "features.npz",
        run=folder / "out" / "run",
        text=text,
    )
    embed = ["embed", str(good.pictures), "--model", str(good.weights), "-o", str(made.features)]
    train = ["train", "--preset", "toy", *TINY, "--max-steps", "1", "--output-dir", str(made.run)]
    for words in (embed, train):
        outcome = forks.run(Case("", words, str(folder)))
        assert outcome.code == 0, outcome
    return made


def case(number: int, sources: Sources, folder: Path) -> Case:
    """Line `number`, run in `folder`."""
    encoding = random.Random(f"encoding {number}").choice(_ENCODINGS)
    return Case(
        f"line-{number}", command_line(number, sources), str(folder), places=(), encoding=encoding, processes=32
    )


@pytest.mark.parametrize("chunk", chunks(_CHUNKS, quick=3))
def test_a_random_command_line_works_or_is_refused_in_one_sentence(
    chunk: int, forks: Forks, sources: Sources, tmp_path: Path
):
    faults = []
    for number in range(chunk, _COUNT, _CHUNKS):
        folder = tmp_path / str(number)
        folder.mkdir()
        run = case(number, sources, folder)
        if wrong := fault(forks.run(run)):
            faults.append(f"{run.name}: {_short(run.words)}: {wrong}")
    assert not faults, "\n" + "\n".join(faults)


def _short(words: list[str]) -> str:
    return " ".join(word if len(word) < 60 else f"{word[:20]}...{word[-20:]}" for word in words)
