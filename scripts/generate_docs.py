"""Writes the pages of `docs/` that repeat what the code already says: `configuration.md` and `cli.md`.

    python scripts/generate_docs.py            write them
    python scripts/generate_docs.py --check    only say whether they are up to date (exit status 1 if not)

The tables come from `dinov2.configs.describe()` and from the parser of the command line, never from a second list.
Options are laid out here and not by argparse, whose wording changes between versions of Python.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs"

WARNING = "<!-- Written by scripts/generate_docs.py; edit what it reads instead. -->\n\n"

CONFIGURATION_HEAD = """# Configuration

One YAML file, in the sections and with the keys of the public release, says everything about a training run. What a
file leaves out has the default below; `key=value` arguments after a command's options win over the file:
`dinov2 train --config-file my.yaml optim.epochs=50 crops.local_crops_number=4`. An unknown key, a wrong type or an
impossible value is refused before anything starts, with the nearest key that exists. The whole, merged configuration
is written to `config.yaml` in the run's folder, and can be given back as `--config-file`.

Keys marked `+` are additions of this package; all others are the release's, with its defaults.
"""

CLI_HEAD = """# Commands

`dinov2 COMMAND --help` prints what stands here. `python -m dinov2` is the same program. The exit status is 0 after
success, 1 when the work failed, and 2 for a wrong command line or unusable input.
"""


def as_code(text: object) -> str:
    """A code span that cannot break a table: on one line, without bare pipes."""
    return "`" + " ".join(str(text).split()).replace("|", "\\|") + "`"


def as_cell(text: object) -> str:
    """Words that cannot break a table; `<date>` is a placeholder and no HTML."""
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;")


def as_yaml(value: object) -> str:
    """A default as one would write it in the file."""
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    if isinstance(value, list | tuple):
        return f"[{', '.join(as_yaml(item) for item in value)}]"
    return repr(value) if isinstance(value, str) and not value else str(value)


def configuration_page() -> str:
    """`docs/configuration.md`: a table for each section, in the order of the tree."""
    from dinov2.configs import describe

    parts = [WARNING, CONFIGURATION_HEAD]
    for section, rows in groupby(describe(), key=lambda row: row.key.partition(".")[0]):
        parts.append(f"\n## {section}\n\n| key | type | default | meaning |\n| --- | --- | --- | --- |\n")
        for row in rows:
            mark = "" if row.is_release_key else " `+`"
            key, default = as_code(row.key.removeprefix(f"{section}.")), as_code(as_yaml(row.default))
            parts.append(f"| {key}{mark} | {as_cell(row.type)} | {default} | {as_cell(row.sentence)} |\n")
    return "".join(parts)


def subparsers_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Commands below a parser, by name; empty for a command that does the work itself."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def leaf_commands(parser: argparse.ArgumentParser, name: str) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Every command that does something, with its full name (`dinov2 eval knn`)."""
    below = subparsers_of(parser)
    if not below:
        yield name, parser
    for word, child in below.items():
        yield from leaf_commands(child, f"{name} {word}")


def option_row(action: argparse.Action) -> str:
    """One option or argument as a table row."""
    value = action.metavar or (action.dest.upper() if action.option_strings else action.dest)
    names = ", ".join(as_code(option) for option in action.option_strings) or as_code(value)
    if action.option_strings and action.nargs != 0:
        names += f" {as_code(value if isinstance(value, str) else ' '.join(value))}"
    given = " ".join(map(str, action.default)) if isinstance(action.default, list | tuple) else action.default
    default = "" if given is None or given is False or given in (argparse.SUPPRESS, "") else as_code(given)
    if action.required and action.option_strings:
        default = "required"
    meaning = (action.help or "").replace("%(default)s", str(given)).replace("%%", "%")
    if action.choices is not None:
        meaning = f"{meaning.rstrip('.')}; one of {', '.join(str(choice) for choice in action.choices)}"
    return f"| {names} | {default} | {as_cell(meaning)} |\n"


def command_section(name: str, parser: argparse.ArgumentParser) -> str:
    """One command: what it does, its options, its example."""
    parts = [f"\n## {name}\n\n{(parser.description or '').strip()}\n"]
    actions = [action for action in parser._actions if action.dest != "help" and action.help != argparse.SUPPRESS]
    if actions:
        parts.append("\n| option | default | meaning |\n| --- | --- | --- |\n")
        parts += [option_row(action) for action in actions]
    if parser.epilog:
        parts.append(f"\n```text\n{parser.epilog.strip()}\n```\n")
    return "".join(parts)


def cli_page() -> str:
    """`docs/cli.md`: a section for each command."""
    from dinov2.cli import build_parser

    sections = [command_section(name, parser) for name, parser in leaf_commands(build_parser(), "dinov2")]
    return "".join([WARNING, CLI_HEAD, *sections])


PAGES: dict[str, Callable[[], str]] = {"configuration.md": configuration_page, "cli.md": cli_page}


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the generated pages of docs/.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail when a page is stale")
    check = parser.parse_args().check
    stale = []
    for name, page in PAGES.items():
        path, text = DOCS / name, page()
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(name)
        if not check:
            path.write_text(text, encoding="utf-8", newline="\n")
    if stale:
        print(f"{'stale' if check else 'written'}: {', '.join(stale)}")
    return 1 if stale and check else 0


if __name__ == "__main__":
    sys.path.insert(0, str(DOCS.parent))
    sys.exit(main())
