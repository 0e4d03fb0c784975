"""Features of many images, on disk: `dinov2 embed`.

Everything is checked and planned before anything is computed. Shards of the images (`dinov2.encode.store.shards`) are
written one after the other, by one process or several, and joined at the end.
"""

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

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
from dinov2.encode.store.tables import TABLE_FORMATS, TableFormat, format_from_suffix, require_pyarrow
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
    """Anything that `dinov2.load` takes."""
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
    """Result of an embedding, or with `dry_run` its plan."""

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
    if not distributed.is_enabled():
        distributed.enable()
    plan = _plan(source, EmbedConfig(**options), progress)
    config, images, shards = plan.config, plan.images, plan.shards
    columns, row_bytes = plan.columns()
    report = EmbedReport(plan.target, len(images), len(images) * row_bytes, len(shards), columns)
    if config.dry_run:
        return report
    folder, request, about = ShardFolder(plan.target, plan.table_format), plan.request(), plan.about(source)
    if not config.overwrite:
        _keep_digest(request, read_manifest(plan.target) or read_manifest(folder.path), plan.model)
    with disk_full_as_error(plan.target), ExitStack() as lock:
        kept = _prepare(folder, request, about, lock, overwrite=config.overwrite)
        if kept is None:
            done = read_manifest(plan.target) or {}
            report.rows, report.unreadable = done.get("rows", 0), done.get("unreadable", 0)
            report.parts_kept, report.files = len(shards), complete_output(plan.target)
            return report
        report.parts_kept = len(kept)
        began = time.monotonic()
        with StopRequest() as stop:
            _write_shards(plan, folder, request, kept, stop, say, progress("embedding"))
            if distributed.is_main_process():
                _wait_for_others(folder, range(len(shards)), stop)
        report.seconds = time.monotonic() - began
        report.stopped_by, report.peak_memory = stop.reason, peak_memory(plan.model.device)
        if stop or not distributed.is_main_process():
            return report
        finished = folder.finished()
        report.computed = sum(len(shards[number]) for number in finished if number not in kept)
        if lost := [number for number in range(len(shards)) if number not in finished]:
            raise DinoError(f"part {lost[0]} of {folder.path} is damaged or gone; give the same command again")
        ordered = [finished[number] for number in range(len(shards))]
        merge = "never" if not plan.target.suffix else config.merge
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
    """Place and format of the output, from its name and the requested format.

    Raises ConfigError when they say nothing or disagree, MissingDependency for a format that nothing here can write.
    """
    if not str(output):
        raise ConfigError("the output has no name; write for example -o features.parquet")
    path = Path(output).expanduser()
    by_suffix = format_from_suffix(path)
    if "safetensors" in (table_format, path.suffix.lower().removeprefix(".")):
        raise ConfigError(f"tables in safetensors are no longer written; write {path.stem}.npz or .parquet instead")
    named = next((name for name in TABLE_FORMATS if name == table_format), None)
    if table_format is not None and named is None:
        raise ConfigError(f"no format is called {table_format!r}; choose one of {', '.join(TABLE_FORMATS)}")
    if by_suffix is not None and named not in (None, by_suffix):
        raise ConfigError(f"{path} ends like {by_suffix}, but --format says {table_format}; leave one out")
    kind = by_suffix or named
    if kind is None:
        kinds = ", ".join(f".{name}" for name in TABLE_FORMATS)
        raise ConfigError(f"the suffix of {path} names no format; end it in one of {kinds}, or add --format")
    if kind == "parquet":
        require_pyarrow()  # its absence would be noticed after hours otherwise
    return kind, path


def resolve_spec(config: EmbedConfig, loaded: Pretrained) -> EmbeddingSpec:
    """Columns to keep, blocks counted from 0. Raises ConfigError for what the model does not have."""
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


@dataclass(frozen=True)
class _Plan:
    """What is embedded, and how."""

    config: EmbedConfig
    images: ImageDataset
    labelled: bool
    model: Pretrained
    spec: EmbeddingSpec
    transform: EvalTransform
    table_format: TableFormat
    target: Path

    def columns(self) -> tuple[list[str], int]:
        """Names of the columns, patches included, and about how many bytes an image takes in them."""
        width, side = self.model.embed_dim, self.transform.crop_size
        kinds = {"cls": 4 * width}
        if self.spec.registers:
            kinds["registers"] = 4 * width * self.model.num_register_tokens
        if self.spec.mean:
            kinds["mean"] = 4 * width
        if self.spec.patches:
            kinds["patches"] = 2 * width * math.prod(self.model.patch_grid(side, side))
        prefixes = ["", *(f"layer{layer}_" for layer in self.spec.layers)]
        names = ["index", "path", "height", "width", *(["label"] if self.labelled else [])]
        names += [f"{prefix}{kind}" for prefix in prefixes for kind in kinds]
        return names, 64 + len(prefixes) * sum(kinds.values())

    @property
    def rows(self) -> int:
        """Images of a shard."""
        n_images, size = len(self.images), self.config.batch_size
        return self.config.part_rows or rows_per_shard(n_images, self.columns()[1], size)

    @cached_property
    def shards(self) -> list[range]:
        """Image numbers of each shard."""
        n_images, rows = len(self.images), self.rows
        return [range(first, min(first + rows, n_images)) for first in range(0, n_images, rows)]

    def batches(self, number: int) -> list[range]:
        """Image numbers of each batch of a shard."""
        shard, size = self.shards[number], self.config.batch_size
        return [shard[first : first + size] for first in range(0, len(shard), size)]

    def request(self) -> dict[str, Any]:
        """Request that the bytes of the output depend on; a continued one must be the same."""
        model, transform, spec = self.model, self.transform, self.spec
        stride = {"stride": model.stride} if model.stride != model.patch_size else {}
        return {
            "source": {"images": len(self.images), "fingerprint": self.images.fingerprint()},
            "model": {"name": model.name, "sha256": model.digest, "embed_dim": model.embed_dim, **stride},
            "transform": {**transform.describe(), "fit": transform.fit, "size": transform.crop_size},
            "precision": str(model.autocast_dtype or "float32").removeprefix("torch."),
            **asdict(spec),
            "format": self.table_format,
            "batch_size": self.config.batch_size,
            "part_rows": self.rows,
            "extractor": EXTRACTOR_VERSION,
        }

    def about(self, source: str | Sequence[str]) -> dict[str, object]:
        """What the manifest says besides: other places and versions give the same features."""
        model = Path(self.config.model).expanduser()
        return {
            "source": source[0] if not isinstance(source, str) and len(source) == 1 else source,
            "root": getattr(self.images, "root", None),
            "model": str(model.resolve()) if model.exists() else str(self.config.model),
            "depth": self.model.table.get("depth"),
            "class_names": self.images.class_names,
            "versions": environment(),
        }


