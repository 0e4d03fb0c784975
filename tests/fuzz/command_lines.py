"""Random command lines: real subcommands, options and configuration keys, with something wrong in most of them.

Subcommands and options are those of the parser, keys those of the configuration, so that what is added to either is
tried without a word here. A line starts from one that works (tiny data, a tiny model), which then is changed once to
three times. What bounds the work stands at its end, where the last of two options wins.
"""

import argparse
import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from dinov2.cli import build_parser
from dinov2.configs.keys import leaves, section_names
from tests.train.tiny_run import TINY

__all__ = ["Sources", "command_line"]

_WRONG = (
    "", " ", "x", "-", "--", "-1", "0", "1", "7", "-0", "0.5", "1e400", "-1e400", "nan", "inf", "1e-400", "0x10",
    "1_000", "+3",
    "9" * 12, "9" * 30, "9" * 5000, "-" + "9" * 30, "1.5", "١٢", "²", "½", "é", "🦕", "\udce9", "\udcff.png",
    "a\nb", "\x1b[31m", "\t",
    "none", "None", "null", "true", "False", "auto", "cuda", "cuda:99", "cuda:-1", "mps", "tpu", "cpu:0", "fp8",
    "[1, 2]", "{a: 1}",
    "a,b", "a=b", "a:b", "=", ":", ".", "nowhere", "nowhere/x.png", "~no_such_user/x", "x" * 300, "x" * 5000, "*",
    "[", "**", "a?b*",
    "/dev/null", "/dev/full", "/dev/zero", "/proc/none/x", "file:///x", "http://localhost:1/x.pth", "https://",
    "ftp://x/y.pth",
    "hf:a/b", "a/b", "timm:", "timm:nothing", "timm:vit_tiny_patch16_224", "nothing:f", "json:loads",
    "json:nothing", ":", "x:y:z",
    "dinov2_vits14", "dinov2_vits15", "dinov2_vits14_lc", "dinov2_vits14_dd", "list:", "list:nowhere.txt", "toy:",
    "toy:split=X",
    "toy:split=TRAIN:n=0", "toy:n=-3", "toy:split=TRAIN:n=x", "toy:split=TRAIN:split=VAL", "folder:",
    "folder:root=", "Toy", "ImageNet",
    "ImageNet:split=TRAIN", "ImageNet:split=TRAIN:root=.:extra=.", "ImageNet22k:root=.", "CIFAR10",
    "huggingface:x", "NoSet:split=VAL",
    "28x28", "0x0", "1x2x3x4", "28", "99999999x99999999", "x.onnx", "x.npz", "x.parquet", "x.html", "a.tar",
    "runs", "out/x",
)  # fmt: skip
_WRONG_VALUES = (
    "", "null", "~", "x", "-1", "0", "1", "2", "0.5", "-0.5", "1e400", "nan", ".nan", ".inf", "-.inf", "9" * 12,
    "9" * 30, "9" * 5000,
    "true", "[]", "[1]", "[1, 2]", "[0.1, 0.5]", "[0.5, 0.1]", "[a]", "[1, 2, 3]", "[.nan, 1]", "[[1]]", "{}",
    "{a: 1}", "[", "{", "'",
    '"', "&a [*a]", "*a", "!!python/object/apply:os.system [ls]", "!!int x", "${x}", "${optim.epochs}",
    "${oc.env:HOME}", "${", "\\${x}",
    "${student.depth}", "${train.seed}${train.seed}", "2001-01-01", "0x10", "0b1", "1:30", "1_000", "١٢", "é",
    "\udce9", "a\nb: c", "\t",
    "- 1", "a: b", "# x", "|", ">", "@", "`", "%", "auto", "cuda:99", "nowhere", "list:nowhere", "toy:split=X",
    "swiglu", "vit_none",
    "[" * 2000, "x" * 5000, "1e-400", "-0.0", "1e308", "yes", "on", "1.0", "3.7", "=", "toy:split=TRAIN:n=3",
)  # fmt: skip
_NUMBERS = ("-1", "0", "1", "2", "3", "7", "14", "28", "30", "-100", "9" * 12, "9" * 30, "9" * 5000)
_FRACTIONS = ("0.5", "1e-3", "-0.1", "1e-400", "1e300", "1e400", "-inf", "nan")
# At the end of the line, so that nothing takes long.
_BOUNDS = {
    "train": ["--max-steps", "1"],
    "quickstart": ["--max-steps", "1"],
    "export": ["--check-sizes", "13x13"],  # refused, and late: recording a graph takes long
    "eval linear": ["--iterations", "2", "--step-size", "4"],
    "eval log-regression": ["--max-train-iters", "3"],
    "eval logistic": ["--max-train-iters", "3"],
}
_PLACES = {"output", "output_dir", "out", "json", "csv", "basis", "cache_dir"}


