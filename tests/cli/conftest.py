"""Commands run in this process, in a folder of their own."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dinov2.cli import main
from tests.runs import Ended, quiet_logger, tiny_run


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: empty, with a space and an umlaut in its name."""
    folder = tmp_path / "hier für mich"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def dinov2(here: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Ended]]:
    """The command `dinov2`: words in, exit code and output out."""

    def command(*words: object) -> Ended:
        capsys.readouterr()
        try:
            code = main([str(word) for word in words])
        except SystemExit as stop:  # argparse
            code = int(stop.code or 0)
        return Ended(code, *capsys.readouterr())

    with quiet_logger():
        yield command


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; tests only read it."""
    return tiny_run(tmp_path_factory.mktemp("runs") / "fertig")
