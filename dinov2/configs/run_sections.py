"""Configuration sections of a run: the run itself, the optimiser, the crops, evaluation on the way.

The sentence under each field is its documentation; `dinov2.configs.describe` reads it from this source. An "epoch" is
`train.OFFICIAL_EPOCH_LENGTH` steps, whatever the size of the data set. Derived values (the scaled learning rate, the
number of steps) are functions of `dinov2.engine.schedules` and never written back.
"""

import re
from dataclasses import dataclass, field
from typing import Literal, get_args

from dinov2.configs.checks import (
    MOST_WORKERS,
    at_least,
    at_most,
    check_positive,
    increasing_fractions,
    one_of,
    shown,
    unit_interval,
)
from dinov2.errors import ConfigError

__all__ = [
    "TRAINING_EVALUATIONS",
    "AugmentationBackend",
    "Centering",
    "CropsConfig",
    "EvaluationConfig",
    "OptimConfig",
    "ScalingRule",
    "TrainConfig",
    "TrainPrecision",
]

Centering = Literal["centering", "sinkhorn_knopp"]
TrainPrecision = Literal["auto", "fp32", "bf16", "fp16", "parts"]
AugmentationBackend = Literal["pil", "tensor"]
ScalingRule = Literal["sqrt_wrt_1024", "linear_wrt_256", "none"]

TRAINING_EVALUATIONS = ("knn", "logistic", "linear")
"""Evaluations that a training can run on the way."""

