"""Features of many images, on disk: `dinov2 embed`.

Everything is checked and planned before anything is computed. Shards of the images (`dinov2.encode.store.shards`) are
written one after the other, by one process or several, and joined at the end.
"""

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from dinov2 import distributed
from dinov2.checkpoints.locate import ShowProgress
from dinov2.data.datasets.base import ImageDataset
from dinov2.data.datasets.files import Folder, ImageFiles
from dinov2.data.decoding import IMAGE_EXTENSIONS
from dinov2.data.eval_transform import EvalTransform, Fit
from dinov2.data.loaders import make_dataset
from dinov2.encode.store.cache import EXTRACTOR_VERSION
from dinov2.encode.store.merge import Merge, begin, complete_output, finish
from dinov2.encode.store.shards import Shard, ShardFolder, ShardWriter, disk_full_as_error, read_manifest
from dinov2.encode.store.tables import FORMATS, TableFormat, format_from_suffix, require_pyarrow
from dinov2.encode.stream import DecodedBatch, EmbeddingSpec, decoded_batches, encode_batch
from dinov2.engine.progress import peak_memory
from dinov2.engine.signals import StopRequest
from dinov2.errors import ConfigError, DataError, DinoError
from dinov2.eval.result import environment
from dinov2.pretrained import Pretrained, load
from dinov2.whole_files import escape_name

__all__ = ["EmbedConfig", "EmbedReport", "embed", "image_source", "resolve_spec", "rows_per_shard", "target_format"]

_MOST_ROWS = 8192  # of a shard
_LEAST_ROWS = 256
_SHARDS = 16  # that a small set is cut into, so that a kill costs little
_MOST_BYTES = 512 << 20  # of a shard


@dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    """Configuration of `embed`."""

    model: str | os.PathLike[str]
    """Whatever `dinov2.load` knows."""
    output: str | os.PathLike[str]
    """A file that ends in .parquet, .npz or .npy; or any name, with a format."""
    table_format: TableFormat | None = None
    """Format of a name without suffix, which becomes a folder of parts."""
    registers: bool = False
    mean: bool = False
    patches: bool = False
    """All patch tokens, float16, in .npy files of their own."""
    layers: Sequence[int] = ()
    """Blocks of which the same is kept besides the last one; negative numbers count from the end."""
    size: int | None = None
    fit: Fit | None = None
    max_tokens: int | None = None
    stride: int | None = None
    """Pixels between patches; None is the patch size."""
    batch_size: int = 32
    threads: int | None = None
    """Decoding threads of this process; None chooses by device and cores."""
    part_rows: int | None = None
    """Images of a part; None chooses."""
    merge: Merge = "auto"
    overwrite: bool = False
    dry_run: bool = False
    device: str = "auto"
    precision: str = "auto"


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
    say: Callable[[str], None] = lambda text: None,
    progress: ShowProgress = lambda label: None,
    **options: Any,
) -> EmbedReport:
    """Write the features of all readable images of `source` to a file or a folder, in their order.

    Repeated with the same arguments it goes on where it was stopped or killed. Started by torchrun, the processes share
    the work, and the main one joins it. `options` are the fields of `EmbedConfig`, of which `model` and `output` are
    needed; `source` is what `image_source` takes.

    Raises:
        DataError: there are no images, none is readable, or `output` was begun with other settings (they are named).
        ConfigError: options contradict each other, or `output` cannot be written, or is being written by another call.
        WeightsError: there is no such model.
        DinoError: the disk is full; what was finished is kept.
    """
    config = EmbedConfig(**options)
    if not distributed.is_enabled():
        distributed.enable()
    if config.batch_size < 1:
        raise ConfigError(f"the batch is {config.batch_size}; write 1 or more")
    table_format, target = target_format(config.output, config.table_format)
    images = image_source(source)
    _check_place(target, images, writes_npy=config.patches or table_format == "npy")
    loaded = load(
        config.model, device=config.device, precision=config.precision, stride=config.stride, progress=progress
    )
    spec, transform = resolve_spec(config, loaded), _transform(config, loaded)
    columns, row_bytes = _plan_columns(loaded, transform, spec, labelled=images.get_targets() is not None)
    rows_each = config.part_rows or rows_per_shard(len(images), row_bytes, config.batch_size)
    shards = [range(first, min(first + rows_each, len(images))) for first in range(0, len(images), rows_each)]
    report = EmbedReport(target, len(images), len(images) * row_bytes, len(shards), columns)
    if config.dry_run:
        return report

    request = _request(images, loaded, transform, spec, table_format, config.batch_size, rows_each)
    about = _about(source, images, loaded, config.model)
    folder = ShardFolder(target, table_format)
    if not config.overwrite:
        _keep_digest(request, read_manifest(target) or read_manifest(folder.path), loaded)
    with disk_full_as_error(target), ExitStack() as lock:
        kept = _prepare(folder, request, about, lock, overwrite=config.overwrite)
        if kept is None:
            done = read_manifest(target) or {}
            report.rows, report.unreadable = done.get("rows", 0), done.get("unreadable", 0)
            report.parts_kept, report.files = len(shards), complete_output(target)
            return report
        report.parts_kept = len(kept)
        began = time.monotonic()
        with StopRequest() as stop:
            missing = [number for number in range(len(shards)) if number not in kept]
            job = _Job(folder, images, loaded, transform, spec, shards, config, request, stop)
            job.run(_share(missing), sum(len(shards[number]) for number in kept), say, progress)
            if distributed.is_main_process():
                _wait_for_others(folder, range(len(shards)), stop)
        report.seconds = time.monotonic() - began
        report.stopped_by, report.peak_memory = stop.reason, peak_memory(loaded.device)
        if stop or not distributed.is_main_process():
            return report
        finished = folder.finished()
        report.computed = sum(len(shards[number]) for number in finished if number not in kept)
        if lost := [number for number in range(len(shards)) if number not in finished]:
            raise DinoError(f"part {lost[0]} of {folder.path} is damaged or gone; give the same command again")
        ordered = [finished[number] for number in range(len(shards))]
        merge = "never" if not target.suffix else config.merge
        report.files = finish(folder, ordered, merge=merge, manifest={"schema": 1, "request": request, **about})
    report.rows = sum(shard.rows for shard in ordered)
    report.unreadable = sum(len(shard.unreadable) for shard in ordered)
    return report


