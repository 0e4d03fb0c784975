"""The documentation runs: its Python, its commands, its links; and generated pages say what the code says."""

import contextlib
import importlib.util
import io
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]

PAGES = [REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "MODEL_CARD.md", "CHANGELOG.md")]
PAGES = [page for page in PAGES if page.exists()] + sorted((REPOSITORY / "docs").glob("*.md"))

FENCE = re.compile(r"^```(?P<language>[^\n]*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?P<target>[^)\s]+)\)")


class Block(NamedTuple):
    """One fenced block: where it starts, and what it holds."""

    where: str
    code: str

    def __str__(self) -> str:
        return self.where


def blocks(language: str) -> list[Block]:
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in FENCE.finditer(text):
            if match["language"].strip() == language:
                line = text.count("\n", 0, match.start()) + 1
                found.append(Block(f"{page.relative_to(REPOSITORY).as_posix()}:{line}", match["code"]))
    return found


def commands() -> list[Block]:
    """Each command of the `console` blocks by itself, with continued lines joined and comments dropped."""
    found = []
    for block in blocks("console"):
        for line in block.code.replace("\\\n", " ").splitlines():
            if line.strip() and not line.lstrip().startswith("#"):
                found.append(Block(block.where, " ".join(line.split())))
    return found


@pytest.fixture
def released_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of the right names and shapes where documentation asks for a release; nothing is downloaded."""
    import torch

    import dinov2.checkpoints.locate
    from dinov2.models.releases import RELEASES, backbone_config

    def download(url: str, **options: object) -> Path:
        (row,) = (row for row in RELEASES if row.url == url)
        path = tmp_path / row.filename
        if row.kind == "backbone":
            torch.save(backbone_config(row).build().state_dict(), path)
        else:
            torch.save({"weight": torch.zeros(1000, 384 * (1 + (row.layers or 1))), "bias": torch.zeros(1000)}, path)
        return path

    monkeypatch.setattr(dinov2.checkpoints.locate, "download", download)


@pytest.mark.parametrize("block", blocks("python"), ids=str)
@pytest.mark.usefixtures("released_files")
def test_documented_python_runs(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "hf.register()" in block.code:  # it holds for a whole process, and this one has other tests to run
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        command = [sys.executable, "-c", block.code]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return
    monkeypatch.chdir(tmp_path)
    exec(compile(block.code, block.where, "exec"), {"__name__": "docs"})


@pytest.mark.parametrize("block", commands(), ids=lambda block: f"{block.where} {block.code[:60]}")
def test_a_documented_command_exists(block: Block) -> None:
    assert fault_of(block.code) is None


def fault_of(command: str) -> str | None:
    """What is wrong with a documented command, or None."""
    words = shlex.split(command)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words.pop(0)  # environment variables in front
    program, arguments = re.sub(r"^\.venv/bin/", "", words[0]), words[1:]
    if program in ("python", "python3") and arguments[:2] == ["-m", "pip"]:
        program, arguments = "pip", arguments[2:]
    if program in ("python", "python3") and arguments[:2] == ["-m", "dinov2"]:
        program, arguments = "dinov2", arguments[2:]
    match program, arguments:
        case "dinov2", _:
            return fault_of_our_command(arguments)
        case "make", _:
            targets = re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
            missing = [target for target in arguments if "=" not in target and target not in targets]
            return f"the Makefile has no target {missing}" if missing else None
        case "pip", ["install", *rest]:
            return fault_of_installation(rest)
        case "conda", ["env", "create", "-f", name]:
            return None if (REPOSITORY / name).exists() else f"there is no {name}"
        case (("python" | "python3"), ["-m", ("venv" | "pytest" | "ruff" | "mypy" | "sphinx"), *_]):
            return None
        case (("python" | "python3"), ["-c", code]):
            done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
            return done.stderr if done.returncode else None
        case (("python" | "python3"), [script, *_]) if script.endswith(".py"):
            return None if (REPOSITORY / script).exists() else f"there is no file {script}"
        case (("git" | "cd" | "pre-commit" | ".ci/run"), _):
            return None
        case "conda", ["activate", _]:
            return None
    return f"nobody checks {program!r}; teach this test or write another command"


def fault_of_our_command(arguments: list[str]) -> str | None:
    from dinov2.cli import build_parser

    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            build_parser().parse_args(arguments)
        except SystemExit as exit_:
            return said.getvalue() if exit_.code else None
    return None


def fault_of_installation(arguments: list[str]) -> str | None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {extra for word in arguments for found in re.findall(r"^\.\[(.*)\]$", word) for extra in found.split(",")}
    unknown = extras - set(project["optional-dependencies"])
    if unknown:
        return f"pyproject.toml has no extra {sorted(unknown)}"
    files = [file for flag, file in pairwise(arguments) if flag == "-r"]
    missing = [file for file in files if not (REPOSITORY / file).exists()]
    return f"there is no {missing}" if missing else None


def launchers() -> dict[str, set[str]]:
    """Files of the package that the documentation runs, with the options that it gives them."""
    found: dict[str, set[str]] = {}
    for command in commands():
        for script in re.findall(r"\bdinov2/run/\S+\.py", command.code):
            found.setdefault(script, set()).update(re.findall(r"(?<=\s)--[a-z_-]+", command.code))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("script", launchers())
def test_a_documented_file_runs_from_a_clone_and_knows_its_options(script: str) -> None:
    environment = {**os.environ, "PYTHONPATH": "."}
    result = subprocess.run(
        [sys.executable, script, "--help"], cwd=REPOSITORY, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert [option for option in launchers()[script] if option not in result.stdout] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_inside_the_repository_lead_somewhere(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    targets = [match["target"].partition("#")[0] for match in LINK.finditer(text)]
    local = [target for target in targets if target and "://" not in target and not target.startswith("mailto:")]
    assert [target for target in local if not (page.parent / target).exists()] == []


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_docs", REPOSITORY / "scripts" / "generate_docs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["configuration.md", "cli.md"])
def test_generated_pages_are_up_to_date(name: str) -> None:
    written = (REPOSITORY / "docs" / name).read_text(encoding="utf-8")
    assert written == generator().PAGES[name](), "stale: run `python scripts/generate_docs.py`"


def test_every_command_says_what_it_does_and_gives_an_example() -> None:
    from dinov2.cli import build_parser

    found = dict(generator().leaf_commands(build_parser(), "dinov2"))
    assert {"dinov2 train", "dinov2 eval knn", "dinov2 quickstart", "dinov2 report"} <= set(found)
    assert [name for name, parser in found.items() if not parser.description] == []
    assert [name for name, parser in found.items() if "example" not in parser.format_help().lower()] == []


def examples() -> Iterator[tuple[str, str]]:
    """Every line of a command's help that is itself a command."""
    from dinov2.cli import build_parser

    for name, parser in generator().leaf_commands(build_parser(), "dinov2"):
        for line in (parser.epilog or "").replace("\\\n", " ").splitlines():
            command = re.sub(r"^\s*(examples?:)?\s*", "", line)
            if command.startswith("dinov2 "):
                yield name, command


