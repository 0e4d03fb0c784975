"""Are the installed packages there, new enough, and made for each other?

What is needed and what is optional is read from this distribution's own metadata (or from `pyproject.toml` beside a
clone), so that no list here can differ from the one that pip reads.
"""

import importlib
import importlib.util
import re
import shlex
import shutil
import sys
import tomllib
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import NamedTuple

import torch

from dinov2.apps.doctor.findings import Finding, fine, note, problem

__all__ = [
    "Requirement",
    "examine_packages",
    "parse_requirement",
    "pip_command",
    "requirements",
    "torchvision_pair",
    "version_key",
]

_DISTRIBUTION = "dinov2-anywhere"
_REQUIREMENT = re.compile(r"\s*([A-Za-z0-9._-]+)\s*(?:\[[^]]*\])?\s*\(?([^;)]*)\)?\s*(?:;(.*))?")
_EXTRA = re.compile(r"extra\s*==\s*['\"]([^'\"]+)['\"]")
# Tools of those who change this package, and the union of the others.
_NOT_FOR_USERS = {"dev", "all"}
# Extras that install only where there is an NVIDIA GPU.
_FOR_CUDA = {"cuml"}
# Extras and packages that are declared for what is not built yet: nothing here imports them.
_NOT_USED_YET = {"datasets", "dense", "quant", "report", "slurm", "wandb"}
_PURPOSES = {
    "hf": "transformers' classes and models by their Hugging Face names",
    "hub": "downloads from the Hugging Face hub",
    "parquet": "data sets and embeddings in Parquet files",
    "index": "k-NN on tens of millions of features",
    "logistic": "logistic regression by scikit-learn",
    "cuml": "logistic regression by cuML",
    "export": "ONNX files",
    "tiff": "TIFF images of more than three channels",
    "track": "curves in TensorBoard",
    "timm": "timm's models and weights",
}


class Requirement(NamedTuple):
    """One line of what is needed: distribution, least version (or ""), extra (or "" for always)."""

    name: str
    least: str
    extra: str

    def __str__(self) -> str:
        return f"{self.name}>={self.least}" if self.least else self.name


def examine_packages() -> Iterator[Finding]:
    """Python, torch with its torchvision, the other requirements, the optional ones."""
    yield fine("python", f"Python {'.'.join(map(str, sys.version_info[:3]))}", version=sys.version.split()[0])
    yield torchvision_pair()
    wanted = requirements()
    if not wanted:
        yield note(
            "packages",
            "this package is neither installed nor beside its pyproject.toml, so what it needs is not known here",
            f"{pip_command('install')} -e .",
        )
    installed: list[str] = []
    for requirement in wanted:
        if not requirement.extra:
            finding = _needed(requirement)
            if finding is None:
                installed.append(f"{requirement.name} {version(requirement.name)}")
            else:
                yield finding
    if installed:
        yield fine("packages", f"all that is always needed is there: {', '.join(installed)}")
    yield from _optional([requirement for requirement in wanted if requirement.extra])
    if _installed("dinov2") is not None:
        yield problem(
            "packages",
            "another distribution called dinov2 is installed and takes this package's import name",
            f"{pip_command('uninstall')} dinov2",
        )


def requirements() -> list[Requirement]:
    """What users of this package may need; empty where neither metadata nor `pyproject.toml` can be found."""
    try:
        lines = requires(_DISTRIBUTION) or []
    except PackageNotFoundError:
        lines = _from_clone(Path(__file__).parents[3] / "pyproject.toml")
    found = [requirement for line in lines if (requirement := parse_requirement(line)) is not None]
    left_out = _NOT_FOR_USERS | _NOT_USED_YET
    return [one for one in found if not {one.extra, one.name} & left_out and one.name != _DISTRIBUTION]


def parse_requirement(line: str) -> Requirement | None:
    """`transformers>=4.56; extra == "hf"` in its parts; None for what is no requirement."""
    match = _REQUIREMENT.fullmatch(line)
    if match is None:
        return None
    least = re.search(r"[>=]=\s*([0-9][0-9A-Za-z.+]*)", match[2])
    extra = _EXTRA.search(match[3] or "")
    return Requirement(match[1], least[1] if least else "", extra[1] if extra else "")


def version_key(text: str) -> tuple[int, ...]:
    """`2.11.0+cu126` -> (2, 11, 0): the leading numbers, good for comparing."""
    return tuple(int(number) for number in re.findall(r"\d+", text.partition("+")[0])[:3])