def image_source(source: str | Sequence[str]) -> ImageDataset:
    """The images that a user named: one folder, list, glob or data set string, or image files one by one."""
    names = [source] if isinstance(source, str) else list(source)
    if not names or not names[0]:
        raise DataError("no images were named; give a folder, a list, a pattern or image files")
    if len(names) == 1 and not (os.path.isfile(names[0]) and Path(names[0]).suffix.lower() in IMAGE_EXTENSIONS):
        return make_dataset(names[0])
    if folders := [name for name in names if os.path.isdir(name)]:
        raise DataError(f"{folders[0]} is a folder among {len(names)} sources; give one folder, or image files alone")
    return ImageFiles(names)


def target_format(output: str | os.PathLike[str], table_format: str | None) -> tuple[TableFormat, Path]:
    """How and where the output is stored, from its name and the format asked for.

    Raises ConfigError when they say nothing or disagree, MissingDependency for a format that nothing here can write.
    """
    if not str(output):
        raise ConfigError("the output has no name; write for example -o features.parquet")
    path = Path(output).expanduser()
    by_suffix = format_from_suffix(path)
    if "safetensors" in (table_format, path.suffix.lower().removeprefix(".")):
        raise ConfigError(f"tables in safetensors are no longer written; write {path.stem}.npz or .parquet instead")
    named = next((name for name in FORMATS if name == table_format), None)
    if table_format is not None and named is None:
        raise ConfigError(f"no format is called {table_format!r}; choose one of {', '.join(FORMATS)}")
    if by_suffix is not None and named not in (None, by_suffix):
        raise ConfigError(f"{path} ends like {by_suffix}, but --format says {table_format}; leave one out")
    kind = by_suffix or named
    if kind is None:
        kinds = ", ".join(f".{name}" for name in FORMATS)
        raise ConfigError(f"the suffix of {path} names no format; end it in one of {kinds}, or add --format")
    if kind == "parquet":
        require_pyarrow()  # its absence would be noticed after hours otherwise
    return kind, path


def resolve_spec(config: EmbedConfig, loaded: Pretrained) -> EmbeddingSpec:
    """What is kept, blocks counted from 0. Raises ConfigError for what the model does not have."""
    if config.registers and not loaded.num_register_tokens:
        raise ConfigError(f"{loaded.name} has no registers to keep; leave --registers out, or take a model with them")
    blocks = []
    for layer in config.layers:
        depth = loaded.n_blocks
        if not -depth <= layer < depth:
            raise ConfigError(f"there is no block {layer}; this model has blocks 0 to {depth - 1}")
        blocks.append(layer % depth)
    return EmbeddingSpec(config.registers, config.mean, config.patches, tuple(dict.fromkeys(blocks)))


