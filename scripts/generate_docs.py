"""Writes what repeats the code: the pages in `PAGES` of `docs/`, and tables in other pages.

    python scripts/generate_docs.py            write them
    python scripts/generate_docs.py --check    only say whether they are up to date (exit status 1 if not)

The tables come from `dinov2.configs.describe()`, from the parser of the command line, from the table of releases
(`dinov2.models.releases`) and from that of moved names (`dinov2._moved`), never from a second list. A hand-written page
shows a table of releases between the comments `<!-- table: NAME -->` and `<!-- end of table -->`.
Options are laid out here and not by argparse, whose wording changes between versions of Python.
"""

import argparse
import ast
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[1] / "docs"
sys.path.insert(0, str(DOCS.parent))  # for `scripts.floors`

FILLED = ("MODEL_CARD.md", "README.md", "docs/architecture.md")

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


NAMES_HEAD = """# Names of the release

What `from dinov2.MODULE import NAME` gives here, for {total} public names of the release: {here} are here and mean the
same, {moved} have moved and warn, and {gone} raise an ImportError that says what this page says. Of the modules for
depth, segmentation and dino.txt only a few names are counted; all that lies in them has the same answer.
"""

RELEASES_HEAD = """# Released weights

The authors of DINOv2 published {count} weight files: eight backbones, trained on LVD-142M without labels, and heads on
top of them. This package knows each by name; `dinov2 releases` lists them, `dinov2 releases --check` asks the server
for every one. They are under the Apache-2.0 licence, and are downloaded when you ask for them, not before.

Keys and shapes of what is built here are verified against the release in the tests. The files themselves are not part
of those tests: `make test-online`, for which you need a network, loads ViT-S/14 and ViT-B/14 strictly, with and without
registers, each as backbone and with both ImageNet heads.

No checksums were published and none are given here; downloads are checked for their length, and loaded strictly and
without running code. Figures are what the authors report; nobody has repeated them with this code.
"""

RELEASES_TAIL = """
## Links that are wrong

Four links in the README of the release lead nowhere or to another file. The names above follow the rule of all others,
which is also what the release's own code asks for:

| file | the README links | which is |
| --- | --- | --- |
| `dinov2_vitg14_reg4_linear_head.pth` | `dinov2_vitg14_lreg4_inear_head.pth` | no file: letters are swapped |
| `dinov2_vitb14_nyu_linear_head.pth` | `dinov2_vitb14_linear_head.pth` | the ImageNet classifier |
| `dinov2_vitl14_nyu_linear_head.pth` | `dinov2_vitl14_linear_head.pth` | the ImageNet classifier |
| `dinov2_vitg14_nyu_linear_head.pth` | `dinov2_vitg14_linear_head.pth` | the ImageNet classifier |

Folders never carry the registers' suffix: `dinov2_vits14_reg4_pretrain.pth` lies in `dinov2_vits14`.

## Where downloads go

To the folder in the environment variable `DINOV2_CACHE`, else to `checkpoints` in the folder of `torch.hub`, whose own
downloads are found there. An interrupted download is continued; a file gets its name only when it is whole. Without a
network, put a file there under its own name and it is used.
"""

BACKBONES_TEXT = """
## Backbones

Top-1 accuracy in %, for frozen features. `dinov2.load(NAME)` loads a model by its name, and so does
`torch.hub.load(CLONE, NAME, source="local")` with the arguments of the release (`pretrained`, `weights`, and `layers`
for classifiers). The latter needs torch alone and returns the bare module, in training mode as in the release: call
`.eval()`.

{table}
Position embeddings are for 518 x 518 pixels and patches of 14. Models without registers resize them with an offset of
0.1 and without antialiasing, models with registers by exact size and with antialiasing. All take RGB images normalised
by ImageNet's mean (0.485, 0.456, 0.406) and deviation (0.229, 0.224, 0.225).
"""

