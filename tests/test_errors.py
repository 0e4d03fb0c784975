"""The text of an error: one sentence in one line, whatever stands in the names that it gives."""

import pytest

from dinov2.errors import ConfigError, DataError, DinoError, MissingDependency, WeightsError


@pytest.mark.parametrize("kind", [DinoError, ConfigError, DataError, WeightsError])
def test_a_name_cannot_break_the_line_or_command_a_terminal(kind: type[DinoError]) -> None:
    error = kind("a\nb\x1b[31m\u2028c.png is no image; é and 犬 stay")
    assert str(error) == r"a\nb\x1b[31m\u2028c.png is no image; é and 犬 stay"


def test_a_missing_package_says_what_to_install() -> None:
    assert str(MissingDependency("x>=1", "reading\nthis")) == (
        r"reading\nthis needs a package that is not installed; run: pip install 'x>=1'"
    )