class Sources(NamedTuple):
    """Paths that work."""

    model: Path
    head: Path
    pictures: Path
    picture: Path
    features: Path
    """What `dinov2 embed` wrote."""
    run: Path
    """A folder that `dinov2 train` wrote."""
    text: Path
    """A text file that is no list and no configuration."""


class _Command(NamedTuple):
    words: str
    parser: argparse.ArgumentParser


def command_line(number: int, sources: Sources) -> list[str]:
    """The words of line `number`, always the same ones."""
    rng = random.Random(f"line {number}")
    commands = _commands()
    # Every second line takes configuration keys, of which there are more than options.
    configured = [command for command in commands if _takes_keys(command.parser)]
    command = configured[0 if rng.random() < 0.9 else -1] if number % 2 else commands[number // 2 % len(commands)]
    words = _working(command, sources, rng)
    for _ in range(rng.choice([1, 1, 2, 3])):
        rng.choice(_CHANGES)(words, command.parser, sources, rng)
    return [*command.words.split(), *words, *_BOUNDS.get(command.words, [])]


def _commands() -> list[_Command]:
    """Every subcommand, in the order of the help text."""

    def below(parser: argparse.ArgumentParser, words: str) -> list[_Command]:
        families = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
        if not families:
            return [_Command(words, parser)]
        return [
            command
            for name, child in families[0].choices.items()
            for command in below(child, f"{words} {name}".strip())
        ]

    return below(build_parser(), "")


def _working(command: _Command, sources: Sources, rng: random.Random) -> list[str]:
    """A line that works: what must be given, where results go, and data where an evaluation asks for some."""
    words = []
    options = _options(command.parser)
    names = {action.dest for action in options}
    for action in command.parser._actions:
        if not action.option_strings:
            words += [_right(action, sources)] if action.dest != "overrides" else []
        elif action.required or action.dest in ("output", "output_dir"):
            words += [rng.choice(action.option_strings), _right(action, sources)]
    if "dataset" in names:
        words += ["--dataset", str(sources.pictures)]
    if "query_dataset" in names:
        words += ["--query-dataset", str(sources.pictures)]
    if command.words == "classify":
        words += ["--model", str(sources.model), "--head", str(sources.head)]
    if command.words == "viz":
        words += ["--what", "norm", "--no-page", "--size", "28"]
    if command.words == "convert":
        words += ["--skip-library"]
    if command.words == "train":  # half of them only check
        words += ["--preset", "toy", *TINY, *(["--dry-run"] if rng.random() < 0.5 else [])]
    if command.words == "quickstart":
        words += [
            *TINY[:-2],
            "evaluation.knn_train_dataset=toy:split=TRAIN:n=9",
            "evaluation.knn_val_dataset=toy:split=VAL:n=9",
        ]
    return words


def _takes_keys(parser: argparse.ArgumentParser) -> bool:
    return any(action.dest == "overrides" for action in parser._actions)


def _right(action: argparse.Action, sources: Sources) -> str:
    """A value that works for an argument."""
    if action.choices:
        return str(next(iter(action.choices)))
    by_name = {
        "features": sources.features, "folder": sources.run, "run_folder": sources.run, "model": sources.model,
        "models": sources.model, "head": sources.head, "query": sources.picture, "images": sources.pictures,
        "compare": sources.model, "source": sources.pictures, "out": "out/written.pth", "output": "out/written.npz",
        "json": "out/written.json", "csv": "out/written.csv", "precision": "fp32", "data": sources.pictures,
    }  # fmt: skip
    if action.dest == "source" and action.nargs is None:  # of `convert`, which takes one model
        return str(sources.model)
    if (
        action.dest == "output"
        and "--opset" in getattr(action, "container", argparse.ArgumentParser())._option_string_actions
    ):
        return "out/written.onnx"
    if action.dest.endswith("dataset"):
        return str(sources.pictures)
    return str(by_name.get(action.dest, "out/folder" if "dir" in action.dest else "2"))


def _options(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    # `releases --check` asks for all files, each with its own setup of TLS: seconds, to no end without a network.
    return [action for action in parser._actions if action.option_strings and action.dest not in ("help", "check")]


def _value(action: argparse.Action, sources: Sources, rng: random.Random) -> str:
    """A value for an argument: mostly one that the parser takes, so that the command has to judge it."""
    if rng.random() < 0.15:
        return rng.choice(_WRONG)
    if action.choices:
        return str(rng.choice(list(action.choices)))
    if action.dest == "num_workers":  # what these do is tested where data are loaded, and differs with the cores
        return rng.choice(("-1", "0", "x", "9" * 12))
    if action.type is not None:
        return rng.choice(_NUMBERS if action.type is not float else (*_NUMBERS, *_FRACTIONS))
    if action.dest not in _PLACES and rng.random() < 0.4:
        return str(rng.choice(sources))
    return rng.choice((_right(action, sources), *_WRONG))


# Changes


def _add_option(words: list[str], parser: argparse.ArgumentParser, sources: Sources, rng: random.Random) -> None:
    action = rng.choice(_options(parser) or [argparse.Action(["--none"], "none")])
    name = rng.choice(action.option_strings)
    place = rng.randrange(len(words) + 1)
    if action.nargs == 0:
        words[place:place] = [name]
    elif rng.random() < 0.2 and name.startswith("--"):
        words[place:place] = [f"{name}={_value(action, sources, rng)}"]
    else:
        count = 2 if action.nargs == 2 else rng.choice([1, 1, 2]) if action.nargs else 1
        words[place:place] = [name, *(_value(action, sources, rng) for _ in range(count))]


def _replace_word(words: list[str], parser: argparse.ArgumentParser, sources: Sources, rng: random.Random) -> None:
    places = [index for index, word in enumerate(words) if not word.startswith("-")]
    if places:
        words[rng.choice(places)] = rng.choice(_WRONG)


def _drop_word(words: list[str], parser: argparse.ArgumentParser, sources: Sources, rng: random.Random) -> None:
    if words:
        del words[rng.randrange(len(words))]


def _repeat(words: list[str], parser: argparse.ArgumentParser, sources: Sources, rng: random.Random) -> None:
    if words:
        start = rng.randrange(len(words))
        words[start:start] = words[start : start + rng.choice([1, 2])]


def _misspell(words: list[str], parser: argparse.ArgumentParser, sources: Sources, rng: random.Random) -> None:
    places = [index for index, word in enumerate(words) if word.startswith("-") or "=" in word]
    if places:
        place = rng.choice(places)
        word = words[place]
        cut = rng.randrange(len(word))
        words[place] = rng.choice(
            [word[:cut] + word[cut + 1 :], word[:cut] + "x" + word[cut:], word.upper(), word[:-1], word + "é"]
        )


def _add_word(words: list[str], parser: argparse.ArgumentParser, sources: Sources, rng: random.Random) -> None:
    words.insert(
        rng.randrange(len(words) + 1), rng.choice(["--help", "-h", "--version", "--none", "-z", "--", *_WRONG])
    )


def _shuffle(words: list[str], parser: argparse.ArgumentParser, sources: Sources, rng: random.Random) -> None:
    rng.shuffle(words)


def _override(words: list[str], parser: argparse.ArgumentParser, sources: Sources, rng: random.Random) -> None:
    """A configuration key, where the command takes some."""
    if not _takes_keys(parser):
        return _add_option(words, parser, sources, rng)
    keys, sections = list(leaves()), sorted(section_names())
    key = rng.choice(keys) if rng.random() < 0.85 else rng.choice(sections)
    if rng.random() < 0.15:
        cut = rng.randrange(len(key))
        key = rng.choice(
            [
                key[:cut] + key[cut + 1 :],
                key.upper(),
                f"{key}.x",
                f"{key}[0]",
                key.replace(".", ".."),
                f".{key}",
                f"{key}é",
            ]
        )
    words.append(f"{key}={rng.choice(_WRONG_VALUES)}")


_Change = Callable[[list[str], argparse.ArgumentParser, Sources, random.Random], None]
_CHANGES: list[_Change] = [
    *(_add_option,) * 6, *(_override,) * 9, *(_replace_word,) * 2, _drop_word, _repeat, _misspell, _add_word, _shuffle
]  # fmt: skip