def rows_per_shard(n_images: int, row_bytes: int, batch_size: int) -> int:
    """A multiple of the batch that depends on what is embedded alone: the shards must be the same on any machine."""
    rows = min(_MOST_ROWS, max(_LEAST_ROWS, -(-n_images // _SHARDS)), max(1, _MOST_BYTES // row_bytes))
    return max(1, rows // batch_size) * batch_size


@dataclass
class _Job:
    """What is needed to write shards."""

    folder: ShardFolder
    images: ImageDataset
    model: Pretrained
    transform: EvalTransform
    spec: EmbeddingSpec
    shards: Sequence[range]
    """Image numbers of each shard."""
    config: EmbedConfig
    request: Mapping[str, object]
    stop: StopRequest

    def run(self, numbers: Sequence[int], kept_images: int, say: Callable[[str], None], progress: ShowProgress) -> None:
        """Write the shards of the given numbers; after a signal no further one is begun."""
        show, own, world = progress("embedding"), 0, distributed.get_global_size()
        targets, announced = self.images.get_targets(), False
        batches = decoded_batches(
            self.images,
            (batch for number in numbers for batch in self._batches(number)),
            transform=self.transform,
            channels=self.model.in_chans,
            threads=self.config.threads or _threads(self.model),
            pin_memory=self.model.device.type == "cuda",
        )
        with closing(batches):
            for number in numbers:
                if self.stop:
                    break
                with ShardWriter(self.folder, number, self.request) as shard:
                    for _ in self._batches(number):
                        batch = next(batches)
                        shard.add(self._columns(batch, targets is not None), batch.unreadable)
                        own += len(batch.indices) + len(batch.unreadable)
                        if show is not None and distributed.is_main_process():
                            # With several processes, judged by this one.
                            show(min(len(self.images), kept_images + own * world), len(self.images))
                        if self.stop and not announced:
                            say(
                                f"{self.stop.reason}: finishing the part at hand; a second Ctrl-C ends at once and "
                                "loses it"
                            )
                            announced = True
        if self.stop:
            self.folder.stop()

    def _batches(self, number: int) -> list[range]:
        shard, size = self.shards[number], self.config.batch_size
        return [shard[first : first + size] for first in range(0, len(shard), size)]

    def _columns(self, batch: DecodedBatch, labelled: bool) -> dict[str, np.ndarray]:
        if not batch.indices:
            return {}
        sizes = np.array(batch.sizes, dtype=np.int32)
        columns = {
            "index": np.array(batch.indices, dtype=np.int64),
            "path": np.array([_shown_path(self.images, index) for index in batch.indices], dtype=np.str_),
            "height": sizes[:, 0],
            "width": sizes[:, 1],
        }
        if labelled:
            columns["label"] = np.array(batch.targets, dtype=np.int64)
        encoded = encode_batch(self._encode, batch)
        return columns | {name: tensor.float().cpu().numpy() for name, tensor in encoded.items()}

    def _encode(self, pixels: Tensor) -> dict[str, Tensor]:
        return self.spec.columns(self.model.encode(pixels, layers=self.spec.layers))


def _shown_path(images: ImageDataset, index: int) -> str:
    """The path of an image, below the root of its data set where it has one, as `escape_name` writes it."""
    path, root = images.path_of(index), getattr(images, "root", None)
    return escape_name(path if root is None else path.removeprefix(os.path.join(root, "")))


def _check_place(target: Path, images: ImageDataset, *, writes_npy: bool) -> None:
    """Raises ConfigError when nothing can be written there, or what is written would become images."""
    parent = next(folder for folder in target.absolute().parents if folder.exists())
    if not parent.is_dir():
        raise ConfigError(f"the output {target} cannot be made, because {parent} is a file; choose another")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ConfigError(f"nothing can be written to {parent} (Permission denied); choose another output")
    if writes_npy and isinstance(images, Folder) and target.resolve().is_relative_to(Path(images.root).resolve()):
        raise ConfigError(
            f"the output {target} lies in the folder of the images, where its .npy files would be taken for images; "
            "choose a place outside of it"
        )


def _transform(config: EmbedConfig, loaded: Pretrained) -> EvalTransform:
    """The model's own transform, or the same with another size, fit or largest number of tokens."""
    size, patch = config.size, loaded.patch_size
    if size is None and config.fit is None and config.max_tokens is None:
        return loaded.transform
    if size is not None and size % patch:
        near = max(1, round(size / patch)) * patch
        raise ConfigError(f"the size {size} is no multiple of the model's patch of {patch} pixels; write {near}")
    return loaded.transform_with(size=size, fit=config.fit, max_tokens=config.max_tokens)


def _plan_columns(
    loaded: Pretrained, transform: EvalTransform, spec: EmbeddingSpec, *, labelled: bool
) -> tuple[list[str], int]:
    """Names of the columns, patches included, and about how many bytes an image takes in them."""
    width, grid = loaded.embed_dim, math.prod(loaded.patch_grid(transform.crop_size, transform.crop_size))
    kinds = {"cls": 4 * width}
    if spec.registers:
        kinds["registers"] = 4 * width * loaded.num_register_tokens
    if spec.mean:
        kinds["mean"] = 4 * width
    if spec.patches:
        kinds["patches"] = 2 * width * grid
    prefixes = ["", *(f"layer{layer}_" for layer in spec.layers)]
    names = ["index", "path", "height", "width", *(["label"] if labelled else [])]
    names += [f"{prefix}{kind}" for prefix in prefixes for kind in kinds]
    return names, 64 + len(prefixes) * sum(kinds.values())


def _threads(loaded: Pretrained) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    own = max(1, cores // distributed.get_local_size())
    # On a CPU the model wants the cores itself, and a decoded image costs it ten times what it costs the decoder.
    return min(own if loaded.device.type == "cuda" else max(1, own // 4), 16)


def _request(
    images: ImageDataset,
    loaded: Pretrained,
    transform: EvalTransform,
    spec: EmbeddingSpec,
    table_format: TableFormat,
    batch_size: int,
    rows_each: int,
) -> dict[str, Any]:
    """Everything that the bytes of the output depend on: who goes on with it must ask for the same."""
    stride = {"stride": loaded.stride} if loaded.stride != loaded.patch_size else {}
    return {
        "source": {"images": len(images), "fingerprint": images.fingerprint()},
        "model": {"name": loaded.name, "sha256": loaded.digest, "embed_dim": loaded.embed_dim, **stride},
        "transform": {**transform.describe(), "fit": transform.fit, "size": transform.crop_size},
        "precision": str(loaded.autocast_dtype or "float32").removeprefix("torch."),
        "registers": spec.registers,
        "mean": spec.mean,
        "patches": spec.patches,
        "layers": list(spec.layers),
        "format": table_format,
        "batch_size": batch_size,
        "part_rows": rows_each,
        "extractor": EXTRACTOR_VERSION,
    }


def _keep_digest(request: dict[str, Any], begun: Mapping[str, Any] | None, loaded: Pretrained) -> None:
    """Lets what was begun with a digest of the weight files, as manifests once had it, go on under that digest."""
    model = {} if begun is None else begun["request"].get("model")
    digest = model.get("sha256") if isinstance(model, dict) else None
    if isinstance(digest, str) and loaded.has_digest(digest):
        request["model"]["sha256"] = digest


def _about(
    source: str | Sequence[str], images: ImageDataset, loaded: Pretrained, model: str | os.PathLike[str]
) -> dict[str, object]:
    names = [source] if isinstance(source, str) else list(source)
    existing = Path(model).expanduser()
    return {
        "source": names[0] if len(names) == 1 else names,
        "root": getattr(images, "root", None),
        "model": str(existing.resolve()) if existing.exists() else str(model),
        "depth": loaded.table.get("depth"),
        "class_names": images.class_names,
        "versions": environment(),
    }


def _prepare(
    folder: ShardFolder, request: Mapping[str, object], about: Mapping[str, object], lock: ExitStack, *, overwrite: bool
) -> dict[int, Shard] | None:
    """Finished shards, the same in every process; None when the output is complete. `lock` keeps other calls away."""
    outcome: Any = None
    if distributed.is_main_process():
        try:
            lock.enter_context(folder.locked())
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


def _wait_for_others(folder: ShardFolder, numbers: Sequence[int], stop: StopRequest) -> None:
    # Not a collective: those give up after minutes, and the last shard may take hours more than the first process.
    while not stop and not all(folder.has(number) for number in numbers):
        if folder.stopped():
            stop.request("a signal to another process")
        time.sleep(0.2)