def torchvision_pair(lines: list[str] | None = None, found: Mapping[str, str] | None = None) -> Finding:
    """Whether the installed torchvision was built for the installed torch, by its own metadata, and loads.

    `lines` and `found` stand in for torchvision's requirements and the installed versions.
    """
    actual = found if found is not None else {name: _installed(name) or "" for name in ("torch", "torchvision")}
    reinstall = f"{pip_command('install')} --upgrade --force-reinstall torch torchvision"
    if missing := [name for name in ("torch", "torchvision") if not actual[name]]:
        return problem(
            "torch", f"{' and '.join(missing)} cannot be found", f"{pip_command('install')} {' '.join(missing)}"
        )
    facts = {"torch": actual["torch"], "torchvision": actual["torchvision"]}
    needed = requires("torchvision") if lines is None else lines
    line = next((line for line in needed or [] if re.match(r"torch\b(?!vision)", line)), "")
    parsed = parse_requirement(line)
    made_for = "" if parsed is None else parsed.least
    have, want = version_key(actual["torch"]), version_key(made_for)
    # Older builds name one torch exactly, newer ones the oldest that they work with.
    if made_for and (have < want if ">=" in line else have != want):
        return problem(
            "torch",
            f"torchvision {actual['torchvision']} was built for torch {made_for}{' or newer' if '>=' in line else ''}, "
            f"but torch {actual['torch']} is installed",
            reinstall,
            **facts,
            made_for=made_for,
        )
    if found is None and (trouble := _loading_trouble()):
        return problem("torch", f"torchvision does not load: {trouble}", reinstall, **facts)
    return fine("torch", f"torch {actual['torch']} with its torchvision {actual['torchvision']}", **facts)


def _loading_trouble() -> str:
    try:
        importlib.import_module("torchvision")
        return ""
    except Exception as error:  # a mismatch shows as ImportError, OSError, AttributeError or RuntimeError
        return " ".join(str(error).split()) or type(error).__name__


def _needed(requirement: Requirement) -> Finding | None:
    found = _installed(requirement.name)
    command = f"{pip_command('install')} --upgrade '{requirement}'"
    if found is None:
        return problem("packages", f"{requirement.name} is not installed", command)
    if requirement.least and version_key(found) < version_key(requirement.least):
        says = f"{requirement.name} {found} is older than {requirement.least}"
        return problem("packages", says, command, version=found)
    return None


def _optional(wanted: list[Requirement]) -> Iterator[Finding]:
    by_extra: dict[str, list[Requirement]] = {}
    for requirement in wanted:
        if requirement.extra in _FOR_CUDA and not torch.cuda.is_available():
            continue
        by_extra.setdefault(requirement.extra, []).append(requirement)
    present = []
    for extra, members in by_extra.items():
        lacking = [one for one in members if (found := _installed(one.name)) is None or _is_older(found, one.least)]
        present += [f"{one.name} {_installed(one.name)}" for one in members if one not in lacking]
        if lacking:
            names = " and ".join(
                one.name if _installed(one.name) is None else f"{one.name} (too old: {_installed(one.name)})"
                for one in lacking
            )
            purpose = _PURPOSES.get(extra, extra)
            quoted = " ".join(f"'{one}'" for one in lacking)
            yield note("optional packages", f"for {purpose}: {names} not there", f"{pip_command('install')} {quoted}")
    if present:
        yield fine("optional packages", f"there: {', '.join(present)}")


def _is_older(found: str, least: str) -> bool:
    return bool(least) and version_key(found) < version_key(least)


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def pip_command(verb: str) -> str:
    """`python -m pip install`, by the name that reaches this very Python from a shell; by uv where there is no pip."""
    found = shutil.which("python")
    same = found is not None and Path(found).parent == Path(sys.executable).parent
    python = "python" if same else shlex.quote(sys.executable)
    if importlib.util.find_spec("pip") is None:
        return f"uv pip {verb} --python {python}"
    return f"{python} -m pip {verb}"


def _from_clone(file: Path) -> list[str]:
    try:
        project = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
    except (OSError, KeyError, ValueError):
        return []
    lines = list(project.get("dependencies", []))
    for extra, members in project.get("optional-dependencies", {}).items():
        lines += [f'{member}; extra == "{extra}"' for member in members]
    return lines
