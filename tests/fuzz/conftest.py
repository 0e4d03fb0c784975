"""The process that forks, and the good files, once for each module of tests."""

import sys
from collections.abc import Iterator

import pytest

from tests.fuzz.forks import Forks
from tests.fuzz.ingredients import Ingredients, prepare

# What the commands import as they go; imported once before the forks, it is not imported again for every case.
_IMPORTS = """
    dinov2.cli dinov2.apps.classify dinov2.apps.convert dinov2.apps.embed dinov2.apps.evaluation.protocols
    dinov2.apps.train dinov2.apps.viz filecmp multiprocessing.synchronize
    numpy.ctypeslib numpy.ma PIL.BmpImagePlugin PIL.GifImagePlugin
    PIL.JpegImagePlugin PIL.PngImagePlugin PIL.PpmImagePlugin
""".split()


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    """Everything that the commands of these tests import is imported here."""
    if sys.platform != "linux":
        pytest.skip("limits and ends of processes are read as Linux tells them")
    with Forks(*_IMPORTS) as started:
        yield started


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Ingredients:
    """Good files; commands only read them."""
    return prepare(tmp_path_factory.mktemp("good"))
