"""Features of many images, on disk: `dinov2 embed`."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dinov2 import distributed
from dinov2.apps.embed_plan import (
    check_place,
    image_source,
    planned_columns,
    rows_of_a_part,
    target_of,
    transform_of,
    wanted_of,
)
from dinov2.checkpoints.locate import ShowProgress
from dinov2.data.datasets.base import ImageDataset
from dinov2.data.eval_transform import EvalTransform, Fit
from dinov2.encode.cache import EXTRACTOR_VERSION
from dinov2.encode.embedding import Wanted
from dinov2.encode.part_work import EmbedProgress, PartWork, Rate
from dinov2.encode.store.finishing import Merge, begin, complete_output, finish
from dinov2.encode.store.parts import PartRecord, PartsFolder, manifest_of, room_on_disk
from dinov2.encode.store.writing import TableFormat
from dinov2.engine.progress import peak_memory
from dinov2.engine.signals import StopRequest
from dinov2.errors import ConfigError, DataError, DinoError
from dinov2.eval.result import environment
from dinov2.pretrained import Pretrained, load

__all__ = ["EmbedReport", "embed"]


@dataclass
class EmbedReport:
    """What was done, or with `dry_run` what would be."""

    output: Path
    images: int
    """In the source."""
    bytes: int
    """Of the rows, estimated before anything is computed."""
    parts: int
    columns: list[str]
    rows: int = 0
    unreadable: int = 0
    files: list[Path] = field(default_factory=list)
    parts_kept: int = 0
    """Parts that an earlier call had finished."""
    computed: int = 0
    """Images that this call read, over all processes."""
    seconds: float = 0.0
    peak_memory: int | None = None
    stopped_by: str | None = None
    """The signal that ended it early, or None."""

    @property
    def images_per_second(self) -> float | None:
        """Rate of this call; None when there was nothing left to do."""
        return self.computed / self.seconds if self.computed and self.seconds else None


def embed(
    source: str | Sequence[str],
    *,
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    table_format: TableFormat | None = None,
    registers: bool = False,
    mean: bool = False,
    patches: bool = False,
    layers: Sequence[int] = (),
    size: int | None = None,
    fit: Fit | None = None,
    max_tokens: int | None = None,
    stride: int | None = None,
    batch_size: int = 32,
    threads: int | None = None,
    part_rows: int | None = None,
    merge: Merge = "auto",
    overwrite: bool = False,
    dry_run: bool = False,
    device: str = "auto",
    precision: str = "auto",
    say: Callable[[str], None] = lambda text: None,
    progress: Callable[[EmbedProgress], None] = lambda state: None,
    downloads: ShowProgress | None = None,
) -> EmbedReport:
    """Writes the features of all readable images of `source` to `output`, in order; goes on where a former call ended.

    Args:
        source: a folder, list, glob or data set string, or several image files.
        output: a file with the suffix of its format, or with `table_format` any name (without a suffix: a folder).
        layers: block indices whose tokens are kept too, negative ones counted from the end.
        size, fit, max_tokens: other than the model's own transform.
        stride: pixels between patches; None is the patch size.
        threads: decoding threads of this process; None chooses by device and cores.
        part_rows: images of a part; None chooses.
        merge: whether the parts become one file.
        downloads: where the download of a model shows how far it is.

    Raises:
        DataError: there are no images, none is readable, or `output` was begun with other settings (they are named).
        ConfigError: options contradict each other, or `output` cannot be written, or is being written by another call.
        WeightsError: there is no such model.
        DinoError: the disk is full; what was finished is kept.
    """
    if not distributed.is_enabled():
        distributed.enable()
    if batch_size < 1:
        raise ConfigError(f"the batch is {batch_size}; write 1 or more")
    kind, target = target_of(output, table_format)
    if kind.folder:
        merge = "never"
    images = image_source(source)
    check_place(target, images, needs_npy=patches or kind.format == "npy")
    loaded = load(model, device=device, precision=precision, stride=stride, progress=downloads)
    wanted = wanted_of(loaded, registers=registers, mean=mean, patches=patches, layers=layers)
    transform = transform_of(loaded, size, fit, max_tokens)
    columns, row_bytes = planned_columns(loaded, transform, wanted, labelled=images.get_targets() is not None)
    rows_each = part_rows or rows_of_a_part(len(images), row_bytes, batch_size)
    parts = [range(first, min(first + rows_each, len(images))) for first in range(0, len(images), rows_each)]
    report = EmbedReport(target, len(images), len(images) * row_bytes, len(parts), columns)
    if dry_run:
        return report

    request = _request(images, loaded, transform, wanted, kind.format, batch_size, rows_each)
    about = {**_about(source, images, model), "depth": loaded.table.get("depth")}
    folder = PartsFolder(target, kind.format)
    if not overwrite:
        _keep_digest(request, manifest_of(target) or manifest_of(folder.path), loaded)
    with room_on_disk(target), ExitStack() as lock:
        state = _prepare(folder, request, about, lock, overwrite=overwrite)
        if state is None:
            done = manifest_of(target) or {}
            report.rows, report.unreadable = done.get("rows", 0), done.get("unreadable", 0)
            report.parts_kept, report.files = len(parts), complete_output(target)
            return report
        report.parts_kept = len(state)
        mine = _share([number for number in range(len(parts)) if number not in state])
        work = PartWork(
            folder,
            images,
            lambda pixels, blocks: loaded.encode(pixels, layers=blocks),
            transform,
            wanted,
            parts,
            batch_size,
            threads or _threads(loaded),
            channels=loaded.in_chans,
            pin_memory=loaded.device.type == "cuda",
            notes=request,
        )
        began = time.monotonic()
        with StopRequest() as stop:
            kept_images = sum(len(parts[number]) for number in state)
            work.run(mine, stop, Rate(progress, kept_images, len(images)), say)
            if distributed.is_main_process():
                _wait_for_others(folder, range(len(parts)), stop)
        report.seconds = time.monotonic() - began
        report.stopped_by, report.peak_memory = stop.reason, peak_memory(loaded.device)
        if stop or not distributed.is_main_process():
            return report
        records = folder.finished()
        report.computed = sum(len(parts[number]) for number in records if number not in state)
        manifest = {"schema": 1, "request": request, **about}
        if lost := [number for number in range(len(parts)) if number not in records]:
            raise DinoError(f"part {lost[0]} of {folder.path} is damaged or gone; give the same command again")
        ordered = [records[number] for number in range(len(parts))]
        report.files = finish(folder, ordered, merge=merge, manifest=manifest)
    report.rows = sum(record.rows for record in ordered)
    report.unreadable = sum(len(record.unreadable) for record in ordered)
    return report


def _threads(loaded: Pretrained) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    own = max(1, cores // distributed.get_local_size())
    # On a CPU the model wants the cores itself, and a decoded image costs it ten times what it costs the decoder.
    return min(own if loaded.device.type == "cuda" else max(1, own // 4), 16)


def _request(
    images: ImageDataset,
    loaded: Pretrained,
    transform: EvalTransform,
    wanted: Wanted,
    table_format: TableFormat,
    batch_size: int,
    rows_each: int,
) -> dict[str, Any]:
    """Everything that the bytes of the output depend on: who goes on with it must ask for the same."""
    return {
        "source": {"images": len(images), "fingerprint": images.fingerprint()},
        "model": {"name": loaded.name, "sha256": loaded.digest, "embed_dim": loaded.embed_dim}
        | ({"stride": loaded.stride} if loaded.stride != loaded.patch_size else {}),
        "transform": {**transform.describe(), "fit": transform.fit, "size": transform.crop_size},
        "precision": str(loaded.autocast_dtype or "float32").removeprefix("torch."),
        "registers": wanted.registers,
        "mean": wanted.mean,
        "patches": wanted.patches,
        "layers": list(wanted.layers),
        "format": table_format,
        "batch_size": batch_size,
        "part_rows": rows_each,
        "extractor": EXTRACTOR_VERSION,
    }


def _keep_digest(request: dict[str, Any], begun: dict[str, Any] | None, loaded: Pretrained) -> None:
    """Lets what was begun with a digest of the weight files, as manifests once had it, go on under that digest."""
    model = begun["request"].get("model") if begun is not None and isinstance(begun["request"], dict) else None
    digest = model.get("sha256") if isinstance(model, dict) else None
    if isinstance(digest, str) and loaded.has_digest(digest):
        request["model"]["sha256"] = digest


def _about(source: str | Sequence[str], images: ImageDataset, model: str | os.PathLike[str]) -> dict[str, Any]:
    names = [source] if isinstance(source, str) else list(source)
    existing = Path(model).expanduser()
    return {
        "source": names[0] if len(names) == 1 else names,
        "root": getattr(images, "root", None),
        "model": str(existing.resolve()) if existing.exists() else str(model),
        "class_names": images.class_names,
        "versions": environment(),
    }


def _prepare(
    folder: PartsFolder, request: Mapping[str, Any], about: Mapping[str, Any], lock: ExitStack, *, overwrite: bool
) -> dict[int, PartRecord] | None:
    """Finished parts, the same in every process; None when the output is complete. `lock` keeps other calls away."""
    outcome: Any = None
    if distributed.is_main_process():
        try:
            lock.enter_context(folder.alone())
            outcome = None if begin(folder, request, about, overwrite=overwrite) else folder.finished()
        except (ConfigError, DataError) as error:
            outcome = error
    outcome = distributed.broadcast_object(outcome)
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def _share(numbers: Sequence[int]) -> Sequence[int]:
    """This process's contiguous range of what is left to do."""
    rank, world = distributed.get_global_rank(), distributed.get_global_size()
    return numbers[len(numbers) * rank // world : len(numbers) * (rank + 1) // world]


def _wait_for_others(folder: PartsFolder, numbers: Sequence[int], stop: StopRequest) -> None:
    # Not a collective: those give up after minutes, and the last part may take hours more than the first process.
    while not stop and not all(folder.has(number) for number in numbers):
        if folder.stopped():
            stop.request("a signal to another process")
        time.sleep(0.2)