def _plan(source: str | Sequence[str], config: EmbedConfig, progress: ShowProgress) -> _Plan:
    """Check everything that can be wrong before anything is computed, the model last."""
    if config.batch_size < 1:
        raise ConfigError(f"the batch is {config.batch_size}; write 1 or more")
    table_format, target = target_format(config.output, config.table_format)
    images = image_source(source)
    _check_place(target, images, writes_npy=config.patches or table_format == "npy")
    model = load(
        config.model, device=config.device, precision=config.precision, stride=config.stride, progress=progress
    )
    spec, transform = resolve_spec(config, model), _transform(config, model)
    return _Plan(config, images, images.get_targets() is not None, model, spec, transform, table_format, target)


def _write_shards(
    plan: _Plan,
    folder: ShardFolder,
    request: Mapping[str, object],
    kept: Mapping[int, Shard],
    stop: StopRequest,
    say: Callable[[str], None],
    show: Callable[[int, int], None] | None,
) -> None:
    """Write this process's range of the shards that are missing; after a signal no further one is begun."""
    missing = [number for number in range(len(plan.shards)) if number not in kept]
    rank, world = distributed.get_global_rank(), distributed.get_global_size()
    numbers = missing[len(missing) * rank // world : len(missing) * (rank + 1) // world]
    done, announced = sum(len(plan.shards[number]) for number in kept), False
    batches = decoded_batches(
        plan.images,
        (batch for number in numbers for batch in plan.batches(number)),
        transform=plan.transform,
        channels=plan.model.in_chans,
        threads=plan.config.threads or _threads(plan.model),
        pin_memory=plan.model.device.type == "cuda",
    )
    with closing(batches):
        for number in numbers:
            if stop:
                break
            with ShardWriter(folder, number, request) as shard:
                for _ in plan.batches(number):
                    batch = next(batches)
                    shard.add(_encode(plan, batch), batch.unreadable)
                    # With several processes, judged by this one.
                    done += (len(batch.indices) + len(batch.unreadable)) * world
                    if show is not None and distributed.is_main_process():
                        show(min(len(plan.images), done), len(plan.images))
                    if stop and not announced:
                        say(f"{stop.reason}: finishing the part at hand; a second Ctrl-C ends at once and loses it")
                        announced = True
    if stop:
        folder.stop()


def _encode(plan: _Plan, batch: DecodedBatch) -> dict[str, np.ndarray]:
    """The columns of a batch; none when no image of it is readable."""
    if not batch.indices:
        return {}
    sizes = np.array(batch.sizes, dtype=np.int32)
    columns = {
        "index": np.array(batch.indices, dtype=np.int64),
        "path": np.array([_shown_path(plan.images, index) for index in batch.indices], dtype=np.str_),
        "height": sizes[:, 0],
        "width": sizes[:, 1],
    }
    if plan.labelled:
        columns["label"] = np.array(batch.targets, dtype=np.int64)
    layers = plan.spec.layers
    encoded = encode_batch(lambda pixels: plan.spec.columns(plan.model.encode(pixels, layers=layers)), batch)
    return columns | {name: tensor.float().cpu().numpy() for name, tensor in encoded.items()}


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


def _threads(loaded: Pretrained) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    own = max(1, cores // distributed.get_local_size())
    # On a CPU the model wants the cores itself, and a decoded image costs it ten times what it costs the decoder.
    return min(own if loaded.device.type == "cuda" else max(1, own // 4), 16)


def _keep_digest(request: dict[str, Any], begun: Mapping[str, Any] | None, loaded: Pretrained) -> None:
    """Lets what was begun with a digest of the weight files, as manifests once had it, go on under that digest."""
    model = {} if begun is None else begun["request"].get("model")
    digest = model.get("sha256") if isinstance(model, dict) else None
    if isinstance(digest, str) and loaded.has_digest(digest):
        request["model"]["sha256"] = digest


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


def _wait_for_others(folder: ShardFolder, numbers: Sequence[int], stop: StopRequest) -> None:
    # Not a collective: those give up after minutes, and the last shard may take hours more than the first process.
    while not stop and not all(folder.has(number) for number in numbers):
        if folder.stopped():
            stop.request("a signal to another process")
        time.sleep(0.2)