_DEVICE = re.compile(r"auto|cpu|(cuda|mps)(:\d+)?")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """`train`: data, batch, length of an epoch, device and what is written when."""

    batch_size_per_gpu: int = 64
    """Images a step on each process."""

    dataset_path: str = "ImageNet:split=TRAIN"
    """Images to train on: a folder, or a data set in the form Name:key=value."""

    output_dir: str = "."
    """Folder of the run; the command line's --output-dir wins."""

    saveckp_freq: int = 20
    """Without effect, here as in the release; train.checkpoint_every is what sets how often a run is saved."""

    seed: int = 0
    """Seed of weights, order of images, crops and masks."""

    num_workers: int = 10
    """Loader processes on each training process; 0 loads in the training process."""

    OFFICIAL_EPOCH_LENGTH: int = 1250
    """Steps in what the schedules call an epoch."""

    cache_dataset: bool = True
    """Keep decoded images in memory when they fit; for the tensor backend of the augmentation only."""

    centering: Centering = "centering"
    """Rule from the teacher's scores to assignments: a running centre, or Sinkhorn-Knopp over the batch."""

    log_every: int = 10
    """Steps between two rows of training_metrics.json."""

    checkpoint_every: int = 0
    """Steps between two checkpoints; 0 for every three epochs, as the release."""

    keep_checkpoints: int = 3
    """Newest checkpoints that are kept."""

    precision: TrainPrecision = "auto"
    """Number format of the forward pass; auto is bf16 where the hardware is fast at it, parts is compute_precision."""

    device: str = "auto"
    """Device to train on: auto, cpu, cuda, cuda:<number> or mps."""

    max_skipped_steps: int = 5
    """Steps in a row with a non-finite loss or gradient after which the run stops."""

    allow_data_change: bool = False
    """Resume even though the data set is no longer the one the run began with."""

    num_threads: int = 0
    """Threads of PyTorch's CPU operators; 0 takes one or all, whichever is faster at the start."""

    augmentation_backend: AugmentationBackend = "pil"
    """Backend of augmentation: pil in the loader's workers, exactly as the release, or tensor for a batch at a time."""

    def __post_init__(self) -> None:
        one_of("train.centering", self.centering, get_args(Centering))
        one_of("train.precision", self.precision, get_args(TrainPrecision))
        one_of("train.augmentation_backend", self.augmentation_backend, get_args(AugmentationBackend))
        at_least("train.batch_size_per_gpu", self.batch_size_per_gpu, 1)
        at_least("train.OFFICIAL_EPOCH_LENGTH", self.OFFICIAL_EPOCH_LENGTH, 1)
        at_least("train.num_workers", self.num_workers, 0, meaning="0 loads in the training process")
        at_least("train.log_every", self.log_every, 1)
        at_least("train.checkpoint_every", self.checkpoint_every, 0, meaning="0 for every three epochs")
        at_least("train.keep_checkpoints", self.keep_checkpoints, 1)
        at_least("train.max_skipped_steps", self.max_skipped_steps, 1)
        at_least("train.num_threads", self.num_threads, 0, meaning="0 for the faster of one and all")
        at_most("train.num_workers", self.num_workers, MOST_WORKERS)
        at_most("train.num_threads", self.num_threads, MOST_WORKERS)
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"train.seed is {self.seed}; write a whole number from 0 to below 2**63")
        if not _DEVICE.fullmatch(self.device):
            raise ConfigError(f"train.device is {self.device!r}; write auto, cpu, cuda, cuda:<number> or mps")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """`optim`: AdamW and the schedules of what it is given each step."""

    epochs: int = 100
    """Length of the run, in epochs of train.OFFICIAL_EPOCH_LENGTH steps."""

    weight_decay: float = 0.04
    """Weight decay at the first step."""

    weight_decay_end: float = 0.4
    """Weight decay at the last step, reached along a cosine."""

    base_lr: float = 0.004
    """Peak learning rate at the batch size that optim.scaling_rule refers to."""

    lr: float = 0.0
    """Without effect: the release writes the scaled rate here, so a value is read, kept and not used."""

    warmup_epochs: int = 10
    """Epochs in which the learning rate grows linearly from 0."""

    min_lr: float = 1.0e-06
    """Learning rate at the last step; not scaled."""

    clip_grad: float = field(default=3.0, metadata={"null": 0.0})
    """Largest gradient norm of the backbone and of each head, clipped one by one; 0 for no clipping."""

    freeze_last_layer_epochs: int = 1
    """Epochs in which the last layers of the heads keep their learning rate at 0."""

    scaling_rule: ScalingRule = "sqrt_wrt_1024"
    """Rule from base_lr to the peak rate for a global batch: times sqrt(batch / 1024), times batch / 256, or as is."""

    patch_embed_lr_mult: float = 0.2
    """Factor on the learning rate of the patch embedding."""

    layerwise_decay: float = 0.9
    """Factor on the learning rate for each block further from the output."""

    adamw_beta1: float = 0.9
    """AdamW's decay of the running mean of gradients."""

    adamw_beta2: float = 0.999
    """AdamW's decay of the running mean of squared gradients."""

    def __post_init__(self) -> None:
        one_of("optim.scaling_rule", self.scaling_rule, get_args(ScalingRule))
        at_least("optim.epochs", self.epochs, 1)
        for name in ("weight_decay", "weight_decay_end", "base_lr", "min_lr", "patch_embed_lr_mult"):
            at_least(f"optim.{name}", getattr(self, name), 0)
        at_least("optim.clip_grad", self.clip_grad, 0, meaning="0 for no clipping")
        check_positive("optim.layerwise_decay", self.layerwise_decay)
        unit_interval("optim.layerwise_decay", self.layerwise_decay)
        for name in ("adamw_beta1", "adamw_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"optim.{name} is {getattr(self, name)}; write a number from 0 to below 1")
        # Warm-up and frozen last layer run at the same time, so each alone has to fit into the run.
        for name in ("warmup_epochs", "freeze_last_layer_epochs"):
            at_least(f"optim.{name}", getattr(self, name), 0, meaning="0 for none")
            if getattr(self, name) > self.epochs:
                raise ConfigError(
                    f"optim.{name} is {getattr(self, name)}, more than the {self.epochs} of optim.epochs; "
                    f"write at most {self.epochs}, or a longer run"
                )


@dataclass(frozen=True, kw_only=True)
class CropsConfig:
    """`crops`: the views of an image and how they are disturbed."""

    global_crops_scale: tuple[float, float] = (0.32, 1.0)
    """Smallest and largest share of the image's area in one of the two global crops."""

    local_crops_number: int = 8
    """Small crops per image; 0 trains on the global crops alone."""

    local_crops_scale: tuple[float, float] = (0.05, 0.32)
    """Smallest and largest share of the image's area in a local crop."""

    global_crops_size: int = 224
    """Side of a global crop in pixels, a multiple of the patch size."""

    local_crops_size: int = 96
    """Side of a local crop in pixels, a multiple of the patch size."""

    horizontal_flip_p: float = 0.5
    """Probability that a crop is mirrored."""

    color_jitter_p: float = 0.8
    """Probability that brightness, contrast, saturation and hue of a crop change."""

    color_jitter_strength: float = 1.0
    """Factor on the ranges of these changes; 1 is the release's."""

    grayscale_p: float = 0.2
    """Probability that a crop becomes grey."""

    blur_p: tuple[float, float, float] = (0.0, 0.9, 0.5)
    """Probabilities that the first global, the second global and a local crop are blurred: what the release does."""

    solarize_p: float = 0.2
    """Probability that the second global crop is solarised."""

    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """Mean that is subtracted from each channel (one number, or one per channel), on values from 0 to 1."""

    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    """Standard deviation by which each channel is divided (one number, or one per channel)."""

    def __post_init__(self) -> None:
        at_least("crops.local_crops_number", self.local_crops_number, 0, meaning="0 for no local crops")
        at_least("crops.global_crops_size", self.global_crops_size, 1)
        at_least("crops.local_crops_size", self.local_crops_size, 1)
        at_least("crops.color_jitter_strength", self.color_jitter_strength, 0, meaning="1 is the release's")
        increasing_fractions("crops.global_crops_scale", self.global_crops_scale, zero=False)
        increasing_fractions("crops.local_crops_scale", self.local_crops_scale, zero=False)
        for name in ("horizontal_flip_p", "color_jitter_p", "grayscale_p", "solarize_p"):
            unit_interval(f"crops.{name}", getattr(self, name))
        if len(self.blur_p) != 3 or not all(0 <= p <= 1 for p in self.blur_p):
            raise ConfigError(f"crops.blur_p is {shown(self.blur_p)}; write three numbers from 0 to 1")
        if not all(abs(value) <= 1e6 for value in self.mean):  # false of NaN as well
            raise ConfigError(f"crops.mean is {shown(self.mean)}; write finite numbers, on values from 0 to 1")
        if not all(1e-6 <= deviation <= 1e6 for deviation in self.std):
            raise ConfigError(f"crops.std is {shown(self.std)}; write finite numbers above 0")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """`evaluation`: what is exported and measured while a run goes on."""

    eval_period_iterations: int = 12500
    """Steps between two exports of the teacher, with evaluations if data sets are named; 0 for the end only."""

    knn_train_dataset: str = ""
    """Labelled images to learn from: the k-NN's neighbours, a classifier's training set; empty for no evaluation."""

    knn_val_dataset: str = ""
    """Labelled images that are classified; empty for no evaluation during training."""

    knn_k: int = 20
    """Neighbours that vote."""

    knn_temperature: float = 0.07
    """Temperature of the votes: a neighbour weighs exp(similarity / temperature)."""

    tasks: str = "knn"
    """Evaluations on these data sets during training: one or more of knn, logistic, linear, with commas."""

    health_period_iterations: int = 100
    """Steps between two measurements of health without labels, at the next row of the log; 0 for none."""

    resize_size: int = 0
    """Short side to which images are resized before the crop; 0 for none on images of crop size, else 256/224 of it."""

    def __post_init__(self) -> None:
        at_least("evaluation.eval_period_iterations", self.eval_period_iterations, 0, meaning="0 for the end only")
        at_least("evaluation.knn_k", self.knn_k, 1)
        check_positive("evaluation.knn_temperature", self.knn_temperature)
        at_least("evaluation.health_period_iterations", self.health_period_iterations, 0, meaning="0 for none")
        for task in self.task_names:
            one_of("evaluation.tasks", task, TRAINING_EVALUATIONS)
        at_least("evaluation.resize_size", self.resize_size, 0, meaning="0 for the rule")
        if bool(self.knn_train_dataset) != bool(self.knn_val_dataset):
            missing = "knn_val_dataset" if self.knn_train_dataset else "knn_train_dataset"
            raise ConfigError(
                f"evaluation.{missing} is empty while its partner is set; name both data sets, or none of them"
            )

    @property
    def task_names(self) -> tuple[str, ...]:
        """The names in `tasks`, each once."""
        return tuple(dict.fromkeys(name for word in self.tasks.split(",") if (name := word.strip())))
