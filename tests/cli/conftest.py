"""Commands run in this process, in a folder of their own."""

import io
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
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
def dinov2(here: Path) -> Iterator[Callable[..., Ended]]:
    """The command `dinov2` on a console that is not UTF-8: words in, exit code and output out."""

    def command(*words: object) -> Ended:
        out, err = (io.TextIOWrapper(io.BytesIO(), "cp1252", newline="\n", write_through=True) for _ in range(2))
        with redirect_stdout(out), redirect_stderr(err):
            try:
                code = main([str(word) for word in words])
            except SystemExit as stop:  # argparse
                code = int(stop.code or 0)
        return Ended(code, *(stream.buffer.getvalue().decode("cp1252") for stream in (out, err)))  # type: ignore[attr-defined]

    with quiet_logger():
        yield command


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; tests only read it."""
    return tiny_run(tmp_path_factory.mktemp("runs") / "fertig")
