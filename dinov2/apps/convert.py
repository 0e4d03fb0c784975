"""A model in the layout of another library: written, read back, compared, and only then put in place.

Nothing is trusted: the tensors that come back from the files must be the source's, each accounted for, and outputs on a
probe batch must agree, by this package's own reading and, where it is installed, by the library that the files are for.
"""

import filecmp
import math
import os
import shlex
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dinov2.apps.conversion import (
    ConversionOrigin,
    ConvertedModel,
    Target,
    is_file_name,
    model_card,
    verify,
    write_target,
)
from dinov2.apps.places import output_folder
from dinov2.checkpoints.files import read_file, write_text_file
from dinov2.checkpoints.heads import head_from_state
from dinov2.checkpoints.load import check_fit
from dinov2.checkpoints.locate import ShowProgress, locate_checkpoint
from dinov2.checkpoints.open import Checkpoint, open_checkpoint
from dinov2.checkpoints.resize import resize_model
from dinov2.errors import ConfigError, DinoError
from dinov2.models.heads import LinearHead
from dinov2.pretrained import digest_of_files

__all__ = ["Conversion", "convert"]


@dataclass(frozen=True)
class Conversion:
    """Written files, and their distance from the source."""

    output: Path
    files: tuple[str, ...]
    to: Target
    n_tensors: int
    differences: dict[str, float]
    """Largest absolute difference of tokens and logits, by who read the result."""
    notes: tuple[str, ...]
    source: str
    sha256: str

    def as_json(self) -> dict[str, object]:
        """Plain values."""
        return {**self.__dict__, "output": str(self.output), "files": list(self.files), "notes": list(self.notes)}


def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    to: Target,
    head: str | os.PathLike[str] | None = None,
    layers: int | None = None,
    labels: str | os.PathLike[str] | None = None,
    without_head: bool = False,
    img_size: Sequence[int] | int | None = None,
    patch_size: int | None = None,
    in_chans: int | None = None,
    ask_library: bool = True,
    force: bool = False,
    progress: ShowProgress | None = None,
) -> Conversion:
    """Writes the model `source` (anything `dinov2.checkpoints.locate.find` finds) at `out` in another layout.

    `head` adds a linear classifier; `labels` is a file with a class name a line. `img_size`, `patch_size` and
    `in_chans` adapt the backbone first (`dinov2.checkpoints.resize`); of a file whose positions are no square and that
    does not say their height and width, `img_size` says them. `progress` shows how far a download is.

    Raises `WeightsError` when the source is no such model or a tensor could not be carried over, `ConfigError` when
    `out` is taken by something else, `DinoError` when the disk is full or the result differs.
    """
    target = Path(os.path.abspath(Path(out).expanduser()))  # a name also for `.`
    command = _command(source, out, to, head, layers, labels, without_head, img_size, patch_size, in_chans)
    _check_place(target, source, to)
    location = locate_checkpoint(
        str(source).removeprefix("hf:"), layers=layers or (1 if to == "hf" else 4), progress=progress
    )
    checkpoint = open_checkpoint(location.path)
    native = _native_size(checkpoint, img_size)
    config = checkpoint.config or location.config or checkpoint.architecture(**native)
    check_fit(checkpoint.state, config, source=str(source))
    resized = resize_model(checkpoint.state, config, img_size=img_size, patch_size=patch_size, in_chans=in_chans)
    head_path = Path(head).expanduser() if head is not None else location.head
    classifier = None if without_head else _head(checkpoint, head_path, config.embed_dim, location.path)
    notes = [*checkpoint.notes, *resized.notes]
    if checkpoint.dropped:
        notes.append(f"{len(checkpoint.dropped)} tensors of projection heads: left out, a backbone needs none")
    if without_head and (checkpoint.head or head_path):
        notes.append("classifier: left out, as asked")
    if labels is not None and classifier is None:
        raise ConfigError(f"{labels} names classes, but {source} has no classifier; add --head, or leave --labels out")
    names = None if classifier is None else _labels(labels, classifier.out_features)
    model = ConvertedModel(resized.state, resized.config, classifier, names)
    read = [*checkpoint.files, *([head_path] if classifier is not None and head_path is not None else [])]
    origin = ConversionOrigin(str(source), digest_of_files(read), command, location.name)
    with _staging(target) as stage:
        staged = stage / target.name
        notes += write_target(model, staged, to)
        differences = verify(model, staged, to, notes, ask_library=ask_library)
        card = staged / "README.md" if staged.is_dir() else staged.with_suffix(".md")
        text = model_card(origin, model, to=to, differences=differences, notes=notes, name=target.name)
        write_text_file(card, text)
        files = _put_in_place(stage, target, card.name, force=force)
    n_tensors = len(model.state) + (0 if classifier is None else 2)
    return Conversion(Path(out), files, to, n_tensors, differences, tuple(notes), str(source), origin.sha256)


