"""Keys of the configuration to change, chosen by what the run uses now."""

from dinov2.apps.doctor.run_log import RunLog
from dinov2.apps.doctor.signs import Signs, recent
from dinov2.configs import Config

__all__ = [
    "HIGH_LR",
    "faster_data",
    "faster_learning",
    "harder_task",
    "more_prototypes",
    "moving_teacher",
    "smaller_steps",
]

HIGH_LR = 0.02
"""Peak learning rates of AdamW beyond which vision transformers are known to break; recipes use 0.0001 to 0.007."""


def smaller_steps(signs: Signs) -> str:
    """Remedy for steps that are too large."""
    if signs.peak_lr is None:
        return "lower optim.base_lr to a third, or lengthen optim.warmup_epochs"
    if signs.peak_lr > HIGH_LR:
        return f"lower optim.base_lr so that the peak, now {signs.peak_lr:g}, lies where others are (0.0001 to 0.007)"
    return f"lower optim.base_lr to a third (the peak is {signs.peak_lr:g}), or lengthen optim.warmup_epochs"


def more_prototypes(log: RunLog, signs: Signs) -> str:
    """Remedy for a teacher that uses few prototypes."""
    ways = []
    if log.cfg is not None and log.cfg.train.centering == "centering":
        ways.append("train.centering=sinkhorn_knopp, which forces all prototypes to be used")
    if log.cfg is not None and not log.cfg.dino.koleo_loss_weight:
        ways.append("dino.koleo_loss_weight=0.1")
    ways += [f"a higher teacher.teacher_temp (now {recent(signs.teacher_temp):.2g})", smaller_steps(signs)]
    return "; or ".join(ways)


def faster_data(log: RunLog) -> str:
    """Remedy for waiting."""
    if log.cfg is None:
        return "more loader workers (train.num_workers), faster storage, smaller images"
    train, ways = log.cfg.train, []
    if train.augmentation_backend != "tensor":
        ways.append("train.augmentation_backend=tensor")
    elif not train.cache_dataset:
        ways.append("train.cache_dataset=true, if the images fit into memory")
    ways.append(f"more loader workers (train.num_workers, now {train.num_workers})")
    return "; or ".join([*ways, "images on a local disk, stored smaller"])


def faster_learning(signs: Signs) -> str:
    """Remedy for a student that learns nothing."""
    ways = []
    if signs.peak_lr is not None and signs.peak_lr < 1e-5:
        ways.append(f"a higher optim.base_lr (the peak is {signs.peak_lr:g})")
    temperature = recent(signs.teacher_temp)
    if temperature > 0.07:
        ways.append(f"a lower teacher.teacher_temp (now {temperature:.2g})")
    ways += ["a longer run", "another optim.base_lr, three times up and down", "weaker crops and colours"]
    return "; or ".join(ways)


def harder_task(cfg: Config | None) -> str:
    """Remedy for a task that is too easy, or beside the point."""
    if cfg is not None:
        crops = cfg.crops
        changes = {
            "'crops.global_crops_scale=[0.32,1.0]'": crops.global_crops_scale[0] > 0.5,
            "crops.local_crops_number=8": not crops.local_crops_number,
            "crops.color_jitter_p=0.8 crops.color_jitter_strength=1.0": not (
                crops.color_jitter_p and crops.color_jitter_strength
            ),
            "crops.grayscale_p=0.2": not crops.grayscale_p,
        }
        if any(changes.values()):
            return " ".join(key for key, helps in changes.items() if helps)
    return (
        "compare the labelled images with those of the training: do they show the same things? Then try a longer run, "
        "or another optim.base_lr"
    )


def moving_teacher(signs: Signs) -> str:
    """Remedy for a teacher that does not move: a momentum that lets go of the start within the run."""
    # Along the cosine to 1, a start of 1 - x keeps exp(-x * steps / 2) of the first weights: here exp(-5) or less.
    start = 0.992 if signs.total is None else min(0.992, max(0.9, 1 - 10 / signs.total))
    return f"teacher.momentum_teacher={start:.3g} teacher.final_momentum_teacher=1.0"
