"""Set-up of a training: data, models, optimiser and folder, built and checked before its first step."""

import logging
import os
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dinov2.checkpoints.load import load_into
from dinov2.checkpoints.locate import locate_checkpoint
from dinov2.checkpoints.open import open_checkpoint
from dinov2.configs import Config
from dinov2.data.crops.collate import CropBatch
from dinov2.data.crops.config import AugmentationConfig
from dinov2.data.crops.loader import DecodedCache, crop_batches, prefetch_to
from dinov2.data.datasets.base import ImageDataset
from dinov2.data.loaders import make_dataset
from dinov2.distributed import get_global_rank, get_global_size
from dinov2.engine.memory import available_memory, free_memory
from dinov2.engine.optim import LossScaler, build_optimizer
from dinov2.engine.parallel import choose_device, choose_precision
from dinov2.engine.run_folder import RunFolder
from dinov2.engine.schedules import Schedules, total_steps
from dinov2.errors import ConfigError, DataError
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.train.limits import estimated_memory, excesses
from dinov2.train.objective import Objective
from dinov2.train.ssl_meta_arch import SSLMetaArch

__all__ = [
    "Training",
    "batches",
    "build_training",
    "load_checkpoint",
    "load_starting_weights",
    "refuse_several_processes",
]

_LOG = logging.getLogger("dinov2")
_PROBES = 8
# Part of the free memory that decoded images may take.
_MEMORY_SHARE = 0.4


@dataclass
class Training:
    """The parts of a run between `first` (steps done) and `last` (where this process stops)."""

    cfg: Config
    run: RunFolder
    device: torch.device
    precision: torch.dtype | None
    dataset: ImageDataset
    fingerprint: str
    global_batch: int
    objective: Objective
    optimizer: torch.optim.AdamW
    scaler: LossScaler | None
    schedules: Schedules
    first: int
    last: int
    total: int
    memory: int
    """Estimated peak in bytes."""
    free_memory: int | None
    """Bytes that were free before the models were built, on the device that trains."""

    @property
    def passes(self) -> float:
        """Number of times that the whole training sees each image."""
        return self.total * self.global_batch / len(self.dataset)

    def state(self) -> dict[str, Any]:
        """State for a checkpoint; random numbers are functions of seed and step and need no place in it."""
        state: dict[str, Any] = {"model": self.objective.state_dict(), "optimizer": self.optimizer.state_dict()}
        if self.scaler is not None:
            state["scaler"] = self.scaler.state_dict()
        return state


def build_training(
    cfg: Config, run: RunFolder, *, max_steps: int | None = None, resume: bool = True, refuse_excess: bool = False
) -> Training:
    """Builds and checks all parts; raises `ConfigError` or `DataError` in one sentence before anything is written.

    A new run that needs more than 70 % of the free memory, or more than 1,000 passes over the images where `max_steps`
    does not end it earlier, is refused with `refuse_excess`, and warned of without.
    """
    refuse_several_processes()
    device = choose_device(cfg.train.device)
    precision = choose_precision(_precision_name(cfg), device)
    if max_steps is not None and max_steps < 1:
        raise ConfigError(f"--max-steps is {max_steps}; write a whole number from 1")
    cfg.check_training()
    memory = estimated_memory(cfg, _check_architecture(cfg), precision)
    free = free_memory(device)
    dataset = make_dataset(cfg.train.dataset_path)
    _check_images(dataset, cfg)
    fingerprint = dataset.fingerprint()
    global_batch = cfg.train.batch_size_per_gpu * get_global_size()
    first = run.first_step(cfg, resume=resume, fingerprint=fingerprint, global_batch=global_batch)
    total = total_steps(cfg)
    passes = 0.0 if max_steps is not None else total * global_batch / len(dataset)
    excess = excesses(cfg, memory=memory, free=free, passes=passes, n_images=len(dataset), steps=total)
    if excess and not first:
        if refuse_excess:
            raise ConfigError(f"this training takes more than is meant: {excess}; add --yes to start it all the same")
        _LOG.warning(f"this training takes a lot: {excess}")

    torch.manual_seed(cfg.train.seed)
    objective = SSLMetaArch(cfg, precision=precision)
    if not first:
        load_starting_weights(objective, cfg)
    objective.to(device).train()
    scaled = precision == torch.float16 and cfg.compute_precision.grad_scaler and device.type == "cuda"
    return Training(
        cfg=cfg,
        run=run,
        device=device,
        precision=precision,
        dataset=dataset,
        fingerprint=fingerprint,
        global_batch=global_batch,
        objective=objective,
        optimizer=build_optimizer(objective.trained_parts(), cfg.optim),
        scaler=LossScaler(device=device) if scaled else None,
        schedules=Schedules.from_config(cfg, global_batch),
        first=first,
        last=total if max_steps is None else min(total, max_steps),
        total=total,
        memory=memory,
        free_memory=free,
    )