CLASSIFIERS_TEXT = """
## Image classification

Linear heads for the 1,000 classes of ImageNet-1k, on the tokens of one block or of four.

{table}
The release reports linear accuracy in two tables of its README, which disagree for all models with registers (bold).
Both are kept here:

{results}"""

DENSE_TEXT = """
## {title}

{unit}; each figure is the link to the file. These models are not in this version.

{table}"""


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


def table_of(heads: str, rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table; `heads` are separated by bars."""
    columns = heads.count("|") + 1
    lines = [f"| {heads} |", f"|{' --- |' * columns}", *(f"| {' | '.join(row)} |" for row in rows)]
    return "".join(f"{line}\n" for line in lines)


def _label(row: Any) -> str:
    size = row.backbone.removeprefix("dinov2_vit")[0]
    return f"ViT-{size if size == 'g' else size.upper()}/14{' with registers' if row.num_register_tokens else ''}"


def _link(row: Any, text: str = "file") -> str:
    return f"[{text}]({row.url})"


def _of_kind(kind: str) -> list[Any]:
    from dinov2.models.releases import RELEASES

    return [row for row in RELEASES if row.kind == kind]


def backbones_table() -> str:
    """Names, sizes, reported ImageNet figures, addresses."""
    rows = []
    for row in _of_kind("backbone"):
        figures = [row.shown(metric) for metric in ("imagenet_knn", "imagenet_linear")]
        size = [f"{row.parameters:,}", str(row.num_register_tokens)]
        rows.append((_label(row), f"`{row.name}`", *size, *figures, _link(row), f"`{row.hf_id}`"))
    heads = "model | name | parameters | registers | ImageNet k-NN | ImageNet linear | weights | on Hugging Face"
    return table_of(heads, rows)


def classifiers_table() -> str:
    """The ImageNet heads on one and on four layers."""
    rows = _of_kind("classifier")
    pairs = zip(rows[::2], rows[1::2], strict=True)
    lines = ((_label(one), f"`{one.hub_name}`", _link(one), _link(four)) for one, four in pairs)
    return table_of("backbone | name | 1 layer | 4 layers", lines)


def linear_results_table() -> str:
    """The two figures that the release reports for linear evaluation on ImageNet."""
    heads = {row.backbone: row for row in _of_kind("classifier") if row.layers == 1}
    rows = []
    for row in _of_kind("backbone"):
        one, other = row.shown("imagenet_linear"), heads[row.name].shown("imagenet_linear")
        rows.append((_label(row), one, other if one == other else f"**{other}**"))
    return table_of("model | table of the models | table of the heads to evaluate", rows)


def card_results_table() -> str:
    """What the release's model card reports, by backbone; dense figures are those of the heads on it."""
    from dinov2.models.releases import release

    rows = []
    for row in _of_kind("backbone"):
        metrics = ("imagenet_knn", "imagenet_linear", "imagenet_v2_linear", "inaturalist18_linear", "oxford_hard_map")
        dense = ["-"] * 3
        if not row.num_register_tokens:
            depth, segmentation = release(f"{row.name}_nyu_linear4_head"), release(f"{row.name}_ade20k_ms_head")
            dense = [depth.shown("nyu_rmse"), depth.shown("sun_rmse"), segmentation.shown("ade20k_miou")]
        rows.append((_label(row), *(row.shown(metric) for metric in metrics), *dense))
    return table_of(
        "model | IN-1k k-NN | IN-1k linear | IN-V2 linear | iNat 2018 linear | Oxford-Hard mAP | NYUd RMSE, linear 4 | "
        "SUN RGB-D RMSE | ADE20K mIoU, ms",
        rows,
    )


def depth_table() -> str:
    """RMSE of the depth heads, each figure the link to its file."""
    rows = []
    for backbone in _of_kind("backbone")[:4]:
        mine = [row for row in _of_kind("depth") if row.backbone == backbone.name]
        rows.append((_label(backbone), *(_link(row, row.shown(row.accuracy[0].metric)) for row in mine)))
    return table_of("backbone | NYUd linear | linear 4 | DPT | KITTI linear | linear 4 | DPT", rows)


def segmentation_table() -> str:
    """mIoU of the segmentation heads, each figure the link to its file."""
    (m2f,) = _of_kind("mask2former")
    rows = []
    for backbone in _of_kind("backbone")[:4]:
        mine = [row for row in _of_kind("segmentation") if row.backbone == backbone.name]
        cells = [_link(row, row.shown(row.accuracy[0].metric)) for row in mine]
        whole = _link(m2f, m2f.shown("ade20k_miou")) if m2f.backbone == backbone.name else "-"
        rows.append((_label(backbone), *cells[:2], whole, *cells[2:]))
    return table_of("backbone | ADE20K linear | multi-scale | Mask2Former | VOC 2012 linear | multi-scale", rows)


def heads_table() -> str:
    """The ImageNet heads with the release's two figures of linear accuracy, in one row a backbone."""
    rows = _of_kind("classifier")
    figures = {row.name: row.shown("imagenet_linear") for row in _of_kind("backbone")}
    lines = []
    for one, four in zip(rows[::2], rows[1::2], strict=True):
        accuracy, again = figures[one.backbone], one.shown("imagenet_linear")
        both = accuracy if accuracy == again else f"{accuracy} or **{again}**"
        lines.append((_label(one), f"`{one.hub_name}`", _link(one), _link(four), both))
    return table_of("backbone | name | 1 layer | 4 layers | linear accuracy", lines)


def dense_table() -> str:
    """The depth and segmentation heads, each figure the link to its file, in one row a backbone."""
    rows = [*_of_kind("depth"), *_of_kind("segmentation"), *_of_kind("mask2former")]
    lines = []
    for backbone in _of_kind("backbone")[:4]:
        cells: dict[str, list[str]] = {}
        for row in rows:
            if row.backbone == backbone.name:
                cells.setdefault(row.dataset, []).append(_link(row, row.shown(row.accuracy[0].metric)))
        lines.append((_label(backbone), *(" / ".join(links) for links in cells.values())))
    return table_of(
        "backbone | NYUd: linear / linear 4 / DPT | KITTI: linear / linear 4 / DPT | "
        "ADE20K: linear / multi-scale / Mask2Former | VOC 2012: linear / multi-scale",
        lines,
    )


def releases_page() -> str:
    """`docs/releases.md`: every released file, with what is reported of it."""
    from dinov2.models.releases import RELEASES

    return "".join(
        [
            WARNING,
            RELEASES_HEAD.format(count=len(RELEASES)),
            BACKBONES_TEXT.format(table=backbones_table()),
            CLASSIFIERS_TEXT.format(table=classifiers_table(), results=linear_results_table()),
            DENSE_TEXT.format(title="Depth", unit="RMSE in metres", table=depth_table()),
            DENSE_TEXT.format(title="Segmentation", unit="mIoU in %", table=segmentation_table()),
            RELEASES_TAIL,
        ]
    )


def _by_advice(row: tuple[str, str, str]) -> tuple[str, str]:
    module, _, advice = row
    return module, advice


def release_names_page() -> str:
    """`docs/release_names.md`: every name of the release's import surface, with what became of it."""
    from dinov2._moved import Instead, successor

    facts = (DOCS.parent / "tests" / "release_names.txt").read_text(encoding="utf-8").split("\n\n")[1:]
    names = [(module, name) for module, *own in map(str.split, facts) for name in own]
    answers = {(module, name): successor(module, name) for module, name in names}
    here = [pair for pair in names if answers[pair] is None]
    moved = [(*pair, new) for pair, new in answers.items() if isinstance(new, str)]
    gone = sorted(((*pair, new.advice) for pair, new in answers.items() if isinstance(new, Instead)), key=_by_advice)

    def spans(pairs: Iterable[tuple[str, ...]]) -> str:
        return ", ".join(as_code(name) for _, name, *_ in pairs)

    by_module = groupby(here, key=lambda row: row[0])
    return "".join(
        [
            WARNING,
            NAMES_HEAD.format(total=len(names), here=len(here), moved=len(moved), gone=len(gone)),
            "\n## Here under the same name\n\n",
            table_of("module | names", ((as_code(module), spans(own)) for module, own in by_module)),
            "\n## Moved, with a warning\n\n",
            table_of(
                "module | name | now", ((as_code(m), as_code(n), as_code(new.replace(":", "."))) for m, n, new in moved)
            ),
            "\n## Not here\n\n",
            table_of(
                "module | names | use instead",
                (
                    (as_code(module), spans(own), as_cell(advice))
                    for (module, advice), own in groupby(gone, key=_by_advice)
                ),
            ),
        ]
    )


PAGES: dict[str, Callable[[], str]] = {
    "configuration.md": configuration_page,
    "cli.md": cli_page,
    "releases.md": releases_page,
    "release_names.md": release_names_page,
}


def floors_table() -> str:
    """Floors from the ground up: their rooms, what each holds, and what it may import."""
    from scripts.floors import FLOORS

    built = [{room for room in rooms if _first_line(room) and room != "_moved"} for rooms in FLOORS.values()]
    rows = []
    for number, (floor, rooms) in enumerate(FLOORS.items()):
        for room, allowed in rooms.items():
            if (sentence := _first_line(room)) is None:
                continue
            # Floors from the ground up that may be imported whole are named by their numbers.
            whole = next((n for n, members in enumerate(built) if not members <= allowed), len(built))
            single = sorted(allowed & set().union(*built[whole:]))
            floors = [] if not whole else ["floor 0"] if whole == 1 else [f"floors 0 to {whole - 1}"]
            may = ", ".join([*floors, *(f"`{name}`" for name in single)]) or "nothing"
            rows.append((f"{number} {floor}", f"`{room}`", as_cell(sentence), may))
    return table_of("floor | room | holds | may import", rows)


def _first_line(room: str) -> str | None:
    """First sentence of a room's docstring; None for a room that is not built yet."""
    package = DOCS.parent / "dinov2"
    places = (package / room / "__init__.py", package / f"{room}.py", DOCS.parent / f"{room}.py")
    path = next((path for path in places if path.exists()), None)
    if path is None:
        return None
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(docstring.split("\n\n")[0].split())


TABLES: dict[str, Callable[[], str]] = {
    "floors": floors_table,
    "backbones": backbones_table,
    "classifiers": classifiers_table,
    "linear-results": linear_results_table,
    "card-results": card_results_table,
    "heads": heads_table,
    "dense": dense_table,
    "depth": depth_table,
    "segmentation": segmentation_table,
}


def with_tables(text: str) -> str:
    """A page with the tables between its marks written anew."""
    marked = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
    return marked.sub(lambda match: f"{match[1]}\n{TABLES[match[2]]()}\n{match[3]}", text)


def generated() -> Iterator[tuple[Path, str]]:
    """Every file that holds something generated, with what it should say."""
    for name, page in PAGES.items():
        yield DOCS / name, page()
    for name in FILLED:
        path = DOCS.parent / name
        yield path, with_tables(path.read_text(encoding="utf-8"))


def main() -> int:
    parser = argparse.ArgumentParser(description="Write what the documentation generates.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail when a page is stale")
    check = parser.parse_args().check
    stale = []
    for path, text in generated():
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(path.name)
        if not check:
            path.write_text(text, encoding="utf-8", newline="\n")
    if stale:
        print(f"{'stale' if check else 'written'}: {', '.join(stale)}")
    return 1 if stale and check else 0


if __name__ == "__main__":
    sys.path.insert(0, str(DOCS.parent))
    sys.exit(main())