def _check_place(target: Path, source: str | os.PathLike[str], to: Target) -> None:
    if to == "original" and not is_file_name(target):
        raise ConfigError(
            f"the release's layout is one file, and {target} has no name of one; end it in .pth or .safetensors"
        )
    if is_file_name(target) and target.is_dir():
        raise ConfigError(f"{target} is a folder and has the name of a file; choose another path")
    if not is_file_name(target) and target.exists() and not target.is_dir():
        raise ConfigError(f"{target} is a file, where a folder is to be written; choose another path")
    try:
        same = target.exists() and Path(source).expanduser().exists() and target.samefile(Path(source).expanduser())
    except (OSError, ValueError):
        same = False
    if same:
        raise ConfigError(f"{target} is the source itself; choose another path for the result")
    output_folder(target.absolute().parent, task="convert")


def _native_size(checkpoint: Checkpoint, img_size: Sequence[int] | int | None) -> dict[str, object]:
    """The requested size, where it is the native one of positions that are no square and so do not tell it."""
    if not isinstance(img_size, Sequence) or not {"pos_embed", "patch_embed.proj.weight"} <= set(checkpoint.state):
        return {}
    positions, patch = checkpoint.state["pos_embed"].shape[1] - 1, checkpoint.state["patch_embed.proj.weight"].shape[-1]
    is_native = math.isqrt(positions) ** 2 != positions and math.prod(side // patch for side in img_size) == positions
    return {"img_size": list(img_size)} if is_native else {}


def _head(checkpoint: Checkpoint, file: Path | None, embed_dim: int, path: Path) -> LinearHead | None:
    if file is not None:
        return head_from_state(read_file(file), embed_dim=embed_dim, source=str(file))
    if checkpoint.head is not None:
        return head_from_state(checkpoint.head, embed_dim=embed_dim, source=str(path))
    return None


def _labels(file: str | os.PathLike[str] | None, classes: int) -> list[str]:
    if file is not None:
        try:
            path = Path(file).expanduser()
            if path.exists() and not path.is_file():  # a pipe would wait for a writer
                raise ConfigError(f"the class names in {file} cannot be read (it is no regular file); give a text file")
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"the class names in {file} cannot be read ({error}); give a text file") from error
        names = [line.strip() for line in lines if line.strip()]
        if len(names) != classes:
            raise ConfigError(f"{file} has {len(names)} class names and the head {classes} classes; give one a line")
        return names
    if classes == 1000:
        from dinov2.data.datasets.imagenet_classes import IMAGENET_CLASSES

        return [entry.name for entry in IMAGENET_CLASSES]
    return [f"LABEL_{index}" for index in range(classes)]


@contextmanager
def _staging(target: Path) -> Iterator[Path]:
    """A hidden folder beside the target, on the same disk, that is gone afterwards."""
    parent = target.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=parent))
    except OSError as error:
        raise DinoError(f"nothing can be written to {parent} ({error.strerror}); free some space there") from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _put_in_place(stage: Path, target: Path, card: str, *, force: bool) -> tuple[str, ...]:
    """Moves what was verified to where it belongs; the names of its files. Nothing different is overwritten unasked."""
    is_folder = (stage / target.name).is_dir()
    made, place = (stage / target.name, target) if is_folder else (stage, target.absolute().parent)
    names = sorted(path.name for path in made.iterdir())
    if is_folder and target.exists():
        others = sorted(path.name for path in target.iterdir() if path.name not in names)
        if others:
            raise ConfigError(f"{target} holds other files ({', '.join(others[:3])}); choose an empty or new folder")
    existing = [name for name in names if (place / name).exists()]
    different = [name for name in existing if not filecmp.cmp(made / name, place / name, shallow=False)]
    taken = [name for name in different if name != card]  # a page that only names another command is no loss
    if taken and not force:
        raise ConfigError(f"{place / taken[0]} exists and is another one; choose another path, or give --force")
    try:
        if is_folder and not target.exists():
            os.replace(made, target)
            return tuple(names)
        for name in names:
            if name not in existing or name in different:
                os.replace(made / name, place / name)
    except OSError as error:
        raise DinoError(f"{place} could not be written ({error.strerror}); check it and start again") from error
    return tuple(names)


def _command(
    source: object,
    out: object,
    to: str,
    head: object,
    layers: object,
    labels: object,
    without_head: bool,
    *sizes: object,
) -> str:
    words = ["dinov2", "convert", str(source), str(out), "--to", to]
    options = {"--head": head, "--layers": layers, "--labels": labels}
    options |= dict(zip(("--img-size", "--patch-size", "--in-chans"), sizes, strict=True))
    for name, value in options.items():
        if value is not None:
            words += [name, *(map(str, value) if isinstance(value, (list, tuple)) else [str(value)])]
    return shlex.join([*words, "--without-head"] if without_head else words)