def load_checkpoint(training: Training) -> None:
    """Puts the parts where they were after `first` steps."""
    if not training.first:
        return
    store = training.run.checkpoints
    saved = store.load(training.first, {"model": training.objective.state_dict()})
    try:
        training.optimizer.load_state_dict(saved["optimizer"])
        if training.scaler is not None and "scaler" in saved:
            training.scaler.load_state_dict(saved["scaler"])
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise store.damaged(training.first, f"its optimiser state does not fit: {error!r}") from error


def batches(training: Training) -> Generator[CropBatch, None, None]:
    """The batches of steps `first` to `last`, on the training device."""
    cfg = training.cfg
    cache = _image_cache(training.dataset, cfg)
    on_device = cfg.train.augmentation_backend == "tensor" and training.device.type == "cuda"
    stream = crop_batches(
        training.dataset,
        AugmentationConfig.from_config(cfg),
        seed=cfg.train.seed,
        batch_size=cfg.train.batch_size_per_gpu,
        first_step=training.first,
        last_step=training.last,
        rank=get_global_rank(),
        world_size=get_global_size(),
        # Images in memory are there at once; workers would each fill a copy of their own.
        num_workers=0 if cache is not None else min(cfg.train.num_workers, os.cpu_count() or 1),
        cache=cache,
        augment_on=training.device if on_device else "cpu",
    )
    return prefetch_to(training.device, stream)


def refuse_several_processes() -> None:
    """Raise `ConfigError` when this process is one of several that were launched together."""
    # Without wrapping the model each process would train for itself and overwrite the others' files.
    processes = max(get_global_size(), int(os.environ.get("WORLD_SIZE", "1")))
    if processes > 1:
        raise ConfigError(
            f"{processes} processes were launched, but training runs in one process in this version; start it without "
            "torchrun, or with --nproc-per-node 1"
        )


def _precision_name(cfg: Config) -> str:
    if cfg.train.precision != "parts":
        return cfg.train.precision
    sections = [cfg.compute_precision.student, cfg.compute_precision.teacher]
    types = {
        getattr(section, part).mixed_precision.param_dtype
        for section in sections
        for part in ("backbone", "dino_head", "ibot_head")
    }
    if len(types) > 1:
        raise ConfigError(
            f"train.precision=parts takes one param_dtype for all parts of compute_precision, got {sorted(types)}"
        )
    return str(types.pop())


def _check_architecture(cfg: Config) -> nn.ModuleDict:
    """The student on the meta device."""
    try:
        with torch.device("meta"):
            return SSLMetaArch(cfg).student
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _check_images(dataset: ImageDataset, cfg: Config) -> None:
    """Looks at a few images, so that a folder of unreadable or tiny ones is refused before anything is written."""
    probes = sorted({round(i * (len(dataset) - 1) / max(_PROBES - 1, 1)) for i in range(_PROBES)})
    sizes, reason = [], ""
    for index in probes:
        try:
            sizes.append(tuple(dataset.get_tensor(index, channels=cfg.student.in_chans).shape[-2:]))
        except DataError as error:
            reason = str(error)
    patch = cfg.student.patch_size
    if sizes and all(min(size) < patch for size in sizes):
        height, width = sizes[0]
        raise DataError(
            f"the images of {cfg.train.dataset_path} are smaller than a patch ({height}x{width} pixels, patches of "
            f"{patch}); use larger images or a smaller student.patch_size"
        )
    if not sizes and len(dataset) <= _PROBES:
        raise DataError(f"no image of {cfg.train.dataset_path} can be read; the last one: {reason}")


def load_starting_weights(ssl: SSLMetaArch, cfg: Config) -> None:
    """Fill student and teacher from `student.pretrained_weights`: anything that `dinov2.load` takes as a model."""
    name = cfg.student.pretrained_weights or cfg.MODEL.WEIGHTS
    if not name:
        return
    backbone = ssl.student["backbone"]
    assert isinstance(backbone, DinoVisionTransformer)
    report = load_into(backbone, open_checkpoint(locate_checkpoint(name).path))
    ssl.copy_student_to_teacher()
    _LOG.info(f"starting from {name}: {report}")


def _image_cache(dataset: ImageDataset, cfg: Config) -> DecodedCache | None:
    if not cfg.train.cache_dataset or cfg.train.augmentation_backend != "tensor":
        return None
    cache = DecodedCache(dataset, channels=cfg.student.in_chans)
    needed, free = cache.estimate_bytes(), available_memory()
    if free is not None and needed > _MEMORY_SHARE * free:
        _LOG.info(
            f"decoded images would take {needed / 2**30:.1f} GiB of {free / 2**30:.1f} GiB free memory: "
            "they are decoded again in each epoch"
        )
        return None
    return cache