def test_the_examples_in_the_help_are_accepted_by_the_parser() -> None:
    found = list(examples())
    assert {"dinov2 train", "dinov2 eval knn"} <= {name for name, _ in found}
    assert [(name, command) for name, command in found if fault_of(command) is not None] == []


def test_the_readme_is_short_and_starts_with_a_command() -> None:
    lines = (REPOSITORY / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 200
    assert any("make quickstart" in line for line in lines[:20])


def test_continuous_integration_runs_the_commands_of_the_readme() -> None:
    script = (REPOSITORY / ".ci" / "run").read_text(encoding="utf-8")
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    targets = set(re.findall(r"\bmake ([a-z-]+)", script))
    assert {"setup", "test", "lint", "types", "test-all"} <= targets
    assert [target for target in targets if f"make {target}" not in readme] == []
    folders = re.findall(r"\btests/[\w/]+", script)
    assert folders and [folder for folder in folders if not (REPOSITORY / folder).is_dir()] == []


def test_the_commands_without_make_are_those_of_the_makefile() -> None:
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    options = re.search(r"^PYTEST := \S+ -m pytest (.*)$", makefile, re.MULTILINE)
    assert options is not None
    parallel = options[1].replace("$(JOBS)", "auto")
    for expression in re.findall(r'-m ("not slow[^"]*"|"not soak[^"]*")', makefile):
        assert f"pytest {parallel} -m {expression}" in readme


# The package index's `dinov2` is somebody else's: no page and no message may lead there.

FOREIGN = re.compile(r"(?:pip|pipx|uv|conda|mamba|poetry)\b[^\n`]*?\b(?:install|add)\b[^\n`]*?[\s'\"]dinov2(?![\w-])")


def texts() -> list[Path]:
    places = [*PAGES, *REPOSITORY.glob("*.txt"), *REPOSITORY.glob("*.yaml"), REPOSITORY / "Makefile"]
    for folder, pattern in (("dinov2", "*.py"), ("dinov2", "*.yaml"), ("scripts", "*"), (".github", "*.yml")):
        places += [path for path in (REPOSITORY / folder).rglob(pattern) if path.is_file() and path.suffix != ".pyc"]
    return places


def test_nothing_installs_the_other_package_called_dinov2() -> None:
    assert [path for path in texts() if FOREIGN.search(path.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize("line", ["pip install dinov2", "pip install -U 'dinov2[hf]'", "uv pip install torch dinov2"])
def test_an_installation_of_the_other_package_is_seen(line: str) -> None:
    assert FOREIGN.search(line)


@pytest.mark.parametrize("line", ["pip install -e .", "pip install dinov2-anywhere", "pip install dinov2x"])
def test_other_installations_pass(line: str) -> None:
    assert not FOREIGN.search(line)


@pytest.mark.parametrize(
    "command",
    [
        "make breakfast",
        "pip install -e '.[nothing]'",
        "pip install -r absent.txt",
        "python dinov2/absent.py",
        "PYTHONPATH=. python dinov2/run/absent.py --nodes 1",
        "curl somewhere",
    ],
)
def test_a_documented_command_that_does_not_exist_is_refused(command: str) -> None:
    assert fault_of(command)


def test_the_method_is_as_long_as_the_readme_says() -> None:
    section = (
        (REPOSITORY / "README.md").read_text(encoding="utf-8").partition("## Read the code")[2].partition("\n## ")[0]
    )
    said = int(re.search(r"about ([\d,]+) lines", section)[1].replace(",", ""))  # type: ignore[index]
    places = [REPOSITORY / place for place in re.findall(r"`(dinov2/[\w/.]+)`", section)]
    files = [file for place in places for file in ([place] if place.is_file() else place.glob("*.py"))]
    lines = sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)
    assert len(places) == 5 and abs(lines - said) <= 0.05 * said, lines
